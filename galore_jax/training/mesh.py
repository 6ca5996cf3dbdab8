"""The section `[mesh]`: how the devices of all processes are arranged for a training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh
from pydantic import PositiveInt

from galore_jax.errors import InputError
from galore_jax.settings import checked

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
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
    if free and devices % product:
        raise InputError(
            f"{names} is {product}, which does not divide the number of devices, {devices}: choose "
            f"values whose product is {any_of(divisors(devices))}."
        )
    if not free and product != devices:
        raise InputError(
            f"{names} is {product}, but the number of devices is {devices}: choose values whose "
            f"product is {devices}, or set mesh.data = -1 and values whose product divides it."
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


def divisors(number: int) -> list[int]:
    """All positive integers that divide a positive one."""
    return [size for size in range(1, number + 1) if number % size == 0]


def any_of(values: list[int]) -> str:
    """As in "1, 2 or 4"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
