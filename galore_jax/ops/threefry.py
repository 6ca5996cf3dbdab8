"""Random bits that depend only on a seed and a position, however the work is split into tiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(seed: Any, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers").

    Args:
      seed: the key, two uint32.
      first: first words of the counters, uint32, any shape.
      second: second words of the counters, uint32, the same shape.

    Returns:
      Two random words per counter, uint32.
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA))
    first, second = first + keys[0], second + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            first = first + second
            second = (second << jnp.uint32(rotation)) | (second >> jnp.uint32(32 - rotation))
            second = second ^ first
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return first, second


def noise(seed: Any, row: Any, column: Any, shape: tuple[int, int]) -> jax.Array:
    """Sixteen random bits for each element of a tile of a matrix.

    Four columns share the two words of the counter (row, column // 4): first the low halves of both
    words, then the high halves.

    Args:
      seed: two uint32.
      row: int32, first row of the tile.
      column: int32, first column of the tile; a multiple of 4 if the width is.
      shape: shape of the tile.

    Returns:
      uint32 below 2^16, of this shape.
    """
    height, width = shape
    if width % 4 and not (isinstance(column, int) and column % 4 == 0):
        wider = noise(seed, row, column - column % 4, (height, (width + 6) // 4 * 4))
        return lax.dynamic_slice_in_dim(wider, column % 4, width, axis=1)
    counters_shape = (height, -(-width // 4))
    rows, groups = (
        jnp.asarray(start).astype(jnp.uint32)
        + lax.broadcasted_iota(jnp.uint32, counters_shape, axis)
        for axis, start in enumerate((row, column // 4))
    )
    # Stacking is along the last axis because Triton supports no other.
    halves = [
        jnp.stack((word & jnp.uint32(0xFFFF), word >> jnp.uint32(16)), axis=-1)
        for word in threefry(seed, rows, groups)
    ]
    return jnp.stack(halves, axis=-1).reshape(height, -1)[:, :width]
