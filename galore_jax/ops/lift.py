"""A low-rank update lifted and added to the weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.loops import by_parts
from galore_jax.ops.rounding import round_with
from galore_jax.ops.threefry import noise

# Numbers of the lifted update that exist at a time.
MAX_CHUNK = 2**22


def lift_and_add(
    weights: jax.Array,
    left: jax.Array,
    right: jax.Array,
    scale: Any,
    decay: Any,
    seed: jax.Array | None = None,
    *,
    right_is_transposed: bool = False,
) -> jax.Array:
    """`(1 - decay) weights + scale left right`, in float32, rounded to the dtype of the weights.

    Matrix products are of the backend's default precision.

    Args:
      weights: (m, n), bfloat16 or float32.
      left: (m, r), bfloat16 or float32.
      right: (r, n), or (n, r) where transposed, bfloat16 or float32.
      scale: float32 scalar.
      decay: float32 scalar.
      seed: two uint32; where given, bfloat16 weights are rounded stochastically, with bits that
        depend on the seed, row and column alone.
      right_is_transposed: take `rightᵀ` for `right`.

    Returns:
      The new weights.
    """

    def part(start: Any, weights: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(left, start, weights.shape[0])
        lifted = product(own, right, right_is_transposed)
        return add(weights, lifted, scale, decay, seed, (start, 0))

    return by_parts(part, weights, MAX_CHUNK)


def product(left: jax.Array, right: jax.Array, right_is_transposed: bool) -> jax.Array:
    """(m, r) by (r, n), or by the transpose of (n, r), in float32."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    axes = (((1,), (1 if right_is_transposed else 0,)), ((), ()))
    left, right = left.astype(dtype), right.astype(dtype)
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def add(
    weights: jax.Array,
    lifted: jax.Array,
    scale: Any,
    decay: Any,
    seed: Any,
    start: tuple[Any, Any],
) -> jax.Array:
    """`lift_and_add` once the product is there.

    Args:
      weights: any tile of them.
      lifted: float32, the same tile.
      scale: as for `lift_and_add`.
      decay: as for `lift_and_add`.
      seed: as for `lift_and_add`.
      start: row and column where the tile begins, the column a multiple of 4.

    Returns:
      The new weights of the tile.
    """
    wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    new = wide * (1 - decay) + scale * lifted
    if seed is None or weights.dtype != jnp.bfloat16:
        return new.astype(weights.dtype)
    return round_with(new, noise(seed, *start, new.shape))
