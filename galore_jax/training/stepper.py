"""Training steps compiled ahead of time, with and without a refresh of the bases or a restart."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.countdown import Countdown
from galore_jax.training.layout import on_mesh
from galore_jax.training.relora import steps_until_restart
from galore_jax.training.state import Batch, TrainState, batch_shapes
from galore_jax.training.step import make_train_step


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


@contextmanager
def raise_on_full_memory(remedy: str) -> Iterator[None]:
    """Turns Python's and JAX's errors for it into an `InputError` that ends in a remedy."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"there is too little memory for this training: {remedy}.") from error


class Stepper:
    """Training steps, compiled ahead of time: one that refreshes the bases, and one that does not.

    With ReLoRA the first one restarts the adapters.

    Args:
      config: the configuration of the run.
      state: the state at the first step, or its shapes.
      mesh: from `training_mesh`; batches come from `put_batch`.

    Attributes:
      compile_seconds: the time that compilation took.
    """

    def __init__(self, config: Config, state: TrainState, mesh: Mesh | None = None):
        batch = batch_shapes(config, mesh)
        start = time.perf_counter()
        step, refreshing_step = make_train_step(config, mesh=mesh), None
        if config.optimizer.has_refreshes:
            refreshing_step = make_train_step(config, refreshes=True, mesh=mesh)
        with on_mesh(mesh):
            self._step = step.lower(state, batch).compile()
            if refreshing_step is not None:
                refreshing_step = refreshing_step.lower(state, batch).compile()
        self._config = config
        self._refreshing_step = refreshing_step
        self._refresh = Countdown(self._steps_until_refresh)
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; arguments and results are those of the function from `make_train_step`."""
        if self._refreshing_step is not None and self._refresh.is_over(state):
            return self._refreshing_step(state, batch)
        return self._step(state, batch)

    def _steps_until_refresh(self, state: TrainState) -> int:
        if self._config.optimizer.has_projected_gradients:
            return int(updates_until_refresh(state.opt_state))
        return steps_until_restart(self._config, state.step)
