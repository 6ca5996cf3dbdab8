"""Shardings of parameters: by rules, by their Flax boxes, and fully sharded data parallel."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galore_jax.ops.partition import MeshAxes, Partition, axes_of, names_of, placed
from galore_jax.optim.state import bases_of, galore_states
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.matrix_view import is_bias_or_scale, is_box, named_leaves
from galore_jax.subspace.projection import Projection
from galore_jax.subspace.rules import matches
from galore_jax.types import PyTree

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
            unused.pop(pattern or "", None)
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
