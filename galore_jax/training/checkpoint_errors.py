"""What Orbax and TensorStore raise about disks and damaged files, as errors for the user."""

import errno
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from galore_jax.errors import InputError, names_full_disk


@contextmanager
def raise_on_full_disk(folder: Path) -> Iterator[None]:
    """Converts TensorStore's ValueError about a full disk to an OSError."""
    try:
        yield
    except ValueError as error:
        if not names_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


@contextmanager
def raise_on_corruption(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Converts what Orbax, TensorStore or JSON raise on reading to an `InputError`."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        checkpoint = Path(manager.directory, str(step))
        for path in (checkpoint, *checkpoint.rglob("*")):
            if not os.access(path, os.R_OK):
                raise InputError(f"{path} is not readable: change its permissions.") from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # TensorStore's message starts with the kind of error, and a long location follows.
        reason = str(cause).partition("\n")[0].partition(": Error")[0]
        reason = textwrap.shorten(reason, 120, placeholder=" …")
        older = [other for other in manager.all_steps() if other < step]
        remedy = f"resume from {max(older)}" if older else "start from the beginning"
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({reason}): move it out of "
            f"{checkpoint.parent} to {remedy}."
        ) from error


class _FullDiskFilter(logging.Filter):
    """Drops the tracebacks that each thread and task of a failed save logs, some much later."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and names_full_disk(record.exc_info[1]))


_FULL_DISK_FILTER = _FullDiskFilter()


def silence_duplicate_errors() -> None:
    """Silences the reports that accompany the exception of a failed save or restore.

    TensorStore reports each read or write that ends after Orbax has closed its event loop, and
    Python each coroutine that waited for one, some only at the end of the process. So the filters
    are never removed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_FULL_DISK_FILTER)
    hook = sys.unraisablehook
    if getattr(hook, "hides_orbax", False):
        return

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        is_of_orbax = code is not None and "orbax" in code.co_filename
        if not is_of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    report.hides_orbax = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = report
