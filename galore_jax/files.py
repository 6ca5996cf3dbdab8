"""Files that appear complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary sibling to write to; it takes the name `path` only if the block succeeds.

    After an exception the sibling is removed. A process killed in the middle leaves one behind
    whose name ends in `UNFINISHED`.
    """
    sibling = Path(f"{os.fspath(path)}{UNFINISHED}")
    try:
        yield sibling
        # Else a power cut may leave the name, but not the content.
        with sibling.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)
