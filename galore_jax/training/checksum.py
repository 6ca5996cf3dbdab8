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


def tree_checksum(tree: Any) -> int:
    """A 32-bit checksum of all bits of all leaves, computed on their device.

    Args:
      tree: arrays with elements of 1, 2 or 4 bytes.
    """
    return zlib.crc32(np.asarray(_leaf_checksums(jax.tree.leaves(tree))).tobytes())


def host_checksum(leaves: Iterable[np.ndarray]) -> int:
    """`tree_checksum` of arrays in the memory of the host, of which one is held at a time."""
    return zlib.crc32(np.array([_host_sum(leaf) for leaf in leaves], np.uint32).tobytes())


def json_checksum(value: Any) -> int:
    """A 32-bit checksum of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SUMMED_AT_ONCE = 2**20  # elements


@jax.jit
def _leaf_checksums(leaves: list[jax.Array]) -> jax.Array:
    """uint32 (len(leaves),): sums, modulo 2³², of the elements' bits times odd weights.

    With odd weights the sum detects every change of a single element. With a different weight at
    each position it also detects most exchanges of two unequal elements.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = _UNSIGNED[leaf.dtype.itemsize]
        bits = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        position = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            along = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position = position * np.uint32(size) + along
        return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in leaves])


def _host_sum(leaf: np.ndarray) -> int:
    """The number that `_leaf_checksums` gives for a leaf."""
    bits = np.ascontiguousarray(leaf).reshape(-1).view(_UNSIGNED[leaf.dtype.itemsize])
    total = 0
    for start in range(0, bits.size, _SUMMED_AT_ONCE):
        part = bits[start : start + _SUMMED_AT_ONCE].astype(np.uint32)
        weights = 2 * np.arange(start, start + part.size, dtype=np.uint32) + 1
        total += int(np.sum(part * weights, dtype=np.uint32))
    return total % 2**32
