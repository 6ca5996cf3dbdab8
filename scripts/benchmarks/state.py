"""`state`: bytes of the optimizer's state by part, float32, from shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from analysis.memory import bytes_by_part

from benchmarks.baselines import baselines
from benchmarks.models import init_llama, separate_layers
from benchmarks.report import Row
from galore_jax.errors import require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config_file import load_config
from galore_jax.training.state import tree_bytes, tree_size

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Settings:
    """There are none."""


def require_size(key: str, size: str) -> None:
    """Raises an `InputError` unless there is a configuration of this size."""
    sizes = sorted(path.stem.removeprefix("llama_") for path in CONFIGS.glob("llama_*.toml"))
    require_choice(key, size, sizes)


def measure(settings: Settings) -> list[Row]:
    """The rows of every size and baseline."""
    return of_every_size(measure_size)


def of_every_size(measure_size: Callable[[str, LlamaConfig, int], list[Row]]) -> list[Row]:
    """The rows of each size in configs/, by its name, model and rank, the smallest first."""
    rows = []
    for path in CONFIGS.glob("llama_*.toml"):
        config = load_config(path)
        size = path.stem.removeprefix("llama_")
        rows += measure_size(size, config.model, int(config.optimizer.rank))
    return sorted(rows, key=lambda row: row["parameters"])


def measure_size(size: str, model: LlamaConfig, rank: int) -> list[Row]:
    """Rows of every baseline, with `bytes` and those of bases, moments and the rest."""
    stacked = jax.eval_shape(lambda: init_llama(replace(model, dtype="float32")))
    rows = []
    for baseline in baselines(rank):
        if baseline.refresh is not None:
            continue  # Its state is that of `galore_full`.
        params = stacked if baseline.stacks else jax.eval_shape(separate_layers, stacked)
        state = jax.eval_shape(baseline.init, params)
        rows.append(
            {
                "name": baseline.name,
                "size": size,
                "parameters": tree_size(stacked),
                "rank": rank,
                "leaves": "stacked" if baseline.stacks else "separate",
                **bytes_by_part(state),
                "bytes": tree_bytes(state),
            }
        )
    adamw = rows[0]["bytes"]
    return [{**row, "of_adamw": row["bytes"] / adamw} for row in rows]
