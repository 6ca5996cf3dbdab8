"""Optimizer states that lie where their parameters lie on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, NamedSharding

from galore_jax.ops.explicit import with_auto_axes
from galore_jax.ops.partition import AxisNames, MeshAxes, Partition, axes_of, names_of, partition_of
from galore_jax.ops.quantization import Quantized
from galore_jax.optim.rotation import is_moment
from galore_jax.optim.state import GaLoreState, Unprojected, is_parameter
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import named_leaves, path_names
from galore_jax.subspace.placement import (
    basis_partition,
    counters_partition,
    leaf_partition,
    moment_partition,
)
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.types import KeyPath, PyTree


def init(tx: optax.GradientTransformation, params: PyTree, *, over: AxisNames = ()) -> PyTree:
    """Starts any optax transformation so that what comes after a `galore` in it is low-rank.

    It replaces `tx.init(params)` for a stock `optax.chain(galore(...), ...)`. Transformations after
    galore are started with zero `Coordinates` for projected leaves, and with the other parameters
    in float32, so that moments are float32 whatever the dtype of the parameters. Without galore it
    is `tx.init`.

    If the parameters lie on a mesh of several devices, so does the state, as `state_shardings`
    says, and it knows how: later updates divide their work accordingly. Arrays show where they lie
    only outside of `jax.jit`, so call `init` there.

    Args:
      tx: any transformation, with galore anywhere in it, or without.
      params: the parameters.
      over: mesh axes that do not divide the parameters, but are to divide the moments: usually the
        axes of the batch (ZeRO-1, arXiv 1910.02054).

    Returns:
      The optimizer's state, for `apply_gradients`. (The updates of a stock `tx.update` are not
      lifted; those of a `chain` are.)

    Raises:
      ValueError: moments that cannot be rotated, naming the leaf; an axis in `over` that the mesh
        does not have, or that divides a parameter.
    """
    return placed_state(lambda params: start(tx, params), params, over)


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, *, over: AxisNames = ()
) -> PyTree:
    """The shardings of the state that `init` returns, for `jax.jit` or a checkpoint.

    Everything is derived from the shardings of the parameters: bases are divided along their long
    axis; coordinates, moments and their 8-bit codes along the axis that the projection keeps, or
    along the rank; other moments like their parameter. Counters are divided as the matrices that
    they belong to, schedules are not.

    Args:
      tx: any transformation.
      params: the parameters, or their shapes with shardings on one mesh.
      over: as for `init`.

    Returns:
      A tree like the state, with a `NamedSharding` at each leaf.

    Raises:
      ValueError: the parameters do not lie on a mesh; and as for `init`.
    """
    return shardings_of(lambda params: start(tx, params), params, over)


def placed_state(start: Callable[[PyTree], PyTree], params: PyTree, over: AxisNames) -> PyTree:
    """`start(params)`, compiled so that each device gets its part of the state only."""
    if not any(partition_of(leaf) for leaf in jax.tree.leaves(params)):
        return start(params)
    shardings = shardings_of(start, params, over)
    leaves, tree = jax.tree.flatten(shardings)
    specs = [sharding.spec for sharding in leaves]

    def compute(params: PyTree) -> list[jax.Array]:
        flat = lambda params: jax.tree.leaves(start(params))
        return with_auto_axes(flat, params, out=lambda: specs)

    return tree.unflatten(jax.jit(compute, out_shardings=leaves)(params))


def shardings_of(start: Callable[[PyTree], PyTree], params: PyTree, over: AxisNames) -> PyTree:
    """The shardings of `start(params)`, in a tree that knows the partitions of the parameters."""
    meshes = [
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    if not meshes:
        raise ValueError(
            "state_shardings: the parameters have no jax.sharding.NamedSharding: place them on a "
            "mesh first: jax.device_put(params, galore_jax.shardings(tx, params, mesh))."
        )
    places = _Places.of(params, names_of(over), axes_of(meshes[0]))
    unsharded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    state = places.tagged(jax.eval_shape(start, unsharded))
    return jax.tree.map(
        lambda partition: NamedSharding(meshes[0], partition.spec),
        places.partitions(state),
        is_leaf=lambda node: isinstance(node, Partition),
    )


class _Leaf(NamedTuple):
    """A parameter: its partition over a mesh, and its shape."""

    partition: Partition | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the parameters lie, by the path of their leaf and by its names."""

    by_path: Mapping[KeyPath, _Leaf]
    by_name: Mapping[tuple[str, ...], Partition | None]
    over: MeshAxes
    undivided: Partition

    @classmethod
    def of(cls, params: PyTree, over: MeshAxes, mesh: AbstractMesh) -> "_Places":
        found = [partition_of(leaf) for leaf in jax.tree.leaves(params)]
        for (names, _), partition in zip(named_leaves(params), found, strict=True):
            for axis in over:
                _check_over(axis, mesh, "/".join(names), partition)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        by_path = {
            path: _Leaf(partition, leaf.shape)
            for (path, leaf), partition in zip(leaves, found, strict=True)
        }
        names = [names for names, _ in named_leaves(params)]
        by_name = dict(zip(names, found, strict=True))
        return cls(by_path, by_name, over, Partition(mesh, ()))

    def tagged(self, state: PyTree) -> PyTree:
        """The state, with partitions in its projections and codes."""

        def tag(projection: Projection) -> Projection:
            partition = self.by_name.get(projection.path)
            return dataclasses.replace(projection, partition=partition, over=self.over)

        def at_parameter(path: KeyPath, node: Any) -> Any:
            partition = self.by_name.get(path_names(path))
            if is_basis(node) or partition is None:
                return at_node(path, node)
            return Unprojected(partition)

        def at_node(path: KeyPath, node: Any) -> Any:
            if isinstance(node, GaLoreState):
                bases = jax.tree_util.tree_map_with_path(
                    at_parameter, node.bases, is_leaf=is_parameter
                )
                return node._replace(bases=bases)
            if isinstance(node, Basis | Coordinates):
                node = dataclasses.replace(node, projection=tag(node.projection))
            if is_coordinates(node) and isinstance(node.value, Quantized):
                partition = moment_partition(node)
                return dataclasses.replace(node, value=_with(node.value, partition))
            if isinstance(node, Quantized):
                return _with(node, self._of_leaf(path, node))
            return node

        is_leaf = lambda node: _is_node(node) or isinstance(node, GaLoreState)
        return jax.tree_util.tree_map_with_path(at_node, state, is_leaf=is_leaf)

    def partitions(self, state: PyTree) -> PyTree:
        """A tree like a tagged state, with the partition of each leaf."""

        def at_node(path: KeyPath, node: Any) -> Any:
            if is_basis(node):
                return self._of_basis(node)
            if is_coordinates(node):
                partition = moment_partition(node) if is_moment(node) else None
                return dataclasses.replace(node, value=self._like(node.value, partition))
            return self._like(node, self._of_leaf(path, node))

        return jax.tree_util.tree_map_with_path(at_node, state, is_leaf=_is_node)

    def _of_basis(self, basis: Basis) -> Basis:
        projection = basis.projection
        vectors = {
            side: self._like(stored, basis_partition(projection, side))
            for side, stored in basis.vectors.items()
        }
        counters = counters_partition(projection) or self.undivided
        names = {field.name for field in dataclasses.fields(Basis) if not field.metadata}
        placed: dict[str, Any] = dict.fromkeys(names - {"vectors"}, counters)
        placed |= dict.fromkeys(("scale", "interval"), self.undivided)
        return dataclasses.replace(basis, vectors=vectors, **placed)

    def _like(self, value: Any, partition: Partition | None) -> Any:
        """The value, an array or `Quantized`, with the partition in place of each array."""
        return jax.tree.map(lambda _: partition or self.undivided, value)

    def _of_leaf(self, path: KeyPath, node: Any) -> Partition | None:
        """The partition of what the state keeps at the path of an unprojected parameter."""
        ends = (path[n:] for n in range(len(path) + 1))
        leaf = next((self.by_path[end] for end in ends if end in self.by_path), None)
        if leaf is None or leaf.partition is None:
            return None
        return leaf_partition(leaf.partition, self.over, node, leaf.shape)


def _is_node(node: Any) -> bool:
    return is_basis(node) or is_coordinates(node) or isinstance(node, Quantized)


def _with(value: Quantized, partition: Partition | None) -> Quantized:
    return dataclasses.replace(value, partition=partition)


def _check_over(axis: str, mesh: AbstractMesh, name: str, partition: Partition | None) -> None:
    if axis not in mesh.axis_names:
        known = ", ".join(map(str, mesh.axis_names))
        raise ValueError(f'over: the mesh has no axis "{axis}": take some of {known}.')
    if partition is not None and axis in partition.used:
        raise ValueError(
            f'over: the mesh axis "{axis}" divides the parameter {name} already, and so its '
            "moments: leave it out."
        )
