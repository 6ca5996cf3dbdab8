"""`optimizers`: time of a step and bytes of state of all optimizers that a file compares."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from benchmarks import CONFIGS, Row
from benchmarks.baselines import Baseline, full, projected, stock
from benchmarks.models import blocks_loss, init_llama, separate_layers, with_dense
from benchmarks.step import BATCH, measure_steps
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.config_file import load_comparison, load_config
from galore_jax.training.optimizer import make_optimizer
from galore_jax.training.state import tree_bytes

STEPS = 1000  # of the learning-rate schedule, which takes no time


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py."""

    size: str = "5m"
    layers: int = 4
    repeats: int = 5


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
    chosen = [
        baseline_of(label, scaled(config.optimizer, model.hidden_size / config.model.hidden_size))
        for label, config in configs.items()
    ]
    bytes_of = {one.name: tree_bytes(jax.eval_shape(one.init, params)) for one in chosen}
    rows = measure_steps(chosen, loss, params, batch, repeats, "optimizers")
    return [
        row | {"bytes": size, "bytes_of_adamw": size / bytes_of["adamw"]}
        for row, size in zip(rows, bytes_of.values(), strict=True)
    ]


def scaled(optimizer: OptimizerConfig, factor: float) -> OptimizerConfig:
    """The optimizer for a width that is larger by this factor, with the same fraction of it."""
    galore = optimizer.galore
    if isinstance(galore.rank, float) or galore.rank == 1:
        return optimizer
    return replace(optimizer, galore=replace(galore, rank=round(galore.rank * factor)))


def baseline_of(label: str, config: OptimizerConfig) -> Baseline:
    """The optimizer of a training, with the gradients that it computes there."""
    tx = make_optimizer(config, STEPS)
    if not config.has_galore:
        return stock(label, tx)
    kind = projected if config.has_projected_gradients else full
    return replace(kind(label, tx), gap=config.galore.update_proj_gap)
