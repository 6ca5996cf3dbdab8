"""Files that appear complete or not at all, JSON files, and locks of folders."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError

UNFINISHED = ".unfinished"


def _open_no_link(path: Path, flags: int) -> int:
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
    os.close(_open_no_link(temporary, os.O_WRONLY | os.O_CREAT))
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


@contextmanager
def locked(path: Path, work: str, remedy: str) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which records the holder and the time.

    The operating system releases the lock however this process ends. On file systems without locks
    this does nothing.

    Args:
      path: created if it does not exist.
      work: what the holder does, for the message, as in "training in runs/demo".
      remedy: what to do instead, as in "name another training.folder".

    Raises:
      InputError: another process holds the lock (the message names its id, its host and the time),
        or `path` is a symbolic link.
    """
    descriptor = _open_no_link(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = path.read_text(errors="replace").strip() or "another process"
                raise InputError(
                    f"{holder} is {work}: let it finish or stop it, or {remedy}."
                ) from None
            # Others, such as ENOLCK or EOPNOTSUPP, mean that there are no locks.
        os.ftruncate(descriptor, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = f"process {os.getpid()} on {socket.gethostname()} (since {now})"
        os.write(descriptor, holder.encode())
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
