"""Matrix views: which parameters are matrices, and which of their axes are rows and columns."""

import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.ops.int8 import is_int8
from galore_jax.types import KeyPath, PyTree

# A leaf whose last name is one of these is not projected: they are the names of biases and of the
# scales of norms in Flax and Equinox, Haiku, and Keras.
UNPROJECTED_LEAVES = frozenset({"bias", "scale", "offset", "beta", "gamma"})
# Nor, unless a rule matches it, is a leaf with one of these words in its path, or with the name of
# a norm in its last two names: a "PreNorm" may contain whole layers. "lm_head" consists of "lm" and
# "head".
EMBEDDINGS = frozenset({"emb", "embed", "embedding", "embeddings", "unembed", "wpe", "wte"})
HEADS = frozenset({"classifier", "head", "logits"})
# A layer named "output" is a head if it is at the top, below at most one of these names: blocks
# have layers of that name too, such as BERT's layer/0/output/dense.
_ROOTS = frozenset({"model", "module", "params"})
NORMS = frozenset({"layernorm", "ln", "norm", "rmsnorm"})
# Names of attention kernels that may have separate axes for the heads: Flax's, Keras' and Tunix'.
_ATTENTIONS = (
    ("query", "key", "value", "out"),
    ("query", "key", "value", "attention_output"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
)
# Nodes that hold an array and metadata about it, by package and class.
_BOXES = {("flax", "AxisMetadata"), ("flax", "Variable"), ("haliax", "NamedArray")}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MULTI_HEAD = re.compile(r"multi_?head", re.IGNORECASE)  # Attention, not a language model's head.
_DEFAULT = object()  # A placeholder for leaves without dimension numbers.


@dataclass(frozen=True)
class MatrixView:
    """An array viewed as a batch of (in, out) matrices, shape `(*batch, in, out)`.

    Attributes:
      shape: shape of the array.
      in_axes: the axes of the array that form the rows.
      out_axes: the axes of the array that form the columns; all other axes are batch axes.
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
        """Transposes and reshapes an array of `shape` to `(*batch, in, out)`."""
        return array.transpose(self._order).reshape(*self.batch, self.rows, self.columns)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """Inverts `to_matrices`."""
        array = matrices.reshape(self._sizes(self._order))
        return array.transpose(tuple(self._order.index(axis) for axis in range(len(self.shape))))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.in_axes, *self.out_axes)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def matrix_views(params: PyTree, weight_dimension_numbers: PyTree = None) -> PyTree:
    """Determines how each leaf is viewed as matrices, if it can be.

    By default the last two axes are the matrix axes. The kernels of an attention module that are
    stored with separate heads, by the names in `_ATTENTIONS`, are viewed with the model axis on one
    side and both head axes on the other. A leaf has no view if it has fewer than two axes, no
    elements or a dtype that is not floating point; nor, by default, if it is a bias named `b` or
    `b1`, which has two axes when layers are stacked.

    Args:
      params: any pytree of arrays or of their shapes.
      weight_dimension_numbers: None for the default; or `optax.contrib.GaLoreDimensionNumbers`, or
        any object with the same attributes (`reduction_axis` for in, `output_axis` for out, each
        an axis or a sequence of axes; the others are batch axes): one for all leaves, or a tree of
        them like `params` or a prefix of it, with None for leaves that are not to be projected; or
        a function from `params` to any of these.

    Returns:
      A tree like `params` with a `MatrixView` or None at each leaf.

    Raises:
      ValueError: dimension numbers whose tree does not match `params`, or that do not fit a leaf,
        which is named.
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


def is_bias_or_scale(names: tuple[str, ...]) -> bool:
    """Whether a leaf is a bias or a scale by its name; stacked ones have the shape of a matrix."""
    return bool(names) and names[-1] in UNPROJECTED_LEAVES


def is_vector(names: tuple[str, ...]) -> bool:
    """Whether a leaf is a vector by its path, or a stack of them: a bias, a scale, or of a norm."""
    is_bias = is_bias_or_scale(names) or _words(names[-1:]) == ["b"]
    return is_bias or not NORMS.isdisjoint(_words(names[-2:]))


def is_unprojected_by_name(names: tuple[str, ...]) -> bool:
    """Whether a leaf is of an embedding, a head or a norm by its path: no projection by default."""
    is_norm = not NORMS.isdisjoint(_words(names[-2:]))
    return is_norm or is_head(names) or is_embedding(names)


def is_embedding(names: tuple[str, ...]) -> bool:
    """Whether a leaf is of an embedding by its path."""
    return not EMBEDDINGS.isdisjoint(_words(names))


def is_head(names: tuple[str, ...]) -> bool:
    """Whether a leaf is of a head by its path."""
    from_top = names[1:] if names[:1] and names[0] in _ROOTS else names
    is_output = from_top[:1] == ("output",) and len(from_top) <= 2
    return is_output or not HEADS.isdisjoint(_words(names))


def _words(names: tuple[str, ...]) -> list[str]:
    words = _WORD.findall(_MULTI_HEAD.sub("", " ".join(names)))
    return [word.lower() for word in words]


def path_names(path: tuple[Hashable, ...]) -> tuple[str, ...]:
    """The names of a path, such as `("layers", "mlp", "up_proj", "kernel")`.

    A key that is itself a path, as in Haiku's and Keras' names, counts as several names.
    """
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")) if path else ()


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a tree with the names of their paths.

    A parameter inside a box has the path of the box; an `Int8` is one leaf.
    """

    is_end = lambda node: is_leaf is not None and is_leaf(node)
    return [
        (path_names(path), leaf)
        for path, node in leaves_with_path(tree, is_end)
        for leaf in jax.tree.leaves(node, is_leaf=lambda node: is_int8(node) or is_end(node))
    ]


def leaves_with_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] = lambda _: False
) -> list[tuple[KeyPath, Any]]:
    """The leaves of a tree with their paths, where a box and an `Int8` count as leaves."""
    ends = lambda node: is_box(node) or is_int8(node) or is_leaf(node)
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=ends)


def is_box(node: Any) -> bool:
    """Whether a node is an array with metadata: Flax', an NNX variable, or Haliax' named array."""
    # Classes are compared by name because Flax and Haliax may not be installed.
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(node).__mro__}
    return not kinds.isdisjoint(_BOXES)


def is_function(setting: Any) -> bool:
    """Whether a setting is a function from the parameters, as opposed to a tree like them.

    A tree like an Equinox model is callable too.
    """
    return callable(setting) and all(map(callable, jax.tree.leaves(setting)))


def unboxed(tree: PyTree) -> PyTree:
    """Replaces boxes with their arrays; unlike Flax's own function, constrains no sharding."""

    def unbox(node: Any) -> Any:
        return jax.tree.leaves(node, lambda child: child is not node)[0] if is_box(node) else node

    return jax.tree.map(unbox, tree, is_leaf=is_box)


def _broadcast_numbers(numbers: PyTree, params: PyTree) -> list[Any]:
    """Dimension numbers, None or `_DEFAULT` for each leaf."""
    if numbers is None:
        return [_DEFAULT] * len(jax.tree.leaves(params))
    if is_function(numbers):
        numbers = numbers(params)
    is_leaf = lambda node: node is None or _is_dimension_numbers(node)
    try:
        found = jax.tree.broadcast(numbers, params, is_leaf)
    except ValueError as error:
        raise ValueError(
            "galore: weight_dimension_numbers does not match the parameters: give a tree like them "
            "or a prefix of it, with None for leaves not to be projected."
        ) from error
    return jax.tree.structure(params).flatten_up_to(found)


def _is_dimension_numbers(node: Any) -> bool:
    # By attributes, so that optax.contrib need not be imported.
    return hasattr(node, "reduction_axis") and hasattr(node, "output_axis")


def _view_by_numbers(numbers: Any, shape: tuple[int, ...], name: str) -> MatrixView:
    def axes(given: Any) -> tuple[int, ...]:
        return (int(given),) if isinstance(given, Integral) else tuple(map(int, given))

    if not _is_dimension_numbers(numbers):
        raise ValueError(
            f"galore: the dimension numbers of {name} are {numbers!r}; give "
            "optax.contrib.GaLoreDimensionNumbers, or None not to project it."
        )
    sides = axes(numbers.reduction_axis), axes(numbers.output_axis)
    all_axes = [axis + len(shape) if axis < 0 else axis for side in sides for axis in side]
    in_range = all(0 <= axis < len(shape) for axis in all_axes)
    if not (in_range and len(set(all_axes)) == len(all_axes) and all(sides)):
        raise ValueError(
            f"galore: {name} has {len(shape)} axes, shape {shape}, which do not fit the dimension "
            f"numbers reduction_axis={numbers.reduction_axis}, output_axis={numbers.output_axis}: "
            "name each axis at most once, and at least one for in and one for out."
        )
    in_axes, out_axes = all_axes[: len(sides[0])], all_axes[len(sides[0]) :]
    return MatrixView(shape, tuple(in_axes), tuple(out_axes))


def _is_bias_of_layer(
    names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> bool:
    """Whether a leaf is a bias: named `b`, `(*batch, out)`, next to `(*batch, …, out)`."""
    if _words(names[-1:]) != ["b"]:
        return False
    *batch, out = shapes[names]
    siblings = [shape for other, shape in shapes.items() if other[:-1] == names[:-1]]
    return any(
        len(shape) > len(batch) + 1 and (*shape[: len(batch)], shape[-1]) == (*batch, out)
        for shape in siblings
    )


def _head_axes(
    names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """In and out axes of an attention kernel stored as (model, heads, head size) or its reverse."""
    for queries, *others, outputs in _ATTENTIONS:
        if len(names) < 2 or names[-2] not in (queries, *others, outputs):
            continue
        shape = shapes[names]
        query = shapes.get((*names[:-2], queries, names[-1]), ())
        out = shapes.get((*names[:-2], outputs, names[-1]), ())
        if len(shape) < 3 or len(query) != len(out) or query[-2:] != out[-3:-1]:
            continue
        axis = len(shape) - 3
        if names[-2] == outputs:
            return (axis, axis + 1), (axis + 2,)
        return (axis,), (axis + 1, axis + 2)
    return None
