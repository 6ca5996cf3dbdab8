"""Where parameters and optimizer states lie on a mesh: start here.

1. `shardings` chooses where parameters lie: by rules, by their Flax boxes, and fully sharded data
   parallel. `init` and `state_shardings` place the optimizer's state accordingly.
2. `subspace.placement` has the rules by which the arrays of one parameter follow from where the
   parameter lies: its basis, its coordinates and its moments.
3. `ops.partition` represents how an array is divided, and runs functions on the parts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galore_jax.ops.int8 import is_int8
from galore_jax.ops.partition import (
    AxisNames,
    axes_of,
    names_of,
    partition_of,
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
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import (
    is_bias_or_scale,
    is_box,
    leaves_with_path,
    named_leaves,
    path_names,
)
from galore_jax.subspace.placement import leaf_partition, partitions, placed
from galore_jax.subspace.projection import Coordinates, Projection
from galore_jax.subspace.rules import matches
from galore_jax.types import KeyPath, PyTree

FSDP = "fsdp"


def shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    mesh: Mesh,
    rules: Mapping[Any, PartitionSpec] | None = None,
) -> PyTree:
    """Shardings of parameters for training with `tx` on a mesh.

    A leaf in a Flax box (`nn.with_partitioning`, logical partitioning) has the axes of the box,
    translated by the logical axis rules of the context; any other leaf has the spec of the first
    rule that matches its path. A mesh axis named "fsdp" that the leaf does not use yet then divides
    one more axis: the unprojected side of a projected matrix, the first matrix axis of another one,
    or the last axis of a bias or scale, whose first may be layers. If its size does not divide that
    axis, another one is divided; if it divides none, "fsdp" leaves the leaf as it is. Other mesh
    axes divide parameters only where a rule or a box says so.

    Args:
      tx: the optimizer, with galore in it or without.
      params: the parameters, or their shapes.
      mesh: the mesh, with Auto or Explicit axes.
      rules: by pattern of the path, as for `galore`, the spec of the leaves that match.

    Returns:
      A tree like `params`, with a `NamedSharding` at each leaf.

    Raises:
      ValueError: a rule that matches no leaf, or the spec of a rule or a box that does not fit its
        leaf or the mesh; parameters in 8 bits on a mesh of several devices.

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
    if mesh.size > 1 and any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8))):
        raise ValueError(
            "shardings: parameters in 8 bits are for one device: pass galore_jax.to_arrays(params)."
        )
    rules, unused = dict(rules or {}), dict(rules or {})
    params = _unsharded(params)
    state = jax.eval_shape(lambda params: start(tx, params), params)
    bases = bases_of(galore_states(state, inside_chains=True))
    projections = {basis.projection.path: basis.projection for basis in bases}

    def sharding(names: tuple[str, ...], leaf: Any, spec: Any) -> NamedSharding:
        name = "/".join(names)
        if spec is None:
            pattern = next((pattern for pattern in rules if matches(pattern, name)), None)
            spec = PartitionSpec() if pattern is None else rules[pattern]
            unused.pop(pattern, None)
        try:
            NamedSharding(mesh, spec).check_compatible_aval(leaf.shape)
            NamedSharding(mesh, spec).shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"shardings: {name} cannot be divided by {spec}: {error}") from error
        wanted: list[tuple[str, Sequence[int]]] = [
            (axis, (place,)) for place, entry in enumerate(spec) for axis in names_of(entry)
        ]
        if FSDP in mesh.shape:
            wanted.append((FSDP, _fsdp_places(names, leaf.shape, projections.get(names))))
        return placed(axes_of(mesh), leaf.shape, wanted).sharding(mesh)

    leaves = zip(named_leaves(params), _specs_of_boxes(params), strict=True)
    found = []
    for (names, leaf), spec in leaves:
        # Codes and scales lie alike.
        found += [sharding(names, leaf, spec)] * len(jax.tree.leaves(leaf))
    if unused:
        raise ValueError(
            f"shardings: the rule {next(iter(unused))!r} matches no parameter, or an earlier rule "
            "takes what it matches."
        )
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _fsdp_places(
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

    nodes = [node for _, node in leaves_with_path(params)]
    return [spec(node) for node in nodes for _ in jax.tree.leaves(node, is_leaf=is_int8)]


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
      over: mesh axes that are to divide the moments also where they do not divide the parameter:
        usually the axes of the batch (ZeRO-1, arXiv 1910.02054).

    Returns:
      The optimizer's state, for `apply_gradients`. (The updates of a stock `tx.update` are not
      lifted; those of a `chain` are.)

    Raises:
      ValueError: moments that cannot be rotated, naming the leaf; an axis in `over` that the mesh
        does not have.
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
    shardings, tree = jax.tree.flatten(shardings_of(start, params, over))
    specs = [sharding.spec for sharding in shardings]

    def compute(params: PyTree) -> list[jax.Array]:
        flat = lambda params: jax.tree.leaves(start(params))
        return with_auto_axes(flat, params, out=lambda: specs)

    return tree.unflatten(jax.jit(compute, out_shardings=shardings)(params))


def shardings_of(start: Callable[[PyTree], PyTree], params: PyTree, over: AxisNames) -> PyTree:
    """The shardings of `start(params)`, in a tree that knows the partitions of the parameters."""
    found: Any = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    mesh = next((each.mesh for each in found if isinstance(each, NamedSharding)), None)
    if mesh is None:
        raise ValueError(
            "state_shardings: the parameters have no jax.sharding.NamedSharding: place them on a "
            "mesh first: jax.device_put(params, galore_jax.shardings(tx, params, mesh))."
        )
    for axis in names_of(over):
        if axis not in mesh.axis_names:
            known = ", ".join(map(str, mesh.axis_names))
            raise ValueError(f'over: the mesh has no axis "{axis}": take some of {known}.')
    by_name = {names: partition_of(leaf) for names, leaf in named_leaves(params)}
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))
    whole = NamedSharding(mesh, PartitionSpec())

    def at_parameter(path: KeyPath, node: Any) -> Any:
        partition = by_name.get(path_names(path))
        return at_node(path, node) if is_basis(node) or not partition else Unprojected(partition)

    def at_node(path: KeyPath, node: Any) -> Any:
        if isinstance(node, GaLoreState):
            bases = jax.tree_util.tree_map_with_path(at_parameter, node.bases, is_leaf=is_parameter)
            return jax.tree.map(lambda _: whole, node._replace(bases=None))._replace(bases=bases)
        if isinstance(node, Basis | Coordinates):
            partition = by_name.get(node.projection.path)
            projection = dataclasses.replace(
                node.projection, partition=partition, over=names_of(over)
            )
            node = dataclasses.replace(node, projection=projection)
            where = None if partition is None else partitions(node)
            if isinstance(node, Coordinates) and isinstance(node.value, Quantized) and where:
                value = dataclasses.replace(where.value, partition=where.value.codes)
                where = dataclasses.replace(where, value=value)
        else:
            # The path in the state ends in that of the parameter.
            ends = (path[n:] for n in range(len(path) + 1))
            leaf: Any = next((by_path[end] for end in ends if end in by_path), None)
            partition, where = partition_of(leaf), None
            if partition is not None:
                partition = leaf_partition(partition, names_of(over), node, leaf.shape)
                if isinstance(node, Quantized):
                    node = dataclasses.replace(node, partition=partition)
                where = jax.tree.map(lambda _: partition, node)
        if where is None:
            return jax.tree.map(lambda _: whole, node)
        return jax.tree.map(lambda partition: partition.sharding(mesh), where)

    kinds = GaLoreState | Basis | Coordinates | Quantized
    return jax.tree_util.tree_map_with_path(
        at_node,
        jax.eval_shape(start, _unsharded(params)),
        is_leaf=lambda node: isinstance(node, kinds),
    )


def _unsharded(params: PyTree) -> PyTree:
    """The shapes and dtypes, without shardings."""
    shape = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
    return jax.tree.map(shape, params)
