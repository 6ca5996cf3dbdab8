"""Files that appear complete or not at all, and JSON files."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError

UNFINISHED = ".unfinished"


def open_no_link(path: Path, flags: int) -> int:
    """Opens a file as `os.open` does, but not through a symbolic link, which may be an attack.

    Raises:
      InputError: the path is a symbolic link.
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
        raise InputError(f"{path} is a symbolic link, which is not followed: remove it.") from None


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file to write to; it becomes `path` only if the block succeeds.

    After an exception the temporary file is removed. A process that is killed leaves it behind;
    its name ends in `UNFINISHED`.

    Raises:
      InputError: the temporary path is a symbolic link.
    """
    temporary = Path(f"{os.fspath(path)}{UNFINISHED}")
    os.close(open_no_link(temporary, os.O_WRONLY | os.O_CREAT))
    try:
        yield temporary
        # Otherwise a power cut may leave the name without the content.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears complete or not at all."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears complete or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"there is no {path}: name a folder that has one.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object.")
    return value
