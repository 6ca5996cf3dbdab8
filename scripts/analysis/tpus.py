"""TPUs as their compiler, libtpu, needs to know them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from jax.experimental import topologies

from galore_jax.errors import InputError

# Chips of a host, which a slice of more than these must fill.
HOST = 4
# What a machine with TPUs has in its environment, so that libtpu does not look for it; and leave to
# load it in more than one process, of which none uses a TPU.
ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Tpu:
    """The properties of a chip with one device.

    Attributes:
      name: for readers.
      generation: as libtpu names it.
      dimensions: of the torus of a slice, 2 or 3.
      memory: bytes of HBM.
      usable: bytes of it that the compiler gives to a program.
      bandwidth: of HBM, in bytes per second.
      clock: cycles per second of the core in which the compiler estimates the time of instructions;
        it is not published for all of them.
      peak: bfloat16 products, operations a second.
    """

    name: str
    generation: str
    dimensions: int
    memory: int
    usable: int
    bandwidth: float
    clock: float
    peak: float

    @property
    def taken(self) -> int:
        """Bytes of memory that JAX takes by default."""
        return self.usable

    def devices(self, number: int) -> Sequence[Any]:
        """Absent chips of a slice, in the order of their coordinates.

        Raises:
          InputError: libtpu is missing, or there is no slice of this number of chips.
        """
        shape = slice_shape(number, self.dimensions)
        if find_spec("libtpu") is None:
            raise InputError("no TPU compiler was found: install galore-jax[tpu].")
        # A slice within a host has the bounds of a smaller host.
        bounds = tuple((*shape, 1)[:3]) if number < HOST else (2, 2, 1)
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{self.generation}:{'x'.join(map(str, shape))}",
            chips_per_host_bounds=bounds,
        ).devices


def slice_shape(number: int, dimensions: int) -> tuple[int, ...]:
    """The shape of a slice of this number of chips: powers of two, as equal as possible.

    Raises:
      InputError: the number is not a power of two.
    """
    if number.bit_count() != 1:
        raise InputError(f"{number} chips make no slice: take 1, 2, 4, 8, …")
    shape, power = [1] * dimensions, int(math.log2(number))
    if number <= HOST:  # Hosts have 2 × 2 chips, in a plane of the torus.
        shape[:2] = 1 << power // 2, 1 << (power + 1) // 2
    else:
        parts = [(power + place) // dimensions for place in range(dimensions)]
        shape = [1 << part for part in parts]
    return tuple(shape)


TPUS = {
    "v5e": Tpu(
        name="TPU v5e",
        generation="v5e",
        dimensions=2,
        memory=16 * 2**30,
        usable=int(15.75 * 2**30),
        bandwidth=0.82e12,
        clock=1.5e9,
        peak=197e12,
    ),
    "v5p": Tpu(
        name="TPU v5p",
        generation="v5p",
        dimensions=3,
        memory=96 * 2**30,
        usable=int(95.74 * 2**30),
        bandwidth=2.765e12,
        clock=1.75e9,
        peak=459e12,
    ),
    "v6e": Tpu(
        name="TPU v6e",
        generation="v6e",
        dimensions=2,
        memory=32 * 2**30,
        usable=int(31.25 * 2**30),
        bandwidth=1.64e12,
        clock=1.75e9,
        peak=918e12,
    ),
}
