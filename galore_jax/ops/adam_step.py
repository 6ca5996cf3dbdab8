"""Adam (arXiv 1412.6980, algorithm 1) with moments in 8-bit codes (arXiv 2110.02861)."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.loops import map_chunks
from galore_jax.ops.quantization import (
    BLOCK,
    Quantized,
    dequantize_blocks,
    from_blocks,
    quantize_blocks,
    to_blocks,
)

MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)
# About this many elements have their moments in float32 at the same time. A TPU lays out each
# chunk anew, and takes as many elements as its vector memory holds without chunks.
MAX_CHUNK, MAX_CHUNK_ON_TPU, MAX_WHOLE_ON_TPU = 2**20, 2**22, 2**24


def adam_8bit(
    gradient: jax.Array, mu: Quantized, nu: Quantized, count: Any, *, b1: Any, b2: Any, eps: Any
) -> tuple[jax.Array, Quantized, Quantized]:
    """One step of `optax.scale_by_adam`; the update is computed before the moments are quantised.

    Args:
      gradient: floating point, at least one axis.
      mu: first moment in the code "signed", same shape as the gradient.
      nu: second moment in the code "unsigned", same shape as the gradient.
      count: int32 scalar, the number of this step, counted from 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      The update in float32, same shape as the gradient, and the new moments.
    """
    scalars = adam_scalars(count, b1, b2, eps)
    inputs = gradient.astype(jnp.float32), mu, nu
    axis = mu.axis

    def step_chunk(_: Any, chunk: Any) -> Any:
        gradient, mu, nu = chunk
        shape = gradient.shape
        m, v = dequantize_blocks(mu), dequantize_blocks(nu)
        update, m, v = adam_formula(to_blocks(gradient, axis), m, v, scalars)
        new_mu, new_nu = (
            quantize_blocks(new, shape, old.code, axis) for new, old in ((m, mu), (v, nu))
        )
        return from_blocks(update, shape, axis), new_mu, new_nu

    # The update is written over the gradient.
    by_chunks = partial(map_chunks, step_chunk)
    size_on_tpu = MAX_WHOLE_ON_TPU if gradient.size <= MAX_WHOLE_ON_TPU else MAX_CHUNK_ON_TPU
    outputs = lax.platform_dependent(
        (as_rows if axis == -1 else _as_rows_of_blocks)(inputs),
        tpu=partial(by_chunks, max_size=size_on_tpu),
        default=partial(by_chunks, max_size=MAX_CHUNK),
    )
    return jax.tree.map(lambda new, old: new.reshape(old.shape), outputs, inputs)


def as_rows(arrays: Any) -> Any:
    """Reshapes arrays of one shape, with codes and scales, to matrices with blocks along the rows.

    A vector whose length is a multiple of the block size becomes a matrix with one block per row.
    """
    shape = jax.tree.leaves(arrays)[0].shape
    rows = math.prod(shape[:-1])
    if rows == 1 and shape[-1] % BLOCK == 0:
        rows = shape[-1] // BLOCK
    return jax.tree.map(lambda x: x.reshape(rows, -1), arrays)


def _as_rows_of_blocks(arrays: Any) -> Any:
    """Reshapes matrices of one shape, with codes and scales in columns, to a batch of matrices.

    If blocks fill the columns, each of the matrices has as many rows as a block.
    """
    *_, rows, columns = jax.tree.leaves(arrays)[0].shape
    number = rows // BLOCK if rows % BLOCK == 0 else 1
    split = lambda x: x.reshape(-1, x.shape[-2] // number, columns)
    return jax.tree.map(split, arrays)


def adam_scalars(count: Any, b1: Any, b2: Any, eps: Any) -> tuple[jax.Array, ...]:
    """The scalars of step number `count`, counted from 1, float32.

    Returns:
      `b1`, `1 - b1`, `b2`, `1 - b2`, the bias corrections `1 - b1ᵗ` and `1 - b2ᵗ`, `eps`.
    """
    count = jnp.asarray(count, jnp.float32)
    scalars = (b1, 1 - b1, b2, 1 - b2, 1 - b1**count, 1 - b2**count, eps)
    return tuple(jnp.asarray(scalar, jnp.float32) for scalar in scalars)


def adam_formula(
    gradient: jax.Array, m: jax.Array, v: jax.Array, scalars: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's update and new moments, given the old ones in float32."""
    b1, one_minus_b1, b2, one_minus_b2, correction1, correction2, eps = scalars
    gradient = gradient.astype(jnp.float32)
    m = b1 * m + one_minus_b1 * gradient
    v = b2 * v + one_minus_b2 * jnp.square(gradient)
    # The square of a finite 1e30 overflows; as the scale of its block it would stay NaN forever.
    largest = jnp.where(jnp.abs(gradient) <= MAX_FLOAT32, MAX_FLOAT32, jnp.inf)
    v = jnp.where(v > largest, largest, v)
    return (m / correction1) / (jnp.sqrt(v / correction2) + eps), m, v
