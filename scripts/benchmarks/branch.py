"""`branch`: a step of `make_step` that branches on whether a basis is due, against two programs."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import optax

import galore_jax
from benchmarks import CONFIGS, Row
from benchmarks.baselines import GAP, LEARNING_RATE, WEIGHT_DECAY, Loss, projected
from benchmarks.models import blocks_loss, init_llama, separate_layers
from benchmarks.step import BATCH, Run
from benchmarks.timing import interleaved, seconds
from galore_jax.training.config_file import load_config
from galore_jax.types import PyTree

RANK = 256


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py."""

    layers: int = 2
    repeats: int = 7


def measure(settings: Settings) -> list[Row]:
    """A row for each form of the step, for separate blocks at the width of LLaMA 350M."""
    model = load_config(CONFIGS / "llama_350m.toml").model
    model = replace(model, num_layers=settings.layers, dtype="float32")
    params = separate_layers({"layers": init_llama(model)["layers"]})
    batch = jax.random.normal(jax.random.key(1), (2, *BATCH, model.hidden_size))
    loss = functools.partial(blocks_loss, model)
    tx = galore_jax.adamw(LEARNING_RATE, RANK, GAP, weight_decay=WEIGHT_DECAY)
    two = projected("two programs", tx)
    runs, rows = {}, []
    for form in (two, replace(two, name="one with a branch", step=branching(tx), refresh=None)):
        start = time.perf_counter()
        runs[form.name] = run = Run(form, loss, params, batch)
        compiling = time.perf_counter() - start
        temporary = max(run.temporary_bytes, run.temporary_bytes_of_refresh)
        row = {"name": form.name, "compile_seconds": compiling, "temporary_bytes": temporary}
        rows.append(row | {"with_refresh": seconds(run)})
    times = interleaved(runs, settings.repeats, "steps without a refresh")
    return [row | {"seconds": times[row["name"]]} for row in rows]


def branching(tx: optax.GradientTransformation) -> Callable[..., tuple[PyTree, PyTree]]:
    """The step as one program."""

    def step(loss: Loss, params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        params, state, _ = galore_jax.make_step(loss, tx)(params, state, batch)
        return params, state

    return step
