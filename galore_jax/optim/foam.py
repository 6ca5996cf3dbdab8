"""FOAM: Adam whose moments are those of averages over blocks (arXiv 2512.07112)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.types import PyTree


def scale_by_foam(
    level: int = 3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with moments of block averages, and with the current gradient's rest (2512.07112).

    The gradient G of a kernel (in, out) is averaged over blocks of `2^level` inputs of a neuron,
    and Adam's moments m and v are those of the averages, here with Adam's bias corrections. With
    E m the moment that a block shares, and `R = G − E mean(G)` what the average leaves out of the
    current gradient, the update is `(E m + R) / (√(E v + R²) + eps)`. The moments take
    `8 / 2^level` bytes per parameter.

    Args:
      level: binary logarithm of the size of a block.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Returns:
      An optax transformation of leaves whose last two axes are matrices.
    """
    size = 2**level
    start: Any = optax.scale_by_adam(b1, b2).init

    def fold(leaf: jax.Array) -> jax.Array:
        """Averages over blocks: `(*batch, blocks, out)`. The last block may be shorter."""
        rows = leaf.shape[-2]
        blocks = -(-rows // size)
        padding = [(0, 0)] * (leaf.ndim - 2) + [(0, blocks * size - rows), (0, 0)]
        split = jnp.pad(widened(leaf), padding).reshape(
            *leaf.shape[:-2], blocks, size, leaf.shape[-1]
        )
        counts = jnp.minimum(size, rows - size * jnp.arange(blocks))
        return split.sum(-2) / counts[:, None]

    def init_fn(params: PyTree) -> optax.ScaleByAdamState:
        return start(jax.tree.map(fold, params))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params
        count = optax.safe_increment(state.count)
        averages = jax.tree.map(fold, updates)
        mu = optax.tree.update_moment(averages, state.mu, b1, 1)
        nu = optax.tree.update_moment(averages, state.nu, b2, 2)

        def at_leaf(update: jax.Array, average: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            unfold = lambda blocks: jnp.repeat(blocks, size, -2)[..., : update.shape[-2], :]
            rest = widened(update) - unfold(average)
            new = (unfold(m) + rest) / (jnp.sqrt(unfold(v) + rest**2) + eps)
            return new.astype(update.dtype)

        first, second = (
            optax.tree.bias_correction(moment, decay, count)
            for moment, decay in ((mu, b1), (nu, b2))
        )
        updates = jax.tree.map(at_leaf, updates, averages, first, second)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)
