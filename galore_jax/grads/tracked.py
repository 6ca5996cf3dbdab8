"""Projected parameters on their way through a loss, from their leaf to their matrix products.

The axes of a tracked array have letters, as in `jnp.einsum`: A, B, … are batch axes, a, b, … make
up the in side in this order, m, n, … the out side. Sorted by letter, the axes are a batch of
matrices. An operation that moves or selects whole matrices of the array does the same to the stacks
of basis vectors and coordinates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Side

# The first letter of each kind of axis, and the mark of the axes of tokens in a product.
BATCH, IN, OUT, TOKEN = "A", "a", "m", "_"


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Tracked:
    """A projected parameter inside a loss.

    Attributes:
      array: the parameter at this point of the loss: cast, transposed, sliced along batch axes.
      vectors: basis vectors by side, `(*batch, in or out, r)`, with the batch axes of `array`.
      coordinates: zeros `(*batch, rows, columns)`, likewise. Only projected products depend on
        them; their derivative is the projected gradient.
      axes: static; the letters of the axes of `array`, batch axes in alphabetical order.
      leaf: static; the index of the parameter's leaf.
    """

    array: Any
    vectors: dict[Side, Any]
    coordinates: Any
    axes: str = field(metadata={"static": True})
    leaf: int = field(metadata={"static": True})


def track(leaf: int, array: Any, basis: Basis, coordinates: Any) -> Tracked:
    """A parameter as it enters the loss."""
    view = basis.projection.view
    sides = ((BATCH, view.batch_axes), (IN, view.in_axes), (OUT, view.out_axes))
    letters = {axis: chr(ord(kind) + i) for kind, axes in sides for i, axis in enumerate(axes)}
    axes = "".join(letters[axis] for axis in range(len(letters)))
    return Tracked(array, basis.vectors, coordinates, axes, leaf)


def kind(axis: str) -> str:
    """The kind of an axis, `BATCH`, `IN` or `OUT`, from its letter."""
    return BATCH if axis < TOKEN else IN if axis < OUT else OUT


def moved(
    value: Tracked, array: Any, axes: Sequence[str], change: Callable[[jax.Array], jax.Array]
) -> Tracked:
    """A tracked value after an operation.

    Args:
      value: before it.
      array: the result of the operation on `value.array`.
      axes: a text for each axis of the result that begins with a letter of its kind. The texts of a
        side are in the order that the axes have in the matrix.
      change: what the operation does to stacks `(*batch, n, r)`.

    Returns:
      The tracked result, whose letters are consecutive again.
    """
    order = {i: (kind(axis), i if kind(axis) == BATCH else axis) for i, axis in enumerate(axes)}
    precedes = lambda i, j: order[j][0] == order[i][0] and order[j] < order[i]
    letters = [chr(ord(order[i][0]) + sum(precedes(i, j) for j in order)) for i in order]
    vectors, coordinates = jax.tree.map(change, (value.vectors, value.coordinates))
    return Tracked(array, vectors, coordinates, "".join(letters), value.leaf)


def take_matrices(indices: jax.Array | np.ndarray, stack: jax.Array) -> jax.Array:
    """The matrices of a stack `(*batch, n, r)` at flat indices; zeros where one is out of range."""
    flat = stack.reshape(-1, *stack.shape[-2:])
    if not isinstance(indices, np.ndarray):
        return jnp.take(flat, indices, axis=0, mode="fill", fill_value=0)
    # Consecutive matrices are sliced, which is cheaper than gathering them.
    start = int(indices.flat[0]) if indices.size else 0
    is_run = np.array_equal(indices.ravel(), np.arange(start, start + indices.size))
    taken = flat[start : start + indices.size] if is_run else flat[indices.ravel()]
    return taken.reshape(*indices.shape, *stack.shape[-2:])


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of axes that a reshape turns into each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[start[0] : i])) != (b := math.prod(new[start[1] : j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        yield range(start[0], i), range(start[1], j)
