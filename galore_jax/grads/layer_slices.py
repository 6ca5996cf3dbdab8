"""One layer, or the leaves outside of layers, cut out of a model's parameters and optimizer state.

A state holds trees like the parameters, of moments, bases or counters, and numbers that all of them
share. What lies at the path of a parameter is that parameter's piece, whatever the state keeps
there: an array, codes with their scales, a `Basis`, the whole state of an optimizer of its own.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax
from jax import lax

from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import MatrixView
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree

KeyPath = tuple[Hashable, ...]

LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class Slices:
    """How trees like some parameters, and states with such trees in them, are cut.

    Attributes:
      groups: by path of a parameter, the group it belongs to: `LAYERS` for what is stacked by layer
        along its first axis, any other name for the rest.
      number: of layers.
    """

    groups: Mapping[KeyPath, str]
    number: int

    def group(self, tree: PyTree, name: str) -> PyTree:
        """The pieces of a group, `optax.MaskedNode()` for those of others, and what is shared."""
        return self._map(lambda at, piece: piece if at in (None, name) else _masked, tree)

    def with_group(self, tree: PyTree, name: str | None, new: PyTree) -> PyTree:
        """The tree with the new pieces of a group; None: with the new values of what is shared."""
        return self._map(lambda at, old, new: new if at == name else old, tree, new)

    def layer(self, tree: PyTree, index: jax.Array) -> PyTree:
        """As `group`, of one layer: its pieces lack the layer axis, in bases and moments too."""

        def cut(at: str | None, piece: Any) -> Any:
            if at is None:
                return piece
            return _without_layers(self._cut(piece, index)) if at == LAYERS else _masked

        return self._map(cut, tree)

    def with_layer(self, tree: PyTree, index: jax.Array, new: PyTree) -> PyTree:
        """The tree with a layer's new pieces; what is shared stays."""

        def put(at: str | None, old: Any, new: Any) -> Any:
            return self._put(old, index, new) if at == LAYERS else old

        return self._map(put, tree, new)

    def _map(self, f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        def place(path: KeyPath) -> str | None:
            ends = (path[n:] for n in range(len(path)))
            return next((self.groups[end] for end in ends if end in self.groups), None)

        def at_piece(path: KeyPath, *pieces: Any) -> Any:
            return f(place(path), *pieces)

        is_piece = lambda path, _: place(path) is not None
        return jax.tree_util.tree_map_with_path(
            at_piece, tree, *rest, is_leaf=is_piece, is_leaf_takes_path=True
        )

    def _cut(self, piece: Any, index: jax.Array) -> Any:
        def cut(stack: jax.Array) -> jax.Array:
            each = self._rows(stack)
            if each is None:
                return stack
            own = lax.dynamic_slice_in_dim(stack, index * each, each)
            return own if _is_flat(piece) else own[0]

        return jax.tree.map(cut, piece)

    def _put(self, piece: Any, index: jax.Array, new: Any) -> Any:
        def put(stack: jax.Array, own: jax.Array) -> jax.Array:
            each = self._rows(stack)
            if each is None:
                return own
            own = own if _is_flat(piece) else own[None]
            return lax.dynamic_update_slice_in_dim(stack, own, index * each, 0)

        leaves, tree = jax.tree.flatten(piece)
        own = jax.tree.leaves(new)
        return tree.unflatten([put(*pair) for pair in zip(leaves, own, strict=True)])

    def _rows(self, stack: jax.Array) -> int | None:
        """How much of an array's first axis belongs to a layer; None of one without layers."""
        if not stack.ndim or stack.shape[0] % self.number:
            return None
        return stack.shape[0] // self.number


_masked = optax.MaskedNode()


def _is_flat(piece: Any) -> bool:
    """Whether it is the state of an optimizer for each matrix, which lie along one axis."""
    return isinstance(piece, tuple) and not isinstance(piece, optax.MaskedNode)


def _without_layers(piece: Any) -> Any:
    """A piece whose bases and coordinates know that the first axis of their parameter is gone."""
    is_leaf = lambda node: is_basis(node) or is_coordinates(node)

    def at_node(node: Any) -> Any:
        if not isinstance(node, Basis | Coordinates):
            return node
        view = node.projection.view
        if 0 not in view.batch_axes:
            raise ValueError(
                f"{node.projection.name} is projected across its layers: its dimension numbers "
                "must leave the first axis, of layers, out."
            )
        less = lambda axes: tuple(axis - 1 for axis in axes)
        view = MatrixView(view.shape[1:], less(view.in_axes), less(view.out_axes))
        projection = dataclasses.replace(node.projection, view=view)
        return dataclasses.replace(node, projection=projection)

    return jax.tree.map(at_node, piece, is_leaf=is_leaf)
