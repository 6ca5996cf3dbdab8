"""Lifts a low-rank update and adds it to the weights (see also `Projection.lift`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from galore_jax.ops.loops import MAX_CHUNK, MAX_CHUNK_ON_GPU, map_chunks
from galore_jax.ops.noise import noise
from galore_jax.ops.precision import as_multiplied_on_tpu, promoted, round_with_noise, widened

# Matrices with a multiple of this many columns are kept by rows on TPUs.
LANES = 128


def lift_and_add(
    weights: jax.Array,
    left: jax.Array,
    right: jax.Array,
    scale: Any,
    decay: Any,
    seed: jax.Array | None = None,
    *,
    right_is_transposed: bool = False,
    start: tuple[Any, Any] = (0, 0),
) -> jax.Array:
    """`(1 - decay) weights + scale left right`, rounded to the dtype of the weights.

    It is computed in float32, or in the dtype of the weights if that is wider; matrix products use
    the backend's default precision.

    Args:
      weights: (m, n), of any floating dtype.
      left: (m, r), of any floating dtype.
      right: (r, n), or (n, r) if transposed, of any floating dtype.
      scale: float32 scalar.
      decay: float32 scalar.
      seed: two uint32; if given, bfloat16 weights are rounded stochastically, with random bits that
        depend only on the seed, the row and the column.
      right_is_transposed: use `rightᵀ` in place of `right`.
      start: row and column of the first element, if the weights are a part of a larger matrix;
        random bits depend on them.

    Returns:
      The new weights.
    """

    def add_to_rows(first: Any, weights: jax.Array) -> jax.Array:
        rows = lambda array: lax.dynamic_slice_in_dim(array, first, weights.shape[0])
        update = product(rows(left), right, right_is_transposed)
        place = start[0] + first, start[1]
        return add(weights, update, scale, decay, seed, place)

    def add_on_tpu(weights: jax.Array) -> jax.Array:
        # XLA adds in the epilogue of the product. Without the barrier it would compute the factor
        # that the optimizer returns, Adam and all, anew for each tile; without the layout the
        # transposed update, with copies of the weights from and to their own layout.
        factors = lax.optimization_barrier(tuple(map(as_multiplied_on_tpu, (left, right))))
        update = product(factors[0], factors[1], right_is_transposed)
        if weights.shape[1] % LANES == 0:
            update = with_layout_constraint(update, Layout((0, 1)))
        return add(weights, update, scale, decay, seed, start)

    def add_on_gpu(weights: jax.Array) -> jax.Array:
        if weights.dtype.itemsize < 4:
            return by_chunks(weights, max_size=MAX_CHUNK_ON_GPU)
        return add_then_decay(weights, product(left, right, right_is_transposed), scale, decay)

    by_chunks = partial(map_chunks, add_to_rows)
    return lax.platform_dependent(
        weights,
        tpu=add_on_tpu,
        cuda=add_on_gpu,
        default=partial(by_chunks, max_size=MAX_CHUNK),
    )


def one_after_another(**options: Any) -> Callable[..., jax.Array]:
    """`lift_and_add`; `jax.vmap` of it lifts one matrix after the other, never all together."""
    return jax.custom_batching.sequential_vmap(partial(lift_and_add, **options))


def product(left: jax.Array, right: jax.Array, right_is_transposed: bool) -> jax.Array:
    """Multiplies (m, r) by (r, n), or by the transpose of (n, r), in float32."""
    dtype = promoted(left.dtype, right.dtype)
    axes = (((1,), (1 if right_is_transposed else 0,)), ((), ()))
    left, right = left.astype(dtype), right.astype(dtype)
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def add(
    weights: jax.Array,
    lifted: jax.Array,
    scale: Any,
    decay: Any,
    seed: jax.Array | None,
    start: tuple[Any, Any],
) -> jax.Array:
    """Applies a lifted update to a tile of the weights.

    Args:
      weights: any tile of the weights.
      lifted: the same tile of the update, float32.
      scale, decay, seed: as for `lift_and_add`.
      start: first row and first column of the tile.
    """
    new = widened(weights) * (1 - decay) + scale * lifted
    if seed is None or weights.dtype != jnp.bfloat16:
        return new.astype(weights.dtype)
    return round_with_noise(new, noise(seed, *start, new.shape))


def add_then_decay(weights: jax.Array, lifted: jax.Array, scale: Any, decay: Any) -> jax.Array:
    """`add` for float32 or wider weights in the one form that a GPU computes with the product.

    To the kernel of a product XLA adds an argument of the program, as it is: not weights that have
    been decayed or converted, nor a slice of them. The result differs by rounding.
    """
    # Weights that decay to nothing leave a remainder that no float32 shows.
    kept = jnp.where(decay == 1, 2.0**-64, 1 - decay)
    return ((scale / kept * lifted + weights) * kept).astype(weights.dtype)
