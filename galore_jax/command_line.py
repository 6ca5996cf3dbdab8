"""Arguments of the command line: lists, and folders to write to."""

import os
from collections.abc import Callable
from pathlib import Path
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


def check_folder(name: str, folder: str | Path) -> None:
    """Checks, before any work, that a folder can be written to or made.

    Args:
      name: of the argument.
      folder: its value, or the folder of the file that it names.

    Raises:
      InputError: it or a folder above it is a file, or may not be written to.
    """
    nearest = next(path for path in (Path(folder), *Path(folder).parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(
            f"{name} needs the folder {folder}, but {nearest} is not a folder: name another."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} needs the folder {folder}, but {nearest} cannot be written to: change its "
            "permissions, or name another."
        )
