"""Loops over parts of large arrays, and over the matrices of a stack that need work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.types import PyTree


def by_parts(f: Callable[[Any, PyTree], PyTree], arrays: PyTree, most: int) -> PyTree:
    """`f(0, arrays)` for a function of each row by itself, in place of the arrays.

    Args:
      f: of the number of the first row, and some rows of each array; returns these rows anew.
      arrays: a tree of arrays that have their first axis in common.
      most: numbers of the first array in a part, up to eight times fewer for equal parts.

    Returns:
      The new arrays.
    """
    first = jax.tree.leaves(arrays)[0]
    rows, fewest = first.shape[0], -(-first.size // most)
    if fewest <= 1:
        return f(0, arrays)
    near = (n for n in range(fewest, 8 * fewest) if rows % n == 0)
    size = -(-rows // next(near, min(fewest, rows)))

    def part(i: jax.Array, arrays: PyTree) -> PyTree:
        # The last of unequal parts begins within the one before: of a remainder XLA copies all.
        start = jnp.minimum(i * size, rows - size)
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), arrays)
        new = f(start, old)
        if rows % size:
            todo = start + jnp.arange(size) >= i * size
            pick = lambda new, old: jnp.where(jnp.expand_dims(todo, range(1, old.ndim)), new, old)
            new = jax.tree.map(pick, new, old)
        put = lambda all, own: lax.dynamic_update_slice_in_dim(all, own, start, axis=0)
        return jax.tree.map(put, arrays, new)

    return lax.fori_loop(0, -(-rows // size), part, arrays)


def for_each(flags: jax.Array, body: Callable[..., Any], carry: Any, operands: Any) -> Any:
    """`carry = body(i, carry, operands)` for each i whose flag `(n,)` is set.

    A loop over what is due, not a vmap of a cond, which would pay for every matrix every step; it
    costs nothing where none is. What `body` reads must come by `operands`, not by its closure.
    """
    order = jnp.argsort(~flags)

    def one(n: jax.Array, carry: Any) -> Any:
        # Of a single matrix i is always 0: without the barrier XLA takes what follows from it and
        # the operands alone out of the loop, and pays for it at every step.
        return body(*lax.optimization_barrier((order[n], carry, operands)))

    return lax.fori_loop(0, flags.sum(), one, carry)
