"""Matrix views: which parameters GaLore projects, and how it reads them as matrices."""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

# A leaf with one of these last names, or with one of these words anywhere in its path, stays whole.
UNPROJECTED_LEAVES = frozenset({"bias", "scale"})
UNPROJECTED_WORDS = frozenset({"embed", "embedding", "head", "norm"})  # lm_head: lm and head

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NNX_ARRAYS = tuple(map(jax.tree_util.GetAttrKey, ("value", "raw_value")))
_MULTI_HEAD = re.compile(r"multi_?head", re.IGNORECASE)  # an attention, not a head


@dataclass(frozen=True)
class MatrixView:
    """An array read as a batch of (in, out) matrices, shape `(*batch, in, out)`.

    Attributes:
      shape: of the array.
      in_axes: its axes that together are the rows.
      out_axes: its axes that together are the columns; every other axis is a batch axis.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes that are neither rows nor columns (scanned layers, experts), in order."""
        taken = (*self.in_axes, *self.out_axes)
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes; empty for a single matrix."""
        return self._sizes(self.batch_axes)

    @property
    def rows(self) -> int:
        """Size of the in side."""
        return math.prod(self._sizes(self.in_axes))

    @property
    def columns(self) -> int:
        """Size of the out side."""
        return math.prod(self._sizes(self.out_axes))

    def to_matrices(self, array: jax.Array) -> jax.Array:
        """Reads an array of `shape` as `(*batch, in, out)`."""
        return array.transpose(self._order).reshape(*self.batch, self.rows, self.columns)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `to_matrices`."""
        moved = matrices.reshape(self._sizes(self._order))
        return moved.transpose(tuple(self._order.index(axis) for axis in range(len(self.shape))))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.in_axes, *self.out_axes)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def matrix_views(params: PyTree, rank: int) -> PyTree:
    """The default rule: which leaves are projected, and as which matrices.

    A leaf is read as matrices over its last two axes; Flax's attention kernels that are stored with
    heads (`query`, `key`, `value`, `out` side by side) over the model's axis and the two of the
    heads. It is projected when its smaller side is larger than `rank`, unless its last name is bias
    or scale or a word of its path is embed, embedding, head or norm.

    Args:
      params: any pytree of arrays or of their shapes.
      rank: of the projection.

    Returns:
      A tree like `params` with a `MatrixView` or None at each leaf.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    shapes = {_names(path): jnp.shape(leaf) for path, leaf in paths}

    def view(path: tuple[Hashable, ...], leaf: Any) -> MatrixView | None:
        names, shape = _names(path), jnp.shape(leaf)
        if len(shape) < 2 or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return None
        if names and names[-1] in UNPROJECTED_LEAVES:
            return None
        words = _WORD.findall(_MULTI_HEAD.sub("", " ".join(names)))
        if any(word.lower() in UNPROJECTED_WORDS for word in words):
            return None
        axes = _head_axes(names, shapes) or ((len(shape) - 2,), (len(shape) - 1,))
        found = MatrixView(shape, *axes)
        return found if min(found.rows, found.columns) > rank else None

    return jax.tree_util.tree_unflatten(tree, [view(path, leaf) for path, leaf in paths])


def path_name(path: tuple[Hashable, ...]) -> str:
    """A leaf's path for people: `layers/mlp/up_proj/kernel`."""
    return "/".join(_names(path))


def _names(path: tuple[Hashable, ...]) -> tuple[str, ...]:
    # Flax NNX ends the path of a variable with the attribute that holds its array.
    if len(path) > 1 and path[-1] in _NNX_ARRAYS:
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _head_axes(
    names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """In and out axes of an attention kernel stored as (model, heads, head size) or its reverse."""
    if len(names) < 2 or names[-2] not in ("query", "key", "value", "out"):
        return None
    own = shapes[names]
    query = shapes.get((*names[:-2], "query", names[-1]), ())
    out = shapes.get((*names[:-2], "out", names[-1]), ())
    if len(own) < 3 or len(query) != len(out) or query[-2:] != out[-3:-1]:
        return None
    axis = len(own) - 3
    if names[-2] == "out":
        return (axis, axis + 1), (axis + 2,)
    return (axis,), (axis + 1, axis + 2)
