"""The section `[mesh]`, and where the arrays of a training lie on its mesh.

A batch is divided over the axes "data" and "fsdp", and so are activations. Parameters are divided
over "fsdp" as `galore_jax.shardings` decides, and over "tensor" by the rules of the task: of
attention and of the MLP, the first products are divided by columns and the last one by rows, so
that a sum at the end of each is all that the devices exchange.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import PositiveInt

from galore_jax.errors import InputError
from galore_jax.models.adapters import A, B
from galore_jax.settings import checked
from galore_jax.types import PyTree

if TYPE_CHECKING:
    from galore_jax.training.task import Task

P = PartitionSpec
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA, FSDP)
# The mesh axes of the logical axes of the models' activations.
ACTIVATIONS = (("batch", BATCH_AXES), ("heads", TENSOR), ("mlp", TENSOR))
Size = Literal[-1] | PositiveInt


@checked("mesh")
@dataclass(frozen=True)
class MeshConfig:
    """`[mesh]`: the devices of all processes, as a grid of data × fsdp × tensor.

    One of the three sizes may be -1, which takes the devices that the others leave.

    Attributes:
      data: parts of the batch with a complete copy of the weights each.
      fsdp: parts into which each of these is divided further, and with it the weights and the
        optimizer's state: a device stores its part of the weights and gathers a layer to use it.
      tensor: parts into which the products of a layer are divided, by heads and by columns of the
        MLP and of the vocabulary.
      shard_moments: whether the optimizer's moments are divided along `data` as well.

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
    fixed = {name: size for name, size in sizes.items() if size != -1}
    product, is_complete = math.prod(fixed.values()), len(fixed) == len(AXES)
    if devices % product or (is_complete and product != devices):
        raise InputError(
            f"{' × '.join(f'mesh.{name}' for name in fixed)} is {product}, but there are {devices} "
            f"devices: choose values whose product {'is' if is_complete else 'divides'} {devices}."
        )
    return {name: devices // product if size == -1 else size for name, size in sizes.items()}


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


def kernel_rules(by_columns: Sequence[str]) -> dict[Any, PartitionSpec]:
    """How the kernels and adapters of blocks are divided over the axis "tensor", by path.

    Args:
      by_columns: names of those that are divided by columns, as in "q" for `q_proj`.
    """
    return {
        re.compile(f"/({'|'.join(by_columns)})_proj/(kernel|{B})$"): P(None, None, TENSOR),
        re.compile(f"/(o|down)_proj/(kernel|{A})$"): P(None, TENSOR, None),
    }


def check_training_mesh(task: "Task", mesh: Mesh | None) -> None:
    """Checks that a training can be divided over the mesh.

    Raises:
      InputError: the batch or the model cannot be divided over it, or weights are in 8 bits.
    """
    if mesh is None:
        return
    if mesh.size > 1 and getattr(task.config.model, "weights", "plain") == "int8":
        raise InputError(
            'model.weights = "int8" is for one device: set it to "plain", or show JAX one device '
            "(CUDA_VISIBLE_DEVICES)."
        )
    batch_size, parts = task.config.data.batch_size, task.config.training.accumulation
    rows, devices = batch_size // parts, math.prod(mesh.shape[name] for name in BATCH_AXES)
    if rows % devices:
        raise InputError(
            f"mesh.data × mesh.fsdp is {devices}, which does not divide data.batch_size / "
            f"training.accumulation, {rows} rows: choose others."
        )
    for name, size in task.sizes.items():
        if size % mesh.shape[TENSOR]:
            raise InputError(
                f"mesh.tensor is {mesh.shape[TENSOR]}, which does not divide the model's {name}, "
                f"{size}: choose a divisor of {math.gcd(*task.sizes.values())}."
            )


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
    put = lambda rows: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
    return {name: put(rows) for name, rows in batch.items()}


def data_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The axes that divide the batch into shards, for each of which the loss is traced."""
    return (DATA,) if mesh is not None and mesh.shape[DATA] > 1 else ()


def whole(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of arrays that each device has all of; for `jax.jit` also without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """A context in which functions are traced for a mesh.

    In it, the models' activations lie as `ACTIVATIONS` says.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATIONS):
        yield
