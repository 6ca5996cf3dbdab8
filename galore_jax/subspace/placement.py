"""Where the basis, the coordinates and the moments of a parameter lie on a mesh.

Everything follows from the partition of the parameter itself, by two rules. All mesh axes that
divide the parameter divide its basis along the long axis, so that a device can compute its share of
`PᵀP` or `PᵀG` with a sum of r × r numbers as the only communication, and its coordinates along the
axis that the projection keeps, so that a device has just the columns of N that its part of the
update `P N` needs. What does not divide these axes divides the rank instead. The mesh axes that the
moments are divided over in addition (ZeRO-1, arXiv 1910.02054) divide the rank first: the others
then stay where the lift needs them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractMesh

from galore_jax.ops.partition import MeshAxes, Partition
from galore_jax.ops.quantization import Quantized, block_size
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Coordinates, Projection, Side
from galore_jax.types import PyTree


def placed(
    mesh: AbstractMesh,
    shape: Sequence[int],
    wanted: Iterable[tuple[str, Sequence[int]]],
    *,
    start: Sequence[MeshAxes] | None = None,
    block: tuple[int, int] = (-1, 1),
) -> Partition:
    """Places mesh axes one after the other, each on the first axis of an array that it divides.

    Args:
      mesh: the mesh.
      shape: shape of the array.
      wanted: mesh axes, each with the axes of the array to try, in this order. One that divides
        none of them is left out, as is one that is already placed or of size 1.
      start: the mesh axes that are already placed, for each axis of the array.
      block: an axis, counted from the end, whose parts must be multiples of the second number, or
        the whole axis.
    """
    axes: list[MeshAxes] = [()] * len(shape) if start is None else [*start]
    axis_of_blocks, size = block
    for name, places in wanted:
        if mesh.shape[name] == 1 or any(name in names for names in axes):
            continue
        for place in places:
            parts = math.prod(mesh.shape[other] for other in (*axes[place], name))
            multiple = size if place == len(shape) + axis_of_blocks else 1
            if shape[place] % (parts * multiple) == 0:
                axes[place] = (*axes[place], name)
                break
    return Partition(mesh, tuple(axes))


def matrices_partition(projection: Projection) -> Partition | None:
    """The partition of the parameter as matrices, `(*batch, in, out)`."""
    if projection.partition is None:
        return None
    axes, view = projection.partition.axes, projection.view

    def merged(side: Sequence[int]) -> MeshAxes:
        # Parts of a merged axis are contiguous only if its first axis alone is divided.
        return () if any(axes[axis] for axis in side[1:]) else axes[side[0]]

    batch = tuple(axes[axis] for axis in view.batch_axes)
    sides = merged(view.in_axes), merged(view.out_axes)
    return Partition(projection.partition.mesh, (*batch, *sides))


def coordinates_partition(
    projection: Projection, block: tuple[int, int] = (-1, 1)
) -> Partition | None:
    """The partition of coordinates and moments, `(*batch, rows, columns)`.

    Args:
      projection: how the parameter is projected.
      block: as for `placed`.
    """
    matrices = matrices_partition(projection)
    if matrices is None:
        return None
    *batch, rows, columns = matrices.axes
    names, kept, rank = (*rows, *columns), len(batch), len(batch) + 1
    if "left" in projection.sides:
        names, kept, rank = (*columns, *rows), rank, kept
    wanted = [(name, (kept, rank)) for name in names]
    wanted += [(name, (rank, kept)) for name in projection.over]
    shape = projection.coordinates_shape
    return placed(matrices.mesh, shape, wanted, start=(*batch, (), ()), block=block)


def leaf_partition(partition: Partition, over: MeshAxes, value: Any, shape: Any) -> Partition:
    """The partition of what an optimizer keeps for a leaf that is not projected.

    Args:
      partition: of the leaf.
      over: further mesh axes that divide its moments, preferably along an axis that no other
        divides.
      value: an array or `Quantized` in the state.
      shape: shape of the leaf.
    """
    mesh, everywhere, block = partition.mesh, tuple(range(len(shape))), _block_of(value)
    wanted = [
        (name, (axis, *everywhere)) for axis, names in enumerate(partition.axes) for name in names
    ]
    moments = placed(mesh, shape, wanted, block=block)
    undivided_first = sorted(everywhere, key=lambda axis: bool(moments.axes[axis]))
    wanted = [(name, undivided_first) for name in over]
    return _of_shape(placed(mesh, shape, wanted, start=moments.axes, block=block), shape, value)


def partitions(node: Basis | Coordinates) -> Any:
    """The node with a `Partition` in place of each array; that of the parameter must be known.

    Coordinates may be a moment, or the factors of one.
    """
    projection = node.projection
    everywhere = lambda stored, partition: jax.tree.map(lambda _: partition, stored)
    if isinstance(node, Basis):
        matrices: Any = matrices_partition(projection)
        mesh, (*batch, rows, columns) = matrices.mesh, matrices.axes

        def vectors_partition(side: Side) -> Partition:
            names = (*rows, *columns) if side == "left" else (*columns, *rows)
            wanted = [(name, (len(batch),)) for name in names]
            return placed(mesh, projection.basis_shapes[side], wanted, start=(*batch, (), ()))

        # Counters have the batch axes; the settings are scalars, shared by all matrices.
        counters = Partition(mesh, tuple(batch))
        rest = jax.tree.map(lambda leaf: counters.trailing(leaf.ndim), replace(node, vectors={}))
        vectors = {side: everywhere(v, vectors_partition(side)) for side, v in node.vectors.items()}
        return replace(rest, vectors=vectors)
    if not hasattr(node.value, "shape"):  # A masked moment has none.
        return node
    whole: Any = coordinates_partition(projection, _block_of(node.value))
    partition = _of_shape(whole, projection.coordinates_shape, node.value)
    return replace(node, value=everywhere(node.value, partition))


def constrain(tree: PyTree) -> PyTree:
    """Puts the bases and coordinates in a tree where they belong; other nodes are unchanged."""

    def at_node(node: Any) -> Any:
        if not isinstance(node, Basis | Coordinates) or node.projection.partition is None:
            return node

        def put(partition: Partition, array: jax.Array) -> jax.Array:
            is_counter = isinstance(node, Basis) and array.ndim <= len(node.projection.view.batch)
            # XLA may choose where counters lie that no axis divides.
            return array if is_counter and not partition.used else partition.constrain(array)

        return jax.tree.map(put, partitions(node), node)

    return jax.tree.map(at_node, tree, is_leaf=lambda node: isinstance(node, Basis | Coordinates))


def _of_shape(partition: Partition, shape: tuple[int, ...], value: Any) -> Partition:
    """The partition of an array that may lack one or both of the last two axes of `shape`.

    The former are factored moments, the latter numbers for each matrix. Others are not divided.
    """
    axes = partition.axes
    known = {
        shape[:-2]: axes[:-2],
        (*shape[:-2], *shape[-1:]): (*axes[:-2], *axes[-1:]),
        shape[:-1]: axes[:-1],
        shape: axes,
    }
    return Partition(partition.mesh, known.get(value.shape, ((),) * len(value.shape)))


def _block_of(value: Any) -> tuple[int, int]:
    """The axis of a moment along which so many elements must stay together."""
    if not isinstance(value, Quantized):
        return -1, 1
    return value.axis, block_size(value.shape[value.axis])
