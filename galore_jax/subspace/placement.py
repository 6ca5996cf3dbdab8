"""Where the basis, the coordinates, the moments and the counters of a parameter lie on a mesh.

Everything follows from the partition of the parameter itself, by two rules. All mesh axes that
divide the parameter divide its basis along the long axis, so that a device can compute its share of
`PᵀP` or `PᵀG` with a sum of r × r numbers as the only communication, and its coordinates along the
axis that the projection keeps, so that a device has just the columns of N that its part of the
update `P N` needs. What does not divide these axes divides the rank instead. The mesh axes that the
moments are divided over in addition (ZeRO-1, arXiv 1910.02054) divide the rank first: the others
then stay where the lift needs them.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from galore_jax.ops.partition import MeshAxes, Partition, constrained, placed
from galore_jax.ops.quantization import BLOCK, Quantized
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Coordinates, Projection, Side


def matrices_partition(projection: Projection) -> Partition | None:
    """The partition of the parameter as matrices, `(*batch, in, out)`."""
    if projection.partition is None:
        return None
    axes, view = projection.partition.axes, projection.view

    def merged(side: Sequence[int]) -> MeshAxes:
        # Parts of a merged axis are contiguous only if its first axis alone is divided.
        return () if any(axes[axis] for axis in side[1:]) else axes[side[0]]

    batch = tuple(axes[axis] for axis in view.batch_axes)
    return Partition(
        projection.partition.mesh, (*batch, merged(view.in_axes), merged(view.out_axes))
    )


def basis_partition(projection: Projection, side: Side) -> Partition | None:
    """The partition of basis vectors, `(*batch, in or out, r)`."""
    matrices = matrices_partition(projection)
    if matrices is None:
        return None
    *batch, rows, columns = matrices.axes
    names = (*rows, *columns) if side == "left" else (*columns, *rows)
    shape = projection.basis_shapes[side]
    wanted = [(name, (len(batch),)) for name in names]
    return placed(matrices.mesh, shape, wanted, start=(*batch, (), ()))


def coordinates_partition(projection: Projection, block: int = 1) -> Partition | None:
    """The partition of coordinates and moments, `(*batch, rows, columns)`.

    Args:
      projection: how the parameter is projected.
      block: number of columns that must stay together.
    """
    matrices = matrices_partition(projection)
    if matrices is None:
        return None
    *batch, rows, columns = matrices.axes
    row_axis, column_axis = len(batch), len(batch) + 1
    left = "left" in projection.sides
    kept, rank = (column_axis, row_axis) if left else (row_axis, column_axis)
    names = (*columns, *rows) if left else (*rows, *columns)
    wanted = [(name, (kept, rank)) for name in names]
    wanted += [(name, (rank, kept)) for name in projection.over]
    shape = projection.coordinates_shape
    return placed(matrices.mesh, shape, wanted, start=(*batch, (), ()), block=block)


def constrain_coordinates(node: Any) -> Any:
    """Puts float32 coordinates where `coordinates_partition` says; other nodes are unchanged."""
    if not isinstance(node, Coordinates):
        return node
    partition = coordinates_partition(node.projection)
    return node if partition is None else replace(node, value=partition.constrain(node.value))


def constrain_basis(basis: Basis) -> Basis:
    """Puts basis vectors where `basis_partition` says."""
    projection = basis.projection
    if projection.partition is None:
        return basis
    vectors = {
        side: jax.tree.map(
            partial(constrained, partition=basis_partition(projection, side)), stored
        )
        for side, stored in basis.vectors.items()
    }
    return replace(basis, vectors=vectors)


def counters_partition(projection: Projection) -> Partition | None:
    """The partition of what a basis has one number of for each matrix, `(*batch,)`."""
    matrices = matrices_partition(projection)
    return None if matrices is None else Partition(matrices.mesh, matrices.axes[:-2])


def moment_partition(node: Coordinates) -> Partition | None:
    """The partition of a moment, or of the factors of one: `(*batch, rows)`, `(*batch, columns)`.

    A number for each matrix, `(*batch,)`, lies where the counters do. Arrays of other shapes are
    not divided.
    """
    projection, value = node.projection, node.value
    if value.shape == projection.view.batch:
        return counters_partition(projection)
    coordinates = coordinates_partition(projection, block_of(value))
    if coordinates is None:
        return None
    mesh, shape = coordinates.mesh, projection.coordinates_shape
    *batch, rows, columns = coordinates.axes
    if value.shape == shape:
        return coordinates
    if value.shape == shape[:-1]:
        return Partition(mesh, (*batch, rows))
    if value.shape == (*shape[:-2], shape[-1]):
        return Partition(mesh, (*batch, columns))
    if value.shape[-2:] == shape[-2:]:  # The matrices of all batch axes, in one.
        return Partition(mesh, ((),) * (value.ndim - 2) + (rows, columns))
    return Partition(mesh, ((),) * value.ndim)


def leaf_partition(partition: Partition, over: MeshAxes, value: Any, shape: Any) -> Partition:
    """The partition of what an optimizer keeps for a leaf that is not projected.

    Args:
      partition: of the leaf.
      over: further mesh axes that divide its moments.
      value: an array or `Quantized` in the state.
      shape: shape of the leaf.

    Returns:
      For arrays of the leaf's shape that of the leaf, with `over` preferably on an axis that is not
      divided yet; for factored moments, which lack one of the last two axes, the same without it.
      Arrays of other shapes are not divided.
    """
    everywhere = tuple(range(len(shape)))
    wanted = [
        (name, (axis, *everywhere)) for axis, names in enumerate(partition.axes) for name in names
    ]
    moments = placed(partition.mesh, shape, wanted, block=block_of(value))
    free_first = sorted(everywhere, key=lambda axis: bool(moments.axes[axis]))
    wanted = [(name, free_first) for name in over]
    moments = placed(partition.mesh, shape, wanted, start=moments.axes, block=block_of(value))
    if value.shape == shape:
        return moments
    for gone in (-1, -2):
        if len(shape) >= 2 and value.shape == tuple(_without(shape, gone)):
            return Partition(partition.mesh, tuple(_without(moments.axes, gone)))
    return Partition(partition.mesh, ((),) * len(value.shape))


def block_of(value: Any) -> int:
    """Number of elements along the last axis of a moment that must stay together."""
    return min(BLOCK, value.shape[-1]) if isinstance(value, Quantized) else 1


def _without(items: Sequence[Any], index: int) -> list[Any]:
    return [item for i, item in enumerate(items) if i != index % len(items)]
