"""Several processes that train together: how they start, agree and end.

All of them run the same program. Process 0 writes the run's files and reports progress. A signal or
an error in one process reaches the others through the functions here, which all have to call at the
same point. A single process skips them; `keep_programs` is for one with a single device.
"""

import atexit
import contextlib
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from galore_jax.errors import InputError

# Seconds until the others notice that a process is dead, or wait for it to end.
TIMEOUT = 20
# Compiled programs that are kept between runs, the latest of them.
CACHE_BYTES = 4 * 2**30


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[None]:
    """Joins this process with the others until it ends.

    Without arguments it does so if Slurm or Open MPI has started several processes, as their
    environment variables tell. Enter it before JAX uses any device.

    Args:
      coordinator: address and port of process 0, as host:port.
      processes: their number.
      process: index of this one, from 0.

    Raises:
      InputError: JAX cannot join the processes by these arguments.
    """
    if (coordinator, processes, process) == (None, None, None) and not _in_cluster():
        yield
        return
    # JAX's own handler of SIGTERM would hide the signal from this program.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        timeouts: Any = {"heartbeat_timeout_seconds": TIMEOUT, "shutdown_timeout_seconds": TIMEOUT}
        jax.distributed.initialize(coordinator, processes, process, **timeouts)
    except (ValueError, LookupError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"this process cannot join the others ({error}): give all of --coordinator, the host "
            "of process 0 and a free port there, as in node0:1234, --processes, and --process, "
            "from 0 to one less; or none of them in a single process or in one that Slurm or Open "
            "MPI starts."
        ) from error
    if jax.default_backend() == "cpu":
        # Process 0 alone finds its programs in JAX's cache. On CPUs such a program may exchange
        # arrays in another order than what the other processes have compiled.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    except Exception as error:
        if not getattr(error, "ends_all", False):
            # The others wait for this process, and end once it is gone. JAX would wait for them.
            atexit.register(_end_at_once, 2 if isinstance(error, InputError) else 1)
        raise


def _in_cluster() -> bool:
    """Whether Slurm or Open MPI started this process as one of several."""
    slurm = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in os.environ else "1"
    return int(slurm) > 1 or int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _end_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_programs() -> None:
    """Keeps what JAX compiles for one device between processes, unless the user has chosen.

    It goes to galore_jax/ in the user's folder of caches, by the kind of CPU, as a program for one
    may not run on another. Not on several devices: of a program that other processes have compiled,
    one that a process finds may exchange arrays in another order. Call it before JAX compiles.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or jax.device_count() > 1:
        return
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Feat"))), "")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "galore_jax" / f"{platform.machine()}-{zlib.crc32(cpu.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # The latter without a home.
        return  # Only time is lost.
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def is_first() -> bool:
    """Whether this is process 0, which writes files and reports progress."""
    return jax.process_index() == 0


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A block that ends all processes if it raises an exception in one of them.

    The first such process reports it; the others end with status 2. The block may not exchange
    anything between processes by itself.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        error.ends_all = True  # pyright: ignore[reportAttributeAccessIssue]
        if _gathered([True]).argmax() != jax.process_index():
            raise SystemExit(2) from None
        raise
    if _gathered([False]).any():
        raise SystemExit(2)


def largest(number: int) -> int:
    """The largest of the numbers that the processes give, in all of them."""
    return number if jax.process_count() == 1 else int(_gathered([number]).max())


def check_same(settings: str) -> None:
    """Checks that all processes were started with the same settings, in any text.

    Raises:
      InputError: in a process whose settings differ from those of process 0. The others end with
        status 2.
    """
    if jax.process_count() == 1:
        return
    checksums = _gathered([zlib.crc32(settings.encode()) >> 1])[:, 0]
    with ending_together():
        if checksums[jax.process_index()] != checksums[0]:
            raise InputError(
                f"process {jax.process_index()} was started with other settings than process 0: "
                "start all processes with the same configuration and arguments."
            )


def stopping_together(signalled: Callable[[], int]) -> Callable[[], int]:
    """Makes a function, to be called after each step, that returns the same in all processes.

    A process alone gets `signalled` itself. Several exchange its value about once a second, after
    the same steps, so that most steps need not wait for the others, and get the largest.

    Args:
      signalled: the number of the signal that told this process to stop, or 0.
    """
    if jax.process_count() == 1:
        return signalled
    every, left, mark = 1, 1, time.perf_counter()

    def stops() -> int:
        nonlocal every, left, mark
        left -= 1
        if left:
            return 0
        seconds = time.perf_counter() - mark
        per_second = min(int(every / seconds), 2 * every)
        answers = _gathered([signalled(), max(1, per_second)])
        every = left = int(answers[0, 1])
        mark = time.perf_counter()
        return int(answers[:, 0].max())

    return stops


def _gathered(values: list[int]) -> np.ndarray:
    """The values of all processes, (processes, len(values))."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))
