"""Random bits that depend only on a seed and a position, however the work is split into tiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# 2³² divided by the golden ratio, whose multiples lie evenly around the circle of 32-bit numbers.
# Of the first 262,144 no two are closer than 11,703, so rows of so many columns do not overlap.
ROW = 0x9E3779B9


def noise(
    seed: Any, row: Any, column: Any, shape: tuple[int, ...], *, transposed: bool = False
) -> jax.Array:
    """Sixteen random bits for each element of a tile of a matrix.

    The number of an element, its own unless the matrix is very large, is hashed with each half of
    the seed. That takes some 20 operations, the Threefry of `jax.random` more than 100.

    Args:
      seed: two uint32.
      row: int32, first row of the tile.
      column: int32, first column of the tile.
      shape: shape of the tile.
      transposed: the tile's columns run along its first axis.

    Returns:
      uint32 below 2^16, of this shape.
    """
    axes = (1, 0) if transposed else (0, 1)
    rows, columns = (
        jnp.asarray(first).astype(jnp.uint32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
        for first, axis in zip((row, column), axes, strict=True)
    )
    number = rows * jnp.uint32(ROW) + columns
    return _hash(_hash(number ^ seed[0]) ^ seed[1]) >> 16


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of the 32-bit numbers of which one bit changes half of the bits.

    Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
