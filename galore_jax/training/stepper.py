"""Training steps compiled ahead of time, with and without a refresh of the bases."""

import time

import jax

from galore_jax.errors import InputError
from galore_jax.grads.sketch import updates_until_refresh
from galore_jax.training.config import Config
from galore_jax.training.state import Batch, TrainState, batch_shapes
from galore_jax.training.step import make_train_step


def check_gpu(config: Config) -> None:
    """Ends a run whose implementation is for a GPU where there is none.

    Raises:
      InputError: there is none.
    """
    if config.optimizer.implementation == "pallas" and jax.default_backend() != "gpu":
        raise InputError(
            'optimizer.implementation = "pallas" needs an NVIDIA GPU, and JAX finds none here: set '
            'optimizer.implementation = "xla".'
        )


class Stepper:
    """Steps of training, compiled ahead: those that refresh bases apart from the others.

    The device is not asked at every step whether a basis is due, since the host would have to wait
    for the answer: only when as many steps have passed as the one nearest to its refresh had left.

    Raises:
      InputError: an implementation for a GPU where there is none.
    """

    def __init__(self, config: Config, state: TrainState):
        check_gpu(config)
        batch = batch_shapes(config)
        began = time.perf_counter()
        self._step = make_train_step(config).lower(state, batch).compile()
        self._refreshing_step = None
        if config.optimizer.are_projected:
            refreshing = make_train_step(config, refreshes=True)
            self._refreshing_step = refreshing.lower(state, batch).compile()
        self._steps_left = 0
        self.compile_seconds = time.perf_counter() - began

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """As the function of `make_train_step`."""
        if self._refreshing_step is not None and self._steps_left == 0:
            self._steps_left = int(updates_until_refresh(state.opt_state))
            if self._steps_left == 0:
                state, measured = self._refreshing_step(state, batch)
                # 0 where a basis could not be refreshed: it is tried again at the next step.
                self._steps_left = int(updates_until_refresh(state.opt_state))
                return state, measured
        self._steps_left -= 1
        return self._step(state, batch)
