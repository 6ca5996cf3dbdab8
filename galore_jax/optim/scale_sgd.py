"""SCALE: SGD with columns of equal size, and momentum for the last layer alone (2506.16659)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.types import PyTree


def scale_by_column_norms(momentum: float = 0.0, eps: float = 1e-8) -> optax.GradientTransformation:
    """Scales each column to a root mean square of 1 (arXiv 2506.16659, algorithm 1).

    A column of a kernel (in, out) has the weights of one output, a column of an embedding (vocab,
    hidden) one component of all tokens. The paper divides by the norm of the column; like the code
    of its authors, this divides by its root mean square, so that a learning rate serves matrices of
    all sizes. With momentum, as the paper has it for the language model's head alone, it is
    `M ← momentum · M + (1 − momentum) G` that is scaled; without, there is no state.

    Args:
      momentum: decay of the moment.
      eps: the least root mean square by which a column is divided.

    Returns:
      An optax transformation of leaves whose last two axes are matrices.
    """

    def normalised(updates: PyTree, _: PyTree) -> PyTree:
        def at_leaf(update: jax.Array) -> jax.Array:
            wide = widened(update)
            size = jnp.sqrt(jnp.mean(wide**2, -2, keepdims=True))
            return (wide / jnp.maximum(size, eps)).astype(update.dtype)

        return jax.tree.map(at_leaf, updates)

    moment: Any = optax.ema(momentum, debias=False) if momentum else optax.identity()
    return optax.chain(moment, optax.stateless(normalised))
