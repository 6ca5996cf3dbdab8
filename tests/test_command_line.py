import argparse

import pytest
from command_line import positive, separated


def test_lists_are_separated_by_commas_without_repetitions():
    assert separated()(" a b,c,,c") == ["a b", "c"]
    assert separated(float)("1e-3, 2,0.001") == [0.001, 2]
    for kind, text, reason in ((str, ",", "list something"), (int, "0,x", "'0,x' has more than")):
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            separated(kind)(text)


def test_a_number_of_things_is_at_least_one():
    assert positive("12") == 12
    for text in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 1"):
            positive(text)
