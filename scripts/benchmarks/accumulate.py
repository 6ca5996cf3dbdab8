"""`accumulate`: bytes of the gradients that micro-batches accumulate, float32, from shapes."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

import galore_jax
from benchmarks.baselines import LEARNING_RATE
from benchmarks.models import init_llama
from benchmarks.report import Row
from benchmarks.state import of_every_size
from galore_jax.models.llama import LlamaConfig
from galore_jax.optim.state import galore_states, start_coordinates
from galore_jax.training.state import tree_bytes, tree_size
from galore_jax.types import PyTree


@dataclass(frozen=True)
class Settings:
    """There are none."""


def measure(settings: Settings) -> list[Row]:
    """The rows of every size."""
    return of_every_size(measure_size)


def measure_size(size: str, model: LlamaConfig, rank: int) -> list[Row]:
    """The rows of full and of projected gradients: `bytes` of the blocks, and `all_bytes`."""
    params = jax.eval_shape(lambda: init_llama(replace(model, dtype="float32")))
    tx = galore_jax.adamw(LEARNING_RATE, rank)

    def projected() -> PyTree:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
        return start_coordinates(zeros, galore_states(tx.init(zeros), inside_chains=True))

    full, accumulators = params, jax.eval_shape(projected)
    rows = []
    for name, tree in (("adamw", full), ("galore_projected", accumulators)):
        blocks = tree_bytes(tree["layers"])
        rows.append(
            {
                "name": name,
                "size": size,
                "parameters": tree_size(params),
                "rank": rank,
                "bytes": blocks,
                "of_full": blocks / tree_bytes(full["layers"]),
                "all_bytes": tree_bytes(tree),
            }
        )
    return rows
