"""`optimizers`: time of a step and bytes of state of all optimizers that a file compares."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import jax

from benchmarks import CONFIGS, Row
from benchmarks import step as of_step
from benchmarks.baselines import Baseline, full, projected, stock
from benchmarks.estimates import estimate_steps
from galore_jax.errors import require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.config_file import load_comparison
from galore_jax.training.optimizer import make_optimizer
from galore_jax.training.state import tree_bytes

STEPS = 1000  # of the learning-rate schedule, which takes no time


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py."""

    compare: str = "5m"
    size: str = "350m"
    layers: int = 0
    tokens: int = of_step.Settings.tokens
    optimizers: str = ""
    repeats: int = of_step.Settings.repeats
    device: str = ""


def measure(settings: Settings) -> list[Row]:
    """The rows of every optimizer.

    Raises:
      InputError: as for `step`.
    """
    given = {name: value for name, value in asdict(settings).items() if name != "compare"}
    step = of_step.Settings(**given)
    configs = load_comparison(CONFIGS / f"llama_{settings.compare}.toml")
    _, model, shape = of_step.blocks(step)
    return measure_model(model, configs, shape, step)


def measure_model(
    model: LlamaConfig,
    configs: Mapping[str, Config],
    shape: tuple[int, int],
    step: of_step.Settings,
) -> list[Row]:
    """The rows for any model, optimizers by label, and shape of a batch (rows, tokens)."""
    loss, start = of_step.problem(model, step, shape)
    names = step.optimizers.split(",") if step.optimizers else configs
    for name in names:
        require_choice("optimizers", name, list(configs))
    # AdamW comes first, because all others are relative to it.
    labels = [label for label in configs if label == "adamw" or label in names]
    chosen = [baseline_of(label, configs[label].optimizer) for label in labels]
    if step.device:
        rows = estimate_steps(chosen, loss, start, step.device)
    else:
        rows = of_step.measure_steps(chosen, loss, *start(), step.repeats, "optimizers")
    params, _ = jax.eval_shape(start)
    state = {one.name: tree_bytes(jax.eval_shape(one.init, params)) for one in chosen}
    return [row | _bytes(state, row["name"]) for row in rows]


def _bytes(state: Mapping[str, int], name: str) -> Row:
    """Of the state, none for the rows below an estimate."""
    if name not in state:
        return {}
    return {"bytes": state[name], "bytes_of_adamw": state[name] / state["adamw"]}


def baseline_of(label: str, config: OptimizerConfig) -> Baseline:
    """The optimizer of a training, with the gradients that it computes there."""
    tx = make_optimizer(config, STEPS)
    if not config.has_galore:
        return stock(label, tx)
    kind = projected if config.has_projected_gradients else full
    return replace(kind(label, tx), gap=config.galore.update_proj_gap)
