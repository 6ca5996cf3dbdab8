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

    Four columns share the two words of the counter (row, column // 4): the first two have the low
    halves of the words, the other two the high halves. Each element computes both words, which is
    faster than sharing them and laying the halves side by side, on CPUs as on TPUs.

    Args:
      seed: two uint32.
      row: int32, first row of the tile.
      column: int32, first column of the tile.
      shape: shape of the tile.

    Returns:
      uint32 below 2^16, of this shape.
    """
    rows, columns = (
        jnp.asarray(start).astype(jnp.uint32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
        for axis, start in enumerate((row, column))
    )
    first, second = threefry(seed, rows, columns >> 2)
    word = jnp.where((columns & 1) == 1, second, first)
    return (word >> ((columns & 2) << 3)) & jnp.uint32(0xFFFF)
