"""`state`: bytes of the optimizer's state and of accumulated gradients, float32, from shapes."""

from dataclasses import dataclass, replace

import jax
from analysis.memory import bytes_by_part

from benchmarks import CONFIGS, Row
from benchmarks.baselines import baselines, rank_of
from benchmarks.models import init_llama, separate_layers
from galore_jax.models.llama import LlamaConfig
from galore_jax.optim.galore_state import galore_states, start_coordinates
from galore_jax.training.config_file import load_config
from galore_jax.training.state import tree_bytes, tree_size
from galore_jax.types import PyTree


@dataclass(frozen=True)
class Settings:
    """There are none."""


def measure(settings: Settings) -> list[Row]:
    """The rows of each size in configs/ and each baseline, the smallest size first."""
    rows = []
    for path in CONFIGS.glob("llama_*.toml"):
        config = load_config(path)
        size = path.stem.removeprefix("llama_")
        rows += measure_size(size, config.model, rank_of(config))
    return sorted(rows, key=lambda row: row["parameters"])


def measure_size(size: str, model: LlamaConfig, rank: int) -> list[Row]:
    """Rows of every baseline: `bytes` of its state with the parts, and `accumulated` gradients."""
    stacked = jax.eval_shape(lambda: init_llama(replace(model, dtype="float32")))
    full = tree_bytes(stacked["layers"])
    rows = []
    for baseline in baselines(rank):
        params = stacked if baseline.stacks else jax.eval_shape(separate_layers, stacked)
        state = jax.eval_shape(baseline.init, params)
        gradients = params
        if baseline.refresh is not None:
            gradients = jax.eval_shape(_coordinates, params, state)
        accumulated = tree_bytes(gradients["layers"])
        rows.append(
            {
                "name": baseline.name,
                "size": size,
                "parameters": tree_size(stacked),
                "rank": rank,
                "leaves": "stacked" if baseline.stacks else "separate",
                **bytes_by_part(state),
                "bytes": tree_bytes(state),
                "accumulated": accumulated,
                "of_full": accumulated / full,
            }
        )
    adamw = rows[0]["bytes"]
    return [{**row, "of_adamw": row["bytes"] / adamw} for row in rows]


def _coordinates(params: PyTree, state: PyTree) -> PyTree:
    return start_coordinates(params, galore_states(state, inside_chains=True))
