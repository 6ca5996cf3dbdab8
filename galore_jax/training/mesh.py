"""Where the arrays of a training lie: the section `[mesh]`, and the layout on the mesh it makes.

A batch is divided over the axes "data" and "fsdp", and so are activations. Parameters are divided
over "fsdp" as `galore_jax.shardings` decides, and over "tensor" by the rules of the task: one of
the two products of attention and of the MLP is cut by columns, the other by rows, so that a sum at
the end of each is all that the devices exchange.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import PositiveInt

from galore_jax.errors import InputError
from galore_jax.grads.data_parallel import needs_whole_embeddings
from galore_jax.models.adapters import A, Adapter, B
from galore_jax.settings import checked
from galore_jax.subspace.matrix_view import path_names
from galore_jax.types import PyTree

if TYPE_CHECKING:
    from galore_jax.training.task import Task

P = PartitionSpec
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA, FSDP)
Size = Literal[-1] | PositiveInt


@checked("mesh")
@dataclass(frozen=True)
class MeshConfig:
    """`[mesh]`: the devices of all processes, as a grid of data × fsdp × tensor.

    One of the three sizes may be -1, which takes the devices that the others leave.

    Attributes:
      data: parts of the batch with a complete copy of the weights each.
      fsdp: parts into which each of these parts of the batch is divided further, and the weights
        and the optimizer's state with it: a device stores its part of the weights only and gathers
        a layer when it computes with it.
      tensor: parts into which the products of a layer are divided: whole heads, columns of the MLP
        and of the vocabulary.
      shard_moments: also divide the optimizer's moments along `data`.

    Raises:
      InputError: a value out of range, or more than one -1.
    """

    data: Size = -1
    fsdp: Size = 1
    tensor: Size = 1
    shard_moments: bool = False

    def __post_init__(self):
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            free = [f"mesh.{name}" for name in AXES if getattr(self, name) == -1]
            raise InputError(
                f"{' and '.join(free)} are -1, but only one size can take what the others leave: "
                f"set {free[0]} = 1, or to the number of devices that you want."
            )


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis of a mesh of this number of devices.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = {name: size for name, size in sizes.items() if size != -1}
    product = math.prod(fixed.values())
    names = " × ".join(f"mesh.{name}" for name in fixed)
    if devices % product or (product != devices and not free):
        raise InputError(
            f"{names} is {product}, but there are {devices} devices: choose values whose product "
            f"{'divides' if free else 'is'} {devices}."
        )
    return sizes | dict.fromkeys(free, devices // product)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of devices, by default of all; None for a single device, which needs none.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    number = jax.device_count() if devices is None else len(devices)
    sizes = mesh_sizes(config, number)
    if number == 1:
        return None
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def kernel_rules(adapter: Adapter | None, by_columns: Sequence[str]) -> dict[str, PartitionSpec]:
    """How the kernels and adapters of blocks are divided over the axis "tensor", by glob of paths.

    Args:
      adapter: of all kernels.
      by_columns: names of those that are divided by columns, as in "q" for `q_proj`.
    """
    by_rows, rules = ("o", "down"), {}
    if adapter is None or adapter.has_kernel:
        rules |= {f"*/{name}_proj/kernel": P(None, None, TENSOR) for name in by_columns}
        rules |= {f"*/{name}_proj/kernel": P(None, TENSOR, None) for name in by_rows}
    if adapter is not None:
        rules |= {f"*/{name}_proj/{B}": P(None, None, TENSOR) for name in by_columns}
        rules |= {f"*/{name}_proj/{A}": P(None, TENSOR, None) for name in by_rows}
    return rules


def training_mesh(task: "Task") -> Mesh | None:
    """The mesh of a training on all devices; None for a single device.

    Raises:
      InputError: the mesh does not have as many devices as there are, or `check_training_mesh`.
    """
    mesh = make_mesh(task.config.mesh)
    check_training_mesh(task, mesh)
    return mesh


def check_training_mesh(task: "Task", mesh: Mesh | None) -> None:
    """Checks that a training can be divided over a mesh.

    Raises:
      InputError: the rows of a micro-batch cannot be divided among the devices, or the heads, the
        MLP or the vocabulary cannot.
    """
    if mesh is None:
        return
    batch_size, parts = task.config.data.batch_size, task.config.training.accumulation
    rows, divided = batch_size // parts, math.prod(mesh.shape[name] for name in BATCH_AXES)
    if rows % divided:
        raise InputError(
            f"mesh.data × mesh.fsdp is {divided}, which does not divide data.batch_size / "
            f"training.accumulation, {rows} rows: choose others."
        )
    for name, size in task.sizes.items():
        if size % mesh.shape[TENSOR]:
            raise InputError(
                f"mesh.tensor is {mesh.shape[TENSOR]}, which does not divide model.{name}, {size}: "
                f"choose a divisor of {math.gcd(*task.sizes.values())}."
            )


def moment_axes(config: MeshConfig, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the optimizer's moments are divided, besides those of the parameters."""
    return (DATA,) if config.shard_moments and mesh.shape[DATA] > 1 else ()


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """The shapes with these shardings, in the tree of the shardings."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    ]
    return jax.tree.structure(shardings).unflatten(leaves)


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of a batch's arrays, (rows, length)."""
    return None if mesh is None else NamedSharding(mesh, P(BATCH_AXES))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Puts the rows of a batch, which every process has, on the devices that they belong to."""
    sharding = batch_sharding(mesh)
    if sharding is None:
        return dict(batch)

    def put(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return {name: put(rows) for name, rows in batch.items()}


def data_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The axes over which the batch is cut into shards, for each of which the loss is traced."""
    return (DATA,) if mesh is not None and mesh.shape[DATA] > 1 else ()


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that each device has all of."""
    return NamedSharding(mesh, P())


def jit_on(mesh: Mesh | None, f: Callable[..., Any], out: Any = None, **options: Any) -> Any:
    """`jax.jit` of a function on a mesh, in which XLA chooses how intermediate arrays lie.

    Args:
      mesh: None: a single device.
      f: the function; call or lower the result inside `on_mesh`.
      out: the shardings of its results; None: each device gets all of them.
      options: of `jax.jit`.
    """
    if mesh is None:
        return jax.jit(f, **options)
    out = whole(mesh) if out is None else out
    return jax.jit(f, out_shardings=out, **options)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """A context in which functions are traced for a mesh.

    In it, the models' activations lie as this module says, by `nn.with_logical_constraint`.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(_rules(BATCH_AXES)):
        yield


def _rules(batch_axes: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The mesh axes of the models' logical axes."""
    return [("batch", batch_axes), ("heads", TENSOR), ("mlp", TENSOR)]


def per_shard(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of parameters and a batch, also inside a `shard_map` over some of the batch's axes.

    There a sharding may name the other axes only, and an embedding may have to be whole.
    """

    def shard_loss(params: PyTree, *batch: Any) -> Any:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if not manual:
            return loss(params, *batch)
        if needs_whole_embeddings():
            params = jax.tree_util.tree_map_with_path(_whole_embedding, params)
        free = tuple(name for name in BATCH_AXES if name not in manual)
        with nn.logical_axis_rules(_rules(free)):
            return loss(params, *batch)

    return shard_loss


def _whole_embedding(path: Any, leaf: jax.Array) -> jax.Array:
    if path_names(path)[-1] != "embedding":
        return leaf
    return jax.lax.with_sharding_constraint(leaf, P())
