"""A lock that keeps two processes from writing to one folder."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from galore_jax.errors import InputError
from galore_jax.files import open_no_link


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
    descriptor = open_no_link(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(_refusal(path, work, remedy)) from None
            # Others, such as ENOLCK or EOPNOTSUPP, mean that there are no locks.
        os.ftruncate(descriptor, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, {now}\n".encode())
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _refusal(path: Path, work: str, remedy: str) -> str:
    holder, _, since = path.read_text(errors="replace").strip().partition(", ")
    return (
        f"{holder or 'another process'} is {work}{f' since {since}' if since else ''}: let it "
        f"finish or stop it, or {remedy}."
    )
