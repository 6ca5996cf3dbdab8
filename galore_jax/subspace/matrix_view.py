"""Matrix views: which parameters GaLore projects, and how it reads them as matrices."""

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from galore_jax.types import PyTree

# A leaf with one of these last names, or with one of these words anywhere in its path, stays whole.
# Biases and scales of norms are so called by Flax and Equinox, Haiku, and Keras.
UNPROJECTED_LEAVES = frozenset({"bias", "scale", "offset", "beta", "gamma"})
UNPROJECTED_WORDS = frozenset({"embed", "embedding", "head", "norm"})  # lm_head: lm and head

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DEFAULT = object()  # in place of dimension numbers
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


def matrix_views(params: PyTree, weight_dimension_numbers: PyTree = None) -> PyTree:
    """How each leaf reads as matrices, where it does.

    By default over its last two axes; Flax's attention kernels that are stored with heads (`query`,
    `key`, `value`, `out` side by side) over the model's axis and the two of the heads. A leaf that
    has fewer than two axes or does not hold floating numbers is no matrix, nor one without numbers;
    and by default not the `b` of a layer, Haiku's name for a bias: stacked it has two axes.

    Args:
      params: any pytree of arrays or of their shapes.
      weight_dimension_numbers: None for the default; or `optax.contrib.GaLoreDimensionNumbers`
        (`reduction_axis` in, `output_axis` out, each an axis or several; the others are batch
        axes), for all leaves or as a tree or a prefix of one, with None where a leaf is not to be
        projected; or a function from `params` to any of these.

    Returns:
      A tree like `params` with a `MatrixView` or None at each leaf.

    Raises:
      ValueError: dimension numbers of another tree, or which do not fit the leaf that is named.
    """
    leaves = named_leaves(params)
    shapes = {names: jnp.shape(leaf) for names, leaf in leaves}
    numbers = _broadcast_numbers(weight_dimension_numbers, params)

    def view(names: tuple[str, ...], leaf: Any, numbers: Any) -> MatrixView | None:
        shape = jnp.shape(leaf)
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if len(shape) < 2 or 0 in shape or not floating or numbers is None:
            return None
        if numbers is not _DEFAULT:
            return _view_by_numbers(numbers, shape, "/".join(names))
        if _is_bias_of_layer(names, shapes):
            return None
        axes = _head_axes(names, shapes) or ((len(shape) - 2,), (len(shape) - 1,))
        return MatrixView(shape, *axes)

    views = [view(*leaf, n) for leaf, n in zip(leaves, numbers, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), views)


def is_no_weight(names: tuple[str, ...]) -> bool:
    """Whether a leaf is a bias or a scale by its path: only if stacked it looks like a matrix."""
    return bool(names) and names[-1] in UNPROJECTED_LEAVES


def is_named_whole(names: tuple[str, ...]) -> bool:
    """Whether a word of the path is embed, embedding, head or norm: whole unless asked for."""
    words = _WORD.findall(_MULTI_HEAD.sub("", " ".join(names)))
    return any(word.lower() in UNPROJECTED_WORDS for word in words)


def path_names(path: tuple[Hashable, ...]) -> tuple[str, ...]:
    """The names of a path: `("layers", "mlp", "up_proj", "kernel")`."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a tree with the names of their paths.

    A parameter that Flax boxes, in a variable of NNX or with the names of its axes, has the name of
    its box.
    """

    def stops(node: Any) -> bool:
        is_variable = _is_of_flax("Variable", node)
        return is_box(node) or is_variable or (is_leaf is not None and is_leaf(node))

    return [
        (path_names(path), leaf)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops)
        for leaf in jax.tree.leaves(node, is_leaf=is_leaf)
    ]


def is_box(node: Any) -> bool:
    """Whether a node is a box of Flax around an array, with the names of its axes."""
    return _is_of_flax("AxisMetadata", node)


def unboxed(tree: PyTree) -> PyTree:
    """A tree without its boxes; unlike Flax's own function this constrains no sharding."""

    def content(node: Any) -> Any:
        return jax.tree.leaves(node, lambda inside: inside is not node)[0] if is_box(node) else node

    return jax.tree.map(content, tree, is_leaf=is_box)


def _is_of_flax(name: str, node: Any) -> bool:
    # By name, for flax is not imported here.
    return any(
        kind.__name__ == name and kind.__module__.startswith("flax.") for kind in type(node).__mro__
    )


def _broadcast_numbers(numbers: PyTree, params: PyTree) -> list[Any]:
    """Dimension numbers, None or `_DEFAULT` for each leaf."""
    leaves = named_leaves(params)
    if numbers is None:
        return [_DEFAULT] * len(leaves)
    if callable(numbers):
        numbers = numbers(params)
    is_leaf = lambda node: node is None or isinstance(node, GaLoreDimensionNumbers)
    given = dict(jax.tree_util.tree_leaves_with_path(numbers, is_leaf=is_leaf))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found, used = [], set()
    for path, (names, _) in zip(paths, leaves, strict=True):
        place = next((path[:n] for n in range(len(path) + 1) if path[:n] in given), None)
        if place is None:
            raise ValueError(
                f"galore: weight_dimension_numbers has nothing for {'/'.join(names)}: "
                "give a tree like the parameters or a prefix of it, with None for what stays whole."
            )
        found.append(given[place])
        used.add(place)
    for path in given:
        if path not in used:
            raise ValueError(
                f"galore: weight_dimension_numbers has {'/'.join(path_names(path))}, which the "
                "parameters do not have: leave it out."
            )
    return found


def _view_by_numbers(numbers: Any, shape: tuple[int, ...], name: str) -> MatrixView:
    def axes(given: int | Sequence[int]) -> tuple[int, ...]:
        return (given,) if isinstance(given, int) else tuple(given)

    if not isinstance(numbers, GaLoreDimensionNumbers):
        raise ValueError(
            f"galore: the dimension numbers of {name} are {numbers!r}; give "
            "optax.contrib.GaLoreDimensionNumbers, or None to leave it whole."
        )
    sides = axes(numbers.reduction_axis), axes(numbers.output_axis)
    every = [axis + len(shape) if axis < 0 else axis for side in sides for axis in side]
    in_range = all(0 <= axis < len(shape) for axis in every)
    if not (in_range and len(set(every)) == len(every) and all(sides)):
        raise ValueError(
            f"galore: {name} has {len(shape)} axes, shape {shape}, which do not fit the dimension "
            f"numbers reduction_axis={numbers.reduction_axis}, output_axis={numbers.output_axis}: "
            "name each axis once, at least one for in and one for out."
        )
    return MatrixView(shape, tuple(every[: len(sides[0])]), tuple(every[len(sides[0]) :]))


def _is_bias_of_layer(
    names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> bool:
    """Whether a leaf is called `b`, and beside it is a weight: of its axes, and more before out."""
    if names[-1:] != ("b",):
        return False
    *batch, out = shapes[names]
    beside = [shape for other, shape in shapes.items() if other[:-1] == names[:-1]]
    return any(
        len(shape) > len(batch) + 1 and (*shape[: len(batch)], shape[-1]) == (*batch, out)
        for shape in beside
    )


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
