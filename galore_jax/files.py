"""Atomic writes: files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write to; it is renamed to `path` only if the block succeeds.

    After an exception the temporary file is removed. A process that is killed leaves it behind;
    its name ends in `UNFINISHED`.
    """
    temporary = Path(f"{os.fspath(path)}{UNFINISHED}")
    try:
        yield temporary
        # Otherwise a power cut may leave the name without the content.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
