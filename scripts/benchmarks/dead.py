"""`dead`: time of a step, refreshes included, if a weight has no gradient to make a basis from."""

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import galore_jax
from benchmarks.baselines import GAP, LEARNING_RATE
from benchmarks.report import Row
from benchmarks.timing import seconds
from galore_jax.errors import require
from galore_jax.types import PyTree

RANK = 32


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: a number out of range.
    """

    experts: int = 8
    width: int = 256
    tokens: int = 256
    steps: int = 100

    def __post_init__(self):
        require("experts", self.experts, self.experts >= 2, "at least 2")
        require("width", self.width, self.width > RANK, f"above {RANK}, the rank")
        require("tokens", self.tokens, self.tokens >= 1, "at least 1")
        require("steps", self.steps, self.steps >= 1, "at least 1")


class Run:
    """A training of a mixture of experts."""

    def __init__(self, params: PyTree, batch: jax.Array, alive: jax.Array, frozen: bool):
        tx = galore_jax.adamw(LEARNING_RATE, RANK, GAP)
        loss = functools.partial(mixture_loss, frozen=frozen)

        def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
            _, gradients = galore_jax.value_and_grad(loss)(params, state, batch, alive)
            return galore_jax.apply_gradients(tx, gradients, state, params)

        def refresh(params: PyTree, state: PyTree) -> PyTree:
            return galore_jax.refresh(loss)(params, state, batch, alive)

        self._params, self._state = params, tx.init(params)
        self._step = jax.jit(step).lower(params, self._state).compile()
        self._refresh = jax.jit(refresh).lower(params, self._state).compile()
        self.refreshes = 0

    def __call__(self) -> tuple[PyTree, PyTree]:
        """One step, after a refresh if one is due."""
        if galore_jax.refresh_due(self._state):
            self._state = self._refresh(self._params, self._state)
            self.refreshes += 1
        self._params, self._state = self._step(self._params, self._state)
        return self._params, self._state


def measure(settings: Settings) -> list[Row]:
    """The rows for tokens for all experts, for an expert without tokens, and a frozen weight."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (settings.experts, settings.width, settings.width)
    params = {
        "up": jax.random.normal(keys[0], shape) / settings.width**0.5,
        "down": jax.random.normal(keys[1], shape) / settings.width**0.5,
        "first": jax.random.normal(keys[2], shape[1:]) / settings.width**0.5,
    }
    batch = jax.random.normal(keys[3], (settings.tokens, settings.width))
    alive = jnp.ones(settings.experts)
    runs = {
        "all alive": Run(params, batch, alive, frozen=False),
        "an expert dead": Run(params, batch, alive.at[-1].set(0), frozen=False),
        "a weight frozen": Run(params, batch, alive, frozen=True),
    }
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(settings.steps), "steps"):
        for name, run in runs.items():
            measured[name].append(seconds(run))
    medians = {name: statistics.median(times) for name, times in measured.items()}
    return [
        {
            "name": name,
            "refreshes": run.refreshes,
            "seconds": medians[name],
            "of_all_alive": medians[name] / medians["all alive"],
            "mean_of_all_alive": sum(measured[name]) / sum(measured["all alive"]),
        }
        for name, run in runs.items()
    ]


def mixture_loss(params: PyTree, x: jax.Array, alive: jax.Array, *, frozen: bool) -> Any:
    """Mean square of the outputs of the experts; those that are not alive get zeros."""
    first = jax.lax.stop_gradient(params["first"]) if frozen else params["first"]
    x = jnp.tanh(x @ first)
    inputs = alive[:, None, None] * x
    hidden = jax.nn.silu(jnp.einsum("eti,eio->eto", inputs, params["up"]))
    return jnp.mean(jnp.einsum("eti,eio->eto", hidden, params["down"]) ** 2)
