"""The state of a training, the shapes of a batch, and the sizes of trees."""

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
    """Everything that a training step changes.

    Attributes:
      params: the model's parameters, in config.model.dtype.
      opt_state: the optimizer's state.
      step: int32 scalar, the number of updates so far.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array


def init_state(config: Config) -> TrainState:
    """The state before the first step, determined by the configuration alone."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Llama(config.model).init(jax.random.key(config.training.seed), tokens)["params"]
    is_layerwise = config.training.layerwise
    tx = make_optimizer(config.optimizer, config.training.steps, clips=not is_layerwise)
    # The moments of every optimizer are float32, whatever the dtype of the parameters.
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    opt_state = (layerwise if is_layerwise else galore_jax).init(tx, in_float32)
    return TrainState(params, opt_state, jnp.zeros([], jnp.int32))


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch in this process: `tokens`, `segments`, `positions`, int32 (B, T)."""
    rows = config.data.batch_size // jax.process_count()
    leaf = jax.ShapeDtypeStruct((rows, config.data.sequence_length), jnp.int32)
    return dict.fromkeys(("tokens", "segments", "positions"), leaf)


def tree_size(tree: PyTree) -> int:
    """The number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """The number of bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
