"""GPUs and TPUs that programs can be compiled for on a machine without one.

For such a target XLA compiles the same program, with the same assignment of memory, as on the
device itself, except that for a GPU it cannot choose kernels by timing them.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from analysis import gpus, tpus
from analysis.gpus import GPUS, Gpu
from analysis.tpus import TPUS, Tpu
from galore_jax.errors import require_choice
from galore_jax.types import PyTree

TARGETS: dict[str, Gpu | Tpu] = {**TPUS, **GPUS}


@contextlib.contextmanager
def target(
    name: str,
    axes: Mapping[str, int] | None = None,
) -> Iterator[NamedSharding]:
    """A context that compiles for devices of one kind; nothing can be run in it.

        with target("v6e") as sharding:
            compiled = jax.jit(f).lower(*place(arguments, sharding)).compile()

    Enter it before JAX uses any other device: plugins look for theirs when JAX starts.

    Args:
      name: a key of `TARGETS`.
      axes: names and sizes of the axes of a mesh; None: a single device.

    Yields:
      The sharding of arrays that every device of the mesh has whole.

    Raises:
      InputError: there is no such target, or no compiler for it; there is no machine of this number
        of devices.
    """
    require_choice("the target", name, TARGETS)
    axes = axes or {"device": 1}
    with _environment():
        devices = TARGETS[name].devices(math.prod(axes.values()))
        # On a TPU, neighbours in the mesh are neighbours in the slice.
        grid = create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
        mesh = Mesh(grid, tuple(axes))
        with jax.set_mesh(mesh):
            yield NamedSharding(mesh, PartitionSpec())


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays, or their shapes, as `jax.ShapeDtypeStruct`s with a sharding, for `lower`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets what the plugins need without a device, and restores the environment afterwards."""
    before = dict(os.environ)
    os.environ.update(tpus.ENVIRONMENT | gpus.ENVIRONMENT)
    flags = os.environ.get("XLA_FLAGS", "")
    new = [f"--{name}={value}" for name, value in gpus.FLAGS.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *new]).strip()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
