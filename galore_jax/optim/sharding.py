"""Where parameters and optimizer states lie on a mesh: start here.

`shardings` chooses where parameters lie: by rules, by their Flax boxes, and fully sharded data
parallel. `init` and `state_shardings` place the state accordingly. What follows for the arrays of
one parameter, its basis and its coordinates, is in `subspace.placement`; `ops.partition` runs
functions on the parts that devices have.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from galore_jax.ops.partition import (
    AxisNames,
    MeshAxes,
    Partition,
    axes_of,
    names_of,
    partition_of,
    placed,
    with_auto_axes,
)
from galore_jax.ops.quantization import Quantized
from galore_jax.optim.galore_state import (
    GaLoreState,
    Unprojected,
    bases_of,
    galore_states,
    is_parameter,
)
from galore_jax.optim.moments import is_moment
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import is_bias_or_scale, is_box, named_leaves, path_names
from galore_jax.subspace.placement import (
    basis_partition,
    counters_partition,
    leaf_partition,
    moment_partition,
)
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.subspace.rules import matches
from galore_jax.types import KeyPath, PyTree

FSDP = "fsdp"
# The fraction of all numbers that may stay whole on every device without a warning.
MAX_WHOLE = 0.02


def shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    mesh: Mesh,
    rules: Mapping[Any, PartitionSpec] | None = None,
) -> PyTree:
    """Shardings of parameters for training with `tx` on a mesh.

    Three things are decided in this order. A leaf in a Flax box (`nn.with_partitioning`, logical
    partitioning) has the axes of the box, translated by the logical axis rules of the context. Any
    other leaf has the spec of the first rule that matches its path. If the mesh has an axis named
    "fsdp" that the leaf does not use yet, it shards one more axis: the unprojected side of a
    projected matrix, the first matrix axis of another one, or the last axis of a bias or scale,
    whose first may be layers. If its size does not divide that axis, another one is sharded; if it
    divides none, the leaf is replicated.

    Batches are usually divided over "data" and "fsdp". Other mesh axes divide parameters only where
    a rule or a box says so.

    Args:
      tx: the optimizer, with galore in it or without.
      params: the parameters, or their shapes.
      mesh: the mesh, with Auto or Explicit axes.
      rules: by pattern of the path, as for `galore`, the spec of the leaves that match.

    Returns:
      A tree like `params`, with a `NamedSharding` at each leaf.

    Raises:
      ValueError: a rule that matches no leaf; or the spec of a rule or a box that does not fit its
        leaf, names an axis twice, or one that the mesh does not have.

    Warns:
      UserWarning: more than 2% of all numbers stay whole; the message names the five largest
        leaves.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> from galore_jax import chain, galore, init, shardings
      >>> params = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> tx = chain(galore(rank=8), optax.adam(1e-3))
      >>> placement = shardings(tx, params, mesh, rules={"up": P(None, "tensor")})
      >>> placement["up"].mesh.axis_names
      ('fsdp', 'tensor')
      >>> params = jax.device_put(params, placement)
      >>> state = init(tx, params)
    """
    rules, unused = dict(rules or {}), dict(rules or {})
    unsharded = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
    params = jax.tree.map(unsharded, params)
    state = jax.eval_shape(lambda params: start(tx, params), params)
    bases = bases_of(galore_states(state, inside_chains=True))
    projections = {basis.projection.path: basis.projection for basis in bases}

    def partition(names: tuple[str, ...], leaf: Any, spec: PartitionSpec | None) -> Partition:
        name = "/".join(names)
        if spec is None:
            pattern = next((pattern for pattern in rules if matches(pattern, name)), None)
            spec = PartitionSpec() if pattern is None else rules[pattern]
            unused.pop(pattern, None)
        _check(spec, name, leaf.shape, mesh)
        wanted: list[tuple[str, Sequence[int]]] = [
            (axis, (place,)) for place, entry in enumerate(spec) for axis in names_of(entry)
        ]
        if FSDP in mesh.shape and FSDP not in [axis for axis, _ in wanted]:
            wanted.append((FSDP, _places(names, leaf.shape, projections.get(names))))
        return placed(axes_of(mesh), leaf.shape, wanted)

    leaves = named_leaves(params)
    partitions = [
        partition(names, leaf, spec)
        for (names, leaf), spec in zip(leaves, _specs_of_boxes(params), strict=True)
    ]
    if unused:
        raise ValueError(
            f"shardings: the rule {next(iter(unused))!r} matches no parameter, or an earlier rule "
            f"takes what it matches: the paths are {', '.join('/'.join(n) for n, _ in leaves[:5])}"
            f"{', …' if len(leaves) > 5 else ''}."
        )
    _warn_of_whole_leaves(leaves, partitions)
    return jax.tree.unflatten(
        jax.tree.structure(params), [NamedSharding(mesh, each.spec) for each in partitions]
    )


def _places(
    names: tuple[str, ...], shape: Sequence[int], projection: Projection | None
) -> list[int]:
    """The axes to try for "fsdp", in this order."""
    if projection is None:
        if is_bias_or_scale(names):
            return list(range(len(shape)))[::-1]
        # Of a stack, layers are taken one at a time, so they come last.
        stacked = max(len(shape) - 2, 0)
        return [*range(stacked, len(shape)), *range(stacked)]
    view = projection.view
    sides = [view.out_axes, view.in_axes]  # A left basis keeps the out side.
    if "left" not in projection.sides:
        sides.reverse()
    # The first axis of a side is the only one that leaves its parts contiguous.
    return [*(side[0] for side in sides), *view.batch_axes[::-1]]


def _specs_of_boxes(params: PyTree) -> list[PartitionSpec | None]:
    """For each leaf the spec of its Flax box, None if it has none."""

    def spec(node: Any) -> PartitionSpec | None:
        if not is_box(node) or not hasattr(node, "get_partition_spec"):
            return None
        spec = node.get_partition_spec()
        if type(node).__name__ != "LogicallyPartitioned":
            return spec
        from flax.linen import spmd  # The box is Flax's, so it is installed.

        return spmd.logical_to_mesh_axes(spec) or PartitionSpec()

    nodes = jax.tree.leaves(params, is_leaf=is_box)
    return [spec(node) for node in nodes for _ in jax.tree.leaves(node)]


def _check(spec: PartitionSpec, name: str, shape: Sequence[int], mesh: Mesh) -> None:
    used: MeshAxes = tuple(axis for entry in spec for axis in names_of(entry))
    for axis in used:
        if axis not in mesh.shape:
            raise ValueError(
                f'shardings: {spec} of {name} names the axis "{axis}", but the mesh has only '
                f"{', '.join(map(str, mesh.axis_names))}."
            )
        if used.count(axis) > 1:
            raise ValueError(f'shardings: {spec} of {name} names the axis "{axis}" twice.')
    if len(spec) > len(shape):
        raise ValueError(
            f"shardings: {spec} has more entries than {name} has axes, {len(shape)}: remove some."
        )
    for size, entry in zip(shape, spec, strict=False):
        parts = math.prod(mesh.shape[axis] for axis in names_of(entry))
        if size % parts:
            raise ValueError(
                f"shardings: {spec} divides an axis of {name}, of shape {tuple(shape)}, into "
                f"{parts} parts, which do not divide {size}: choose another spec for it."
            )


def _warn_of_whole_leaves(
    leaves: list[tuple[tuple[str, ...], Any]], partitions: list[Partition]
) -> None:
    size = lambda leaf: math.prod(leaf.shape)
    whole = [
        (size(leaf), "/".join(names), leaf.shape)
        for (names, leaf), partition in zip(leaves, partitions, strict=True)
        if not partition.used
    ]
    has_fsdp = partitions[0].mesh.shape.get(FSDP, 1) > 1 if partitions else False
    divides = has_fsdp or any(partition.used for partition in partitions)
    total = sum(size(leaf) for _, leaf in leaves)
    fraction = sum(size for size, *_ in whole) / max(total, 1)
    if divides and fraction > MAX_WHOLE:
        largest = ", ".join(f"{name} {shape}" for _, name, shape in sorted(whole)[:-6:-1])
        warnings.warn(
            f"shardings: {fraction:.0%} of all numbers stay whole on every device, because no size "
            f"of a mesh axis divides them: {largest}. Choose other sizes, or add rules.",
            stacklevel=3,
        )


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
