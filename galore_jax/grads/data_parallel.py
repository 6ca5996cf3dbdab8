"""The mean of a function over shards of a batch, with a single reduction at the end."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.grads.micro_batches import check_rows, has_mean
from galore_jax.ops.partition import MeshAxes, meshes_of
from galore_jax.ops.precision import widened
from galore_jax.subspace.basis import is_basis
from galore_jax.subspace.matrix_view import is_embedding, path_names
from galore_jax.subspace.placement import coordinates_partition
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


def mean_over_shards(
    f: Callable[..., PyTree], data_axes: MeshAxes, operands: PyTree, *batch: Any
) -> PyTree:
    """The mean of `f(operands, *shard)` over shards of the batch; without axes `f` of all of it.

    Other mesh axes than these stay as they are, so parameters may be divided over them.

    Args:
      f: returns arrays or `Coordinates`.
      data_axes: mesh axes that divide the first axis of each array of the batch.
      operands: arrays that are the same in all shards.
      *batch: arrays (B, …).

    Returns:
      The mean, in float32 or wider, and of a single shard what `f` returns. Leaves without one (see
      `has_mean`) are those of some shard. `Coordinates` that are divided over the same axes are
      reduced and scattered in one operation.

    Raises:
      ValueError: there is no mesh with these axes, or they divide a parameter or do not divide the
        batch (see `check_rows`).
    """
    if not data_axes:
        return f(operands, *batch)
    for basis in filter(is_basis, jax.tree.leaves(operands, is_leaf=is_basis)):
        partition, name = basis.projection.partition, basis.projection.name
        if partition is not None and (taken := set(data_axes) & set(partition.used)):
            raise ValueError(
                f'data_axes: the mesh axis "{min(taken)}" divides the parameter {name}, which '
                "every shard needs whole: name only axes that divide the batch alone."
            )
    meshes = [mesh for mesh in meshes_of(operands) if set(data_axes) <= set(mesh.axis_names)]
    if not meshes:
        raise ValueError(
            f"data_axes: there is no mesh with the axes {', '.join(data_axes)}: place the "
            "parameters on it before galore_jax.init, or enter it by jax.set_mesh."
        )
    mesh = meshes[0]
    count = math.prod(mesh.shape[axis] for axis in data_axes)
    if count == 1:
        return f(operands, *batch)
    check_rows(batch, count, "shards")

    def scattered_axis(node: Any) -> int | None:
        """The axis of coordinates that the data axes divide, if no others divide them."""
        where = coordinates_partition(node.projection) if is_coordinates(node) else None
        if where is None or where.used != data_axes or data_axes not in where.axes:
            return None
        return where.axes.index(data_axes)

    def mean(node: Any) -> Any:
        axis = scattered_axis(node)
        if axis is None:
            average = lambda x: lax.pmean(widened(x), data_axes) if has_mean(x) else x
            return jax.tree.map(average, node)
        total = lax.psum_scatter(node.value, data_axes, scatter_dimension=axis, tiled=True)
        return Coordinates(total / count, node.projection)

    def out_spec(node: Any) -> PartitionSpec:
        axis = scattered_axis(node)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, data_axes)

    def on_shards(f: Callable[..., PyTree], out_specs: PyTree) -> Callable[..., PyTree]:
        sharded = jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(PartitionSpec(data_axes) for _ in batch)),
            out_specs=out_specs,
            axis_names=set(data_axes),
            # The means make the results equal on all devices, whatever the loss does in between.
            check_vma=False,
        )
        # Compiled, because JAX cannot run it op by op if other axes divide an array.
        return jax.jit(sharded)

    shapes = jax.eval_shape(on_shards(f, PartitionSpec()), operands, *batch)
    out_specs = jax.tree.map(out_spec, shapes, is_leaf=is_coordinates)

    def means(operands: PyTree, *shard: Any) -> PyTree:
        found = f(whole_embeddings(operands), *shard)
        return jax.tree.map(mean, found, is_leaf=is_coordinates)

    return on_shards(means, out_specs)(operands, *batch)


def leaves_of(kind: Any, tree: PyTree) -> tuple[dict[int, Any], Callable[[Any], PyTree]]:
    """The leaves of one type, by their number, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    found = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kind)}
    put = lambda new: structure.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])
    return found, put


def whole_embeddings(operands: PyTree) -> PyTree:
    """The operands of a shard, with whole embeddings if several mesh axes are left to XLA.

    XLA (as of jaxlib 0.12) ends the process when it divides a lookup over some, but not all, of the
    axes that a `shard_map` leaves to it. It does so, whatever divides the embedding, if the lookup
    has more indices than the embedding has rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if sum(mesh.shape[name] > 1 for name in mesh.auto_axes) < 2:
        return operands

    def at_leaf(path: Any, leaf: Any) -> Any:
        is_whole = is_embedding(path_names(path))
        return lax.with_sharding_constraint(leaf, PartitionSpec()) if is_whole else leaf

    return jax.tree_util.tree_map_with_path(at_leaf, operands)
