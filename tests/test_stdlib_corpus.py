"""The embedded corpus."""

from pathlib import Path

import pytest

from galore_jax.data import stdlib_corpus
from galore_jax.data.stdlib_corpus import standard_library_texts
from galore_jax.errors import InputError


def write_library(folder: Path) -> None:
    for index in range(200):
        (folder / f"module{index}.py").write_text(f"index = {index}\n")
    for name in ("test/test_a.py", "json/tests/b.py", "site-packages/numpy/c.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("left_out = True\n")
    (folder / "latin.py").write_bytes(b"name = '\xe9'\n")
    (folder / "empty.py").write_text("")
    (folder / "notes.txt").write_text("left_out = True\n")


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_the_splits_share_the_modules_without_tests_and_packages(library):
    write_library(library)
    train, validation = standard_library_texts("train"), standard_library_texts("validation")
    assert sorted(train + validation) == sorted(f"index = {index}\n" for index in range(200))
    assert 0 < len(validation) < 25
    assert standard_library_texts("train") == train


def test_a_module_stays_in_its_split_when_others_are_added(library):
    write_library(library)
    before = standard_library_texts("validation")
    (library / "another.py").write_text("another = True\n")
    assert set(before) <= set(standard_library_texts("validation"))


def test_a_python_without_source_is_refused_with_a_remedy(library):
    with pytest.raises(InputError, match=r"no standard library source in .*prepare_c4"):
        standard_library_texts("train")


def test_this_python_has_megabytes_of_training_text():
    train, validation = standard_library_texts("train"), standard_library_texts("validation")
    assert sum(map(len, train)) > 5e6
    assert sum(map(len, validation)) > 1e5
