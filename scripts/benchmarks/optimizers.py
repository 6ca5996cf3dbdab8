"""`optimizers`: time of a step and bytes of state of all optimizers that a file compares."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
from tqdm import tqdm

from benchmarks.baselines import GAP, Baseline, full, projected, stock_step
from benchmarks.models import blocks_loss, init_llama, separate_layers, with_dense
from benchmarks.report import Row
from benchmarks.state import CONFIGS, require_size
from benchmarks.step import BATCH, Run
from benchmarks.timing import interleaved, seconds
from galore_jax.errors import require
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.config_file import load_comparison, load_config
from galore_jax.training.optimizer import make_optimizer
from galore_jax.training.state import tree_bytes

STEPS = 1000  # of the learning-rate schedule, which takes no time


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: an unknown size, or a number out of range.
    """

    size: str = "5m"
    layers: int = 4
    repeats: int = 5

    def __post_init__(self):
        require_size("size", self.size)
        require("layers", self.layers, self.layers >= 1, "at least 1")
        within = 1 <= self.repeats < GAP
        require("repeats", self.repeats, within, f"at least 1 and below {GAP}, the next refresh")


def measure(settings: Settings) -> list[Row]:
    """The rows of every optimizer, for blocks of LLaMA 350M."""
    model = load_config(CONFIGS / "llama_350m.toml").model
    model = replace(model, num_layers=settings.layers, dtype="float32")
    configs = load_comparison(CONFIGS / f"llama_{settings.size}.toml")
    return measure_model(model, configs, BATCH, settings.repeats)


def measure_model(
    model: LlamaConfig, configs: Mapping[str, Config], shape: tuple[int, int], repeats: int
) -> list[Row]:
    """The rows for any model, optimizers by label, and shape of a batch (rows, tokens)."""
    params = separate_layers({"layers": init_llama(model)["layers"]})
    batch = jax.random.normal(jax.random.key(1), (2, *shape, model.hidden_size))
    loss = with_dense("flax", functools.partial(blocks_loss, model))

    bytes_of, runs = {}, {}
    for label, config in configs.items():
        optimizer = scaled(config.optimizer, model.hidden_size / config.model.hidden_size)
        baseline = baseline_of(label, optimizer)
        bytes_of[label] = tree_bytes(jax.eval_shape(baseline.init, params))
        runs[label] = Run(baseline, loss, params, batch)
    first = {label: seconds(run) for label, run in tqdm(runs.items(), "steps with every refresh")}
    plain = interleaved(runs, repeats, "steps")

    def row(label: str, config: OptimizerConfig) -> Row:
        refresh = max(first[label] - plain[label], 0) if config.has_galore else 0
        time = plain[label] + refresh / config.update_proj_gap
        return {"name": label, "seconds": time, "bytes": bytes_of[label]}

    rows = [row(label, config.optimizer) for label, config in configs.items()]
    baseline = next((row for row in rows if row["name"] == "adamw"), rows[0])
    ratios = {"of_adamw": "seconds", "bytes_of_adamw": "bytes"}
    return [
        row | {ratio: row[key] / baseline[key] for ratio, key in ratios.items()} for row in rows
    ]


def scaled(optimizer: OptimizerConfig, factor: float) -> OptimizerConfig:
    """The optimizer for a width that is larger by this factor, with the same fraction of it."""
    is_fixed = isinstance(optimizer.rank, float) or optimizer.rank == 1
    return optimizer if is_fixed else replace(optimizer, rank=round(optimizer.rank * factor))


def baseline_of(label: str, config: OptimizerConfig) -> Baseline:
    """The optimizer of a training, with the gradients that it computes there."""
    tx = make_optimizer(config, STEPS)
    if not config.has_galore:
        return Baseline(label, tx.init, stock_step(tx))
    if config.has_projected_gradients:
        return projected(label, tx)
    return full(label, tx)
