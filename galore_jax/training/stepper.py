"""Compiled training steps, with and without a refresh of the bases or a restart."""

import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.mesh import on_mesh
from galore_jax.training.relora import steps_until_restart
from galore_jax.training.state import TrainState
from galore_jax.training.step import make_train_step
from galore_jax.training.task import Batch, Task

# Compiled programs that are kept between runs, the latest of them.
CACHE_BYTES = 4 * 2**30


def check_gpu(optimizer: OptimizerConfig) -> None:
    """Checks that there is a GPU if the configured implementation needs one.

    Raises:
      InputError: there is none.
    """
    if optimizer.implementation == "pallas" and jax.default_backend() != "gpu":
        raise InputError(
            'optimizer.implementation = "pallas" needs an NVIDIA GPU, but JAX finds none: set '
            'optimizer.implementation = "xla".'
        )


class Stepper:
    """Training steps: one that refreshes the bases or restarts ReLoRA, and one that does not.

    Each is compiled when it is first needed, and again for batches of another shape.

    Args:
      task: the task, with the configuration of the run.
      mesh: from `training_mesh`; batches come from `put_batch`.
      programs: those that an earlier stepper compiled for a run that differs in its seed alone, or
        an empty dictionary to collect them.
      compiling: makes a context in which a program is compiled.

    Attributes:
      compile_seconds: the time that compilation took so far.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh | None = None,
        programs: dict[Any, Any] | None = None,
        compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._task, self._mesh, self._compiling = task, mesh, compiling
        self._programs = {} if programs is None else programs
        self._steps_left = 0
        self.compile_seconds = 0.0

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; arguments and results are those of the function from `make_train_step`."""
        refreshes = self._task.config.optimizer.has_refreshes and self._is_due(state)
        shapes = tuple(np.shape(leaf) for leaf in batch.values())
        if (refreshes, shapes) not in self._programs:
            with self._compiling(), on_mesh(self._mesh):
                start = time.perf_counter()
                step: Any = make_train_step(self._task, refreshes=refreshes, mesh=self._mesh)
                self._programs[refreshes, shapes] = step.lower(state, batch).compile()
                self.compile_seconds += time.perf_counter() - start
        return self._programs[refreshes, shapes](state, batch)

    def _is_due(self, state: TrainState) -> bool:
        """Whether this step has to refresh or restart.

        To know it, the host has to wait for the device. So it does not ask at every step, but only
        after as many steps as were left when it last asked.
        """
        if self._steps_left == 0:
            optimizer = self._task.config.optimizer
            if optimizer.has_projected_gradients:
                self._steps_left = int(updates_until_refresh(state.opt_state))
            else:
                gap = optimizer.lora.restart_gap
                self._steps_left = steps_until_restart(gap, int(state.step))
            if self._steps_left == 0:
                return True  # It still is at the next step if it fails.
        self._steps_left -= 1
        return False


@contextmanager
def raise_on_full_memory(remedy: str) -> Iterator[None]:
    """Turns Python's and JAX's errors for it into an `InputError` that ends in a remedy."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"there is too little memory for this training: {remedy}.") from error


def keep_programs() -> None:
    """Keeps what JAX compiles for one device between processes, unless the user has chosen.

    It goes to galore_jax/ in the user's folder of caches, by the kind of CPU, as a program for one
    may not run on another. Not on several devices: of a program that other processes have compiled,
    one that a process finds may exchange arrays in another order. Call it before JAX compiles.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or jax.device_count() > 1:
        return
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        about = [
            line for line in info.read_text().splitlines() if line.startswith(("flags", "Feat"))
        ]
        cpu = "".join(about[:1])
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "galore_jax" / f"{platform.machine()}-{zlib.crc32(cpu.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # The latter without a home.
        return  # Only time is lost.
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
