"""The mean of a function over shards of a batch, with a single reduction at the end."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from galore_jax.grads.micro_batches import check_rows, has_mean
from galore_jax.ops.partition import MeshAxes, Partition
from galore_jax.ops.precision import widened
from galore_jax.optim.galore_state import Unprojected, is_parameter
from galore_jax.subspace.basis import is_basis
from galore_jax.subspace.matrix_view import is_head, path_names, unboxed
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
      ValueError: there is no mesh with these axes, or they do not divide the batch (see
        `check_rows`).
    """
    if not data_axes:
        return f(operands, *batch)
    mesh = _mesh(data_axes, operands)
    count = math.prod(mesh.shape[axis] for axis in data_axes)
    if count == 1:
        return f(operands, *batch)
    check_rows(batch, count, "shards")

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

    def mean(node: Any) -> Any:
        axis = _scattered_axis(node, data_axes)
        if axis is None:
            average = lambda x: lax.pmean(widened(x), data_axes) if has_mean(x) else x
            return jax.tree.map(average, node)
        total = lax.psum_scatter(node.value, data_axes, scatter_dimension=axis, tiled=True)
        return Coordinates(total / count, node.projection)

    def out_spec(node: Any) -> PartitionSpec:
        axis = _scattered_axis(node, data_axes)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, data_axes)

    def means(operands: PyTree, *shard: Any) -> PyTree:
        return jax.tree.map(mean, f(operands, *shard), is_leaf=is_coordinates)

    shapes = jax.eval_shape(on_shards(f, PartitionSpec()), operands, *batch)
    out_specs = jax.tree.map(out_spec, shapes, is_leaf=is_coordinates)
    return on_shards(means, out_specs)(operands, *batch)


def leaves_of(kind: Any, tree: PyTree) -> tuple[dict[int, Any], Callable[[Any], PyTree]]:
    """The leaves of one type, by their number, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    found = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kind)}
    put = lambda new: structure.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])
    return found, put


def needs_whole_embeddings() -> bool:
    """Whether a lookup in a divided embedding would fail here: in a shard with several mesh axes.

    XLA (as of jaxlib 0.12) ends the process when it divides a lookup over some, but not all, of the
    axes that a `shard_map` leaves to it. It does so, whatever divides the embedding, if the lookup
    has more indices than the embedding has rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
    return bool(mesh.manual_axes) and len(free) > 1


def whole_embeddings(params: PyTree, bases: PyTree) -> PyTree:
    """Makes unprojected parameters but for heads whole where that is needed.

    A head is multiplied, and its product may be divided.
    """
    if not needs_whole_embeddings():
        return params

    def at_leaf(path: Any, node: Any, leaf: Any) -> Any:
        if not isinstance(node, Unprojected) or is_head(path_names(path)):
            return leaf
        return Partition(node.partition.mesh, ((),) * len(leaf.shape)).constrain(leaf)

    boxed = jax.tree.structure(params)
    leaves = jax.tree_util.tree_map_with_path(at_leaf, bases, unboxed(params), is_leaf=is_parameter)
    return jax.tree.unflatten(boxed, jax.tree.leaves(leaves))


def _scattered_axis(node: Any, data_axes: MeshAxes) -> int | None:
    """The axis along which coordinates are divided over these mesh axes, and over no others."""
    if not is_coordinates(node):
        return None
    partition = coordinates_partition(node.projection)
    if partition is None or partition.used != data_axes:
        return None
    return partition.axes.index(data_axes) if data_axes in partition.axes else None


def _mesh(data_axes: MeshAxes, tree: PyTree) -> Mesh | AbstractMesh:
    """The mesh of the context, of the parameters, or else the one that the state knows."""
    meshes: list[Mesh | AbstractMesh] = [jax.sharding.get_abstract_mesh()]
    for leaf in jax.tree.leaves(tree):
        sharding = jax.typeof(leaf).sharding
        meshes += [sharding.mesh] if isinstance(sharding, NamedSharding) else []
    for basis in jax.tree.leaves(tree, is_leaf=is_parameter):
        if isinstance(basis, Unprojected):
            meshes.append(basis.partition.mesh)
        elif is_basis(basis) and basis.projection.partition is not None:
            meshes.append(basis.projection.partition.mesh)
            for axis in set(data_axes) & set(basis.projection.partition.used):
                raise ValueError(
                    f'data_axes: the mesh axis "{axis}" divides the parameter '
                    f"{basis.projection.name}, which every shard needs whole: name only axes that "
                    "divide the batch alone."
                )
    for mesh in meshes:
        if set(data_axes) <= set(mesh.axis_names):
            return mesh
    raise ValueError(
        f"data_axes: there is no mesh with the axes {', '.join(data_axes)}: place the parameters "
        "on it before galore_jax.init, or enter it by jax.set_mesh."
    )
