"""`optimizers`: time of a step and bytes of state of all optimizers that a file compares."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from benchmarks import CONFIGS, SIZES, Row
from benchmarks import step as of_step
from benchmarks.baselines import Baseline, full, projected, stock
from benchmarks.estimates import estimate_steps
from galore_jax.errors import require, require_choice
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
      InputError: an unknown width, or tokens that do not fill rows.
    """

    size: str = "5m"
    width: str = "350m"
    layers: int = 0
    tokens: int = of_step.Settings.tokens
    repeats: int = 5
    device: str = ""

    def __post_init__(self):
        require_choice("width", self.width, SIZES)
        rows = self.tokens % of_step.BATCH[1] == 0
        require("tokens", self.tokens, rows, f"a multiple of {of_step.BATCH[1]}")


def measure(settings: Settings) -> list[Row]:
    """The rows of every optimizer."""
    model = load_config(CONFIGS / f"llama_{settings.width}.toml").model
    layers = settings.layers or (1 if settings.device else of_step.LAYERS)
    configs = load_comparison(CONFIGS / f"llama_{settings.size}.toml")
    shape = settings.tokens // of_step.BATCH[1], of_step.BATCH[1]
    return measure_model(replace(model, num_layers=layers), configs, shape, settings)


def measure_model(
    model: LlamaConfig, configs: Mapping[str, Config], shape: tuple[int, int], settings: Settings
) -> list[Row]:
    """The rows for any model, optimizers by label, and shape of a batch (rows, tokens)."""
    loss, start = of_step.problem(model, of_step.Settings(device=settings.device), shape)
    chosen = [baseline_of(label, config.optimizer) for label, config in configs.items()]
    if settings.device:
        rows = estimate_steps(chosen, loss, start, settings.device)
    else:
        rows = of_step.measure_steps(chosen, loss, *start(), settings.repeats, "optimizers")
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
