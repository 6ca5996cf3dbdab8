"""Loops over chunks of large arrays, and over those matrices of a stack that need work."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.types import PyTree

# About this many elements of a lifted update, or of weights whose codes are updated, exist at the
# same time. A GPU reads the whole right factor for each chunk of rows; CPUs are faster with chunks
# that their caches hold.
MAX_CHUNK, MAX_CHUNK_ON_GPU = 2**22, 2**24
# TPUs keep matrices of 8-bit numbers in tiles of this many rows, those of wider numbers of fewer.
TILE_ROWS = 32


def map_chunks(f: Callable[[Any, PyTree], PyTree], arrays: PyTree, max_size: int) -> PyTree:
    """Computes `f(0, arrays)` chunk by chunk, in place, for a function that acts row by row.

    Args:
      f: takes the index of the first row and a chunk of rows of each array, and returns the new
        rows, with the same shapes.
      arrays: a tree of arrays with the same first axis.
      max_size: approximate maximum number of elements of the first array in a chunk, which has at
        least one row. Chunks may be up to eight times smaller if that makes them equal in size.

    Returns:
      The new arrays.
    """
    # Choose the number of chunks, preferably such that all have the same number of whole tiles.
    first = jax.tree.leaves(arrays)[0]
    rows, least = first.shape[0], -(-first.size // max_size)
    if least <= 1:
        return f(0, arrays)
    equal = [n for n in range(least, 8 * least) if rows % n == 0]
    of_tiles = [n for n in equal if rows // n % TILE_ROWS == 0]
    chunks = next(iter(of_tiles + equal), min(least, rows))
    by_rows = partial(_map_rows, f, size=-(-rows // chunks))
    if not equal:
        return by_rows(arrays)
    by_index = partial(_map_leading_axis, f, chunks=chunks)
    return lax.platform_dependent(arrays, tpu=by_index, default=by_rows)


def _map_rows(f: Callable[[Any, PyTree], PyTree], arrays: PyTree, size: int) -> PyTree:
    """`map_chunks` by slices of rows, which CPUs and GPUs read and write in one pass."""
    rows = jax.tree.leaves(arrays)[0].shape[0]

    def update_chunk(i: jax.Array, arrays: PyTree) -> PyTree:
        # A last chunk that is too short starts inside the one before it, and the rows that are
        # already done are kept: for a separate remainder XLA would copy the arrays.
        start = jnp.minimum(i * size, rows - size)
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), arrays)
        new = f(start, old)
        if rows % size:
            todo = start + jnp.arange(size) >= i * size
            pick = lambda new, old: jnp.where(jnp.expand_dims(todo, range(1, old.ndim)), new, old)
            new = jax.tree.map(pick, new, old)
        write = lambda x, chunk: lax.dynamic_update_slice_in_dim(x, chunk, start, axis=0)
        return jax.tree.map(write, arrays, new)

    return lax.fori_loop(0, -(-rows // size), update_chunk, arrays)


def _map_leading_axis(f: Callable[[Any, PyTree], PyTree], arrays: PyTree, chunks: int) -> PyTree:
    """`map_chunks` along an axis of the chunks.

    A TPU divides rows into tiles, and would lay out all 8-bit codes anew for each slice of rows.
    """
    size = jax.tree.leaves(arrays)[0].shape[0] // chunks

    def update_chunk(i: jax.Array, cut: PyTree) -> PyTree:
        old = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), cut)
        write = lambda x, chunk: lax.dynamic_update_index_in_dim(x, chunk, i, axis=0)
        return jax.tree.map(write, cut, f(i * size, old))

    cut = jax.tree.map(lambda x: x.reshape(chunks, size, *x.shape[1:]), arrays)
    done = lax.fori_loop(0, chunks, update_chunk, cut)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), done, arrays)


def for_each(flags: jax.Array, body: Callable[..., Any], carry: Any, operands: Any) -> Any:
    """Runs `carry = body(i, carry, operands)` for each i whose flag `(n,)` is set.

    The loop runs over the flagged matrices only, so it costs nothing if there are none; a vmap of a
    cond would pay for every matrix at every step. Arrays that `body` reads must be passed as
    `operands`, not through its closure.

    Args:
      flags: bool `(n,)`.
      body: takes an index, the carry and the operands, and returns the new carry.
      carry: a tree of arrays.
      operands: a tree of arrays.

    Returns:
      The final carry.
    """
    order = jnp.argsort(~flags)

    def run_body(n: jax.Array, carry: Any) -> Any:
        # For a single matrix i is always 0. Without the barrier XLA would hoist everything that
        # depends only on i and the operands out of the loop, and pay for it at every step.
        return body(*lax.optimization_barrier((order[n], carry, operands)))

    return lax.fori_loop(0, flags.sum(), run_body, carry)


def flatten_batch(tree: PyTree, ndim: int) -> PyTree:
    """Merges the first `ndim` axes of each array into one; for 0 adds an axis of size 1."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[ndim:]), tree)
