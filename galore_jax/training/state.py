"""What a training step takes: the state that it changes, and a batch; and the sizes of both."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import galore_jax
from galore_jax.grads import layerwise
from galore_jax.models.llama import Llama
from galore_jax.training.config import Config
from galore_jax.training.optimizer import make_optimizer
from galore_jax.types import PyTree

Batch = dict[str, Any]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      params: the model's parameters, in config.model.dtype.
      opt_state: the optimizer's state.
      step: int32 scalar, updates made so far.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array


def init_state(config: Config) -> TrainState:
    """The state before the first step; a pure function of the configuration."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Llama(config.model).init(jax.random.key(config.training.seed), tokens)["params"]
    is_layerwise = config.training.layerwise
    tx = make_optimizer(config.optimizer, config.training.steps, clips=not is_layerwise)
    # As galore's, the moments of plain AdamW are float32 whatever the parameters are.
    started = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    opt_state = (layerwise if is_layerwise else galore_jax).init(tx, started)
    return TrainState(params, opt_state, jnp.zeros([], jnp.int32))


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the arrays of a batch, in this process."""
    rows = config.data.batch_size // jax.process_count()
    leaf = jax.ShapeDtypeStruct((rows, config.data.sequence_length), jnp.int32)
    return dict.fromkeys(("tokens", "segments", "positions"), leaf)


def tree_size(tree: PyTree) -> int:
    """Elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """Bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
