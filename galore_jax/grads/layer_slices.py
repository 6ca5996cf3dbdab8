"""Parts of parameters and optimizer states: those of one layer, or of leaves without layers.

A state contains trees like the parameters (of moments, bases or counters) and shared values such as
counts. The node at the path of a parameter is that parameter's piece, whatever the state keeps
there: an array, codes with their scales, or a `Basis`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax import lax

from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import MatrixView, path_names
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import KeyPath, PyTree

LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class Slices:
    """How trees like the parameters, and states that contain such trees, are sliced.

    Attributes:
      groups: the group of each parameter, by path: `LAYERS` if it is stacked by layer along its
        first axis, any other name if it is not.
      layers: number of layers.
    """

    groups: Mapping[KeyPath, str]
    layers: int

    def group(self, tree: PyTree, name: str) -> PyTree:
        """The pieces of a group and the shared values; `optax.MaskedNode()` for other pieces."""
        return self._map(lambda group, _, piece: piece if group in (None, name) else _masked, tree)

    def with_group(self, tree: PyTree, name: str | None, new: PyTree) -> PyTree:
        """The tree with new pieces for a group; for the group None, with new shared values."""
        return self._map(lambda group, _, old, new: new if group == name else old, tree, new)

    def layer(self, tree: PyTree, index: jax.Array | int) -> PyTree:
        """Like `group`, for one layer: its pieces, bases and moments too, lack the layer axis.

        Raises:
          ValueError: a state keeps something for a stacked parameter that is not stacked by layer.
        """

        def sliced(group: str | None, path: KeyPath, piece: Any) -> Any:
            if group != LAYERS:
                return piece if group is None else _masked

            def cut(stack: jax.Array) -> jax.Array:
                if _is_shared(piece, stack):
                    return stack
                if not stack.ndim or stack.shape[0] != self.layers:
                    raise ValueError(
                        f"layerwise: for {'/'.join(path_names(path))}, which is stacked by layer, "
                        f"the optimizer keeps an array, {stack.shape}, that is not stacked by "
                        "layer: use a transformation that treats each layer separately."
                    )
                return lax.dynamic_index_in_dim(stack, index, keepdims=False)

            return _without_layers(jax.tree.map(cut, piece))

        return self._map(sliced, tree)

    def with_layer(self, tree: PyTree, index: jax.Array, new: PyTree) -> PyTree:
        """The tree with new pieces for a layer; shared values stay."""

        def updated(group: str | None, _: KeyPath, old: Any, new: Any) -> Any:
            if group != LAYERS:
                return old
            leaves, structure = jax.tree.flatten(old)
            put = lambda stack, layer: lax.dynamic_update_index_in_dim(stack, layer, index, 0)
            pairs = zip(leaves, jax.tree.leaves(new), strict=True)
            return structure.unflatten(
                [layer if _is_shared(old, stack) else put(stack, layer) for stack, layer in pairs]
            )

        return self._map(updated, tree, new)

    def _map(self, f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        def group_of(path: KeyPath) -> str | None:
            ends = (path[n:] for n in range(len(path)))
            return next((self.groups[end] for end in ends if end in self.groups), None)

        def at_piece(path: KeyPath, *pieces: Any) -> Any:
            return f(group_of(path), path, *pieces)

        is_piece = lambda path, _: group_of(path) is not None
        return jax.tree_util.tree_map_with_path(
            at_piece, tree, *rest, is_leaf=is_piece, is_leaf_takes_path=True
        )


_masked = optax.MaskedNode()


def _is_shared(piece: Any, array: jax.Array) -> bool:
    """Whether an array of a piece is one for all layers: a number among the settings of a basis."""
    return is_basis(piece) and not array.ndim


def _without_layers(piece: Any) -> Any:
    """A piece whose bases and coordinates describe a parameter without the first axis."""
    is_leaf = lambda node: is_basis(node) or is_coordinates(node)

    def at_node(node: Any) -> Any:
        if not isinstance(node, Basis | Coordinates):
            return node
        view = node.projection.view
        if 0 not in view.batch_axes:
            raise ValueError(
                f"{node.projection.name} is projected across its layers: leave the first axis, of "
                "layers, out of its dimension numbers."
            )
        shifted = lambda axes: tuple(axis - 1 for axis in axes)
        view = MatrixView(view.shape[1:], shifted(view.in_axes), shifted(view.out_axes))
        partition = node.projection.partition
        if partition is not None:
            partition = partition.trailing(len(view.shape))
        projection = dataclasses.replace(node.projection, view=view, partition=partition)
        return dataclasses.replace(node, projection=projection)

    return jax.tree.map(at_node, piece, is_leaf=is_leaf)
