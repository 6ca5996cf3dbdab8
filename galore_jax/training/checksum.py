"""Checksums of a saved state, so that a corrupt checkpoint is not resumed.

Orbax verifies its indices, but not the arrays themselves.
"""

import json
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def checksum(leaves: Iterable[Any]) -> int:
    """A 32-bit checksum of all bits of arrays, computed on their device and one after another.

    Args:
      leaves: arrays, of JAX or NumPy, with elements of 1, 2 or 4 bytes.
    """
    return zlib.crc32(np.array([int(_weighted_sum(leaf)) for leaf in leaves], np.uint32).tobytes())


def json_checksum(value: Any) -> int:
    """A 32-bit checksum of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _weighted_sum(leaf: jax.Array) -> jax.Array:
    """The sum, modulo 2³², of the elements' bits times odd weights: uint32 ().

    With odd weights the sum detects every change of a single element. With a different weight at
    each position it also detects most exchanges of two unequal elements.
    """
    if leaf.dtype == bool:
        leaf = leaf.astype(np.uint8)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    bits = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        along = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position = position * np.uint32(size) + along
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
