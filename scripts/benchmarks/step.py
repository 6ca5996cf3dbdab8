"""`step`: time of a training step, with and without the refresh of the bases."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import CONFIGS, SIZES, Row
from benchmarks.baselines import Baseline, Loss, baselines, rank_of
from benchmarks.estimates import estimate_steps
from benchmarks.models import (
    blocks_loss,
    init_llama,
    init_plain,
    llama_loss,
    plain_loss,
    separate_layers,
    with_dense,
)
from benchmarks.timing import interleaved, seconds
from galore_jax.errors import require, require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config
from galore_jax.training.config_file import load_config
from galore_jax.types import PyTree

MODELS = ("blocks", "plain", "llama")
LAYERS = 4  # of blocks; of those that are compiled for a target, 1
DENSE = ("flax", "galore_jax")
DTYPES = ("float32", "bfloat16")
BATCH = (8, 256)
# The baselines that are compiled for a target: the others would be with their refreshes.
COMPILED = "adamw,galore_projected"


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: an unknown model, size or kind of leaves, layers or parameters, or tokens that do
        not fill rows.
    """

    model: str = "blocks"
    size: str = "350m"
    layers: int = 0
    rank: int = 0
    tokens: int = math.prod(BATCH)
    leaves: str = "separate"
    dense: str = "flax"
    repeats: int = 7
    optimizers: str = ""
    params: str = "float32"
    products: str = ""
    device: str = ""

    def __post_init__(self):
        require_choice("model", self.model, MODELS)
        require_choice("size", self.size, SIZES)
        require_choice("leaves", self.leaves, ("separate", "stacked"))
        require_choice("dense", self.dense, DENSE)
        require_choice("params", self.params, DTYPES)
        require_choice("products", self.products, ("", *DTYPES))
        rows = self.tokens % BATCH[1] == 0
        require("tokens", self.tokens, rows, f"a multiple of {BATCH[1]}")


class Run:
    """A training with a baseline: its parameters and state, which each step donates."""

    def __init__(self, baseline: Baseline, loss: Loss, params: PyTree, batch: PyTree):
        step = jax.jit(functools.partial(baseline.step, loss), donate_argnums=(0, 1))
        self._params = jax.tree.map(lambda leaf: leaf.copy(), params)
        self._state = jax.jit(baseline.init)(params)
        self._batch = batch
        self._step = step.lower(self._params, self._state, batch).compile()
        self._refresh = None
        if baseline.refresh is not None:
            refresh = jax.jit(functools.partial(baseline.refresh, loss), donate_argnums=1)
            self._refresh = refresh.lower(self._params, self._state, batch).compile()

    @property
    def temporary_bytes(self) -> int:
        """Temporary memory of the compiled step."""
        analysis: Any = self._step.memory_analysis()
        return analysis.temp_size_in_bytes

    @property
    def temporary_bytes_of_refresh(self) -> int:
        """Temporary memory of the refresh before the first step, 0 if the step includes it."""
        analysis: Any = None if self._refresh is None else self._refresh.memory_analysis()
        return 0 if analysis is None else analysis.temp_size_in_bytes

    def __call__(self) -> PyTree:
        """Dispatches one step, the first one after a refresh of every matrix.

        Returns:
          The new parameters and state, which may not be computed yet.
        """
        if self._refresh is not None:
            self._state = self._refresh(self._params, self._state, self._batch)
            self._refresh = None
        self._params, self._state = self._step(self._params, self._state, self._batch)
        return self._params, self._state


def measure(settings: Settings) -> list[Row]:
    """The rows of every baseline."""
    config, model, shape = blocks(settings)
    return measure_model(model, settings, shape, settings.rank or rank_of(config))


def blocks(settings: Settings) -> tuple[Config, LlamaConfig, tuple[int, int]]:
    """The configuration, its model with the layers of the settings, and (rows, tokens)."""
    config = load_config(CONFIGS / f"llama_{settings.size}.toml")
    layers = 1 if settings.device else LAYERS
    if settings.model == "llama":
        layers = config.model.num_layers
    model = replace(config.model, num_layers=settings.layers or layers)
    return config, model, (settings.tokens // BATCH[1], BATCH[1])


def measure_model(
    config: LlamaConfig, settings: Settings, shape: tuple[int, int], rank: int
) -> list[Row]:
    """The rows for any model, shape of a batch (rows, tokens) and rank."""
    chosen = [one for one in baselines(rank) if one.stacks or settings.leaves == "separate"]
    if names := settings.optimizers or (COMPILED if settings.device else ""):
        for name in names.split(","):
            require_choice("optimizers", name, [one.name for one in chosen])
        chosen = [one for one in chosen if one.name in ("adamw", *names.split(","))]
    loss, start = problem(config, settings, shape)
    if settings.device:
        return estimate_steps(chosen, loss, start, settings.device)
    return measure_steps(chosen, loss, *start(), settings.repeats, settings.model)


def problem(
    config: LlamaConfig, settings: Settings, shape: tuple[int, int]
) -> tuple[Loss, Callable[[], tuple[PyTree, PyTree]]]:
    """The loss, and a function that makes parameters and a batch of this shape (rows, tokens)."""
    on_cpu = not settings.device and jax.default_backend() == "cpu"
    dtype = jnp.dtype(settings.products or ("float32" if on_cpu else "bfloat16"))
    config = replace(config, dtype=dtype.name)

    def start() -> tuple[PyTree, PyTree]:
        if settings.model == "plain":
            params = init_plain(config)
        else:
            params = init_llama(config)
            if settings.model == "blocks":
                params = {"layers": params["layers"]}
            if settings.leaves == "separate":
                params = separate_layers(params)
        params = jax.tree.map(lambda leaf: leaf.astype(settings.params), params)
        if settings.model == "llama":
            return params, jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
        size = 2, *shape, config.hidden_size
        return params, jax.random.normal(jax.random.key(1), size, dtype)

    of_model = {"blocks": blocks_loss, "plain": plain_loss, "llama": llama_loss}[settings.model]

    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        return of_model(config, jax.tree.map(lambda leaf: leaf.astype(dtype), params), batch)

    return with_dense(settings.dense, loss), start


def measure_steps(
    chosen: Sequence[Baseline],
    loss: Loss,
    params: PyTree,
    batch: PyTree,
    repeats: int,
    title: str,
) -> list[Row]:
    """A row for each baseline, with times relative to the one called "adamw".

    `with_refreshes` has the time by which the first step, which refreshes all bases, is longer,
    divided by the number of steps between refreshes.
    """
    runs = {one.name: Run(one, loss, params, batch) for one in chosen}
    first = {name: seconds(run) for name, run in tqdm(runs.items(), f"{title}: first steps")}
    plain = interleaved(runs, repeats, f"{title}: steps")
    adamw = plain["adamw"]
    rows = []
    for one in chosen:
        time = plain[one.name]
        refresh = max(first[one.name] - time, 0) / one.gap if one.gap else 0
        rows.append(
            {
                "name": one.name,
                "seconds": time,
                "of_adamw": time / adamw,
                "with_refreshes": (time + refresh) / adamw,
                "temporary_bytes": runs[one.name].temporary_bytes,
            }
        )
    return rows
