"""Arguments of the command line: lists, and folders to write to."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError


def separated(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """The `type` of an argument with a list of values between commas; duplicates are left out."""

    def parse(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            found = list(dict.fromkeys(map(kind, parts)))
        except ValueError:
            raise ArgumentTypeError(f"{text!r} has more than numbers and commas") from None
        if not found:
            raise ArgumentTypeError("list something, separated by commas, or leave it out")
        return found

    return parse


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
