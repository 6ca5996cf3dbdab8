"""`step`: time of a training step in float32, with and without the refresh of the bases."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from tqdm import tqdm

from benchmarks import CONFIGS, Row
from benchmarks.baselines import Baseline, Loss, baselines
from benchmarks.models import blocks_loss, init_llama, llama_loss, separate_layers, with_dense
from benchmarks.timing import interleaved, seconds
from galore_jax.errors import require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config_file import load_config
from galore_jax.types import PyTree

LAYERS = {"blocks": 4, "llama": 24}
DENSE = ("flax", "galore_jax")
BATCH = (8, 256)
RANK = 256


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: an unknown model or kind of leaves or layers.
    """

    model: str = "blocks"
    layers: int = 0
    leaves: str = "separate"
    dense: str = "flax"
    repeats: int = 7

    def __post_init__(self):
        require_choice("model", self.model, LAYERS)
        require_choice("leaves", self.leaves, ("separate", "stacked"))
        require_choice("dense", self.dense, DENSE)


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
    layers = settings.layers or LAYERS[settings.model]
    model = load_config(CONFIGS / "llama_350m.toml").model
    return measure_model(replace(model, num_layers=layers, dtype="float32"), settings, BATCH, RANK)


def measure_model(
    config: LlamaConfig, settings: Settings, shape: tuple[int, int], rank: int
) -> list[Row]:
    """The rows for any model, shape of a batch (rows, tokens) and rank."""
    params = init_llama(config)
    if settings.model == "blocks":
        params = {"layers": params["layers"]}
        batch = jax.random.normal(jax.random.key(1), (2, *shape, config.hidden_size))
        loss = functools.partial(blocks_loss, config)
    else:
        batch = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
        loss = functools.partial(llama_loss, config)
    if settings.leaves == "separate":
        params = separate_layers(params)
    chosen = [one for one in baselines(rank) if one.stacks or settings.leaves == "separate"]
    loss = with_dense(settings.dense, loss)
    return measure_steps(chosen, loss, params, batch, settings.repeats, settings.model)


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
