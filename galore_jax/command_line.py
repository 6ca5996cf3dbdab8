"""Lists as arguments of the command line."""

from collections.abc import Callable
from typing import Any

from galore_jax.errors import InputError


def numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers between commas, without repetitions; none if the option is not given.

    Raises:
      InputError: there are none, or one is not of the kind, `int` or `float`.
    """
    found = comma_separated(option, text)
    try:
        return list(dict.fromkeys(kind(part) for part in found))
    except ValueError:
        raise InputError(f"{option} is {text!r}: give numbers, as in 1,2,3.") from None


def comma_separated(option: str, text: str | None) -> list[str]:
    """The parts between commas, without repetitions; none if the option is not given.

    Raises:
      InputError: there are none.
    """
    if text is None:
        return []
    found = dict.fromkeys(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise InputError(
            f"{option} is empty: list something, separated by commas, or leave it out."
        )
    return list(found)
