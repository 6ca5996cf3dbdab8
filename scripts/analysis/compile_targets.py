"""GPUs that programs can be compiled for on a machine without a GPU.

For such a target XLA compiles the same program, with the same assignment of memory, as on the card
itself, except that it cannot choose kernels by timing them.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galore_jax.errors import InputError
from galore_jax.types import PyTree

# Cards in a node, which are connected by a faster network than the nodes are.
NODE = 8


@dataclass(frozen=True)
class GpuTarget:
    """The properties of a card that the compiler needs.

    Attributes:
      name: as reported by the driver.
      compute_capability: major and minor version.
      cores: number of streaming multiprocessors.
      lanes: float32 units per core.
      threads: maximum number of threads per core.
      shared_memory: bytes per core.
      shared_memory_per_block: bytes that one block can request.
      memory: bytes.
      bandwidth: memory bandwidth in bytes per second.
      l2_cache: bytes.
      clock: GHz.
    """

    name: str
    compute_capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_memory: int
    shared_memory_per_block: int
    memory: int
    bandwidth: float
    l2_cache: int
    clock: float


TARGETS = {
    "a100": GpuTarget(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        cores=108,
        lanes=64,
        threads=2048,
        shared_memory=167936,
        shared_memory_per_block=166912,
        memory=80 * 2**30,
        bandwidth=2.039e12,
        l2_cache=40 * 2**20,
        clock=1.41,
    ),
    "rtx4090": GpuTarget(
        name="NVIDIA GeForce RTX 4090",
        compute_capability=(8, 9),
        cores=128,
        lanes=128,
        threads=1536,
        shared_memory=102400,
        shared_memory_per_block=101376,
        memory=24 * 2**30,
        bandwidth=1.008e12,
        l2_cache=72 * 2**20,
        clock=2.52,
    ),
    "h100": GpuTarget(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        cores=132,
        lanes=128,
        threads=2048,
        shared_memory=233472,
        shared_memory_per_block=232448,
        memory=84929347584,
        bandwidth=3.35232e12,
        l2_cache=50 * 2**20,
        clock=1.98,
    ),
}


@contextlib.contextmanager
def target(
    name: str,
    axes: Mapping[str, int] | None = None,
) -> Iterator[NamedSharding]:
    """A context that compiles for cards of one kind; nothing can be run in it.

        with target("rtx4090") as sharding:
            compiled = jax.jit(f).lower(*place(arguments, sharding)).compile()

    Enter it before JAX uses any other device: the CUDA plugin looks for a card when JAX starts.

    Args:
      name: a key of `TARGETS`.
      axes: names and sizes of the axes of a mesh of cards; None: a single card.

    Yields:
      The sharding of arrays that every card of the mesh has whole.

    Raises:
      InputError: there is no such target, or no CUDA compiler; more than `NODE` cards that do not
        fill their nodes.
    """
    if name not in TARGETS:
        raise InputError(f'there is no target "{name}": take one of {", ".join(TARGETS)}.')
    with _environment():
        mesh = _mesh(TARGETS[name], axes or {"device": 1})
        with jax.set_mesh(mesh):
            yield NamedSharding(mesh, PartitionSpec())


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays, or their shapes, as `jax.ShapeDtypeStruct`s with a sharding, for `lower`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets what the CUDA plugin needs without a card, and restores the environment afterwards."""
    before = dict(os.environ)
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_autotune_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".lstrip()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _mesh(gpu: GpuTarget, axes: Mapping[str, int]) -> Mesh:
    cards = math.prod(axes.values())
    nodes, left = divmod(cards, NODE) if cards > NODE else (1, 0)
    if left:
        raise InputError(
            f"{cards} cards do not fill nodes of {NODE}: choose a multiple of {NODE}, or fewer."
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_text(gpu), topology=f"1x{nodes}x{cards // nodes}"
        )
    except NotImplementedError as error:
        raise InputError(
            "no CUDA compiler was found: install galore-jax[cuda] on Python 3.12 or later, "
            "and start it before JAX uses another device."
        ) from error
    return Mesh(np.reshape(topology.devices, tuple(axes.values())), tuple(axes))


def _text(gpu: GpuTarget) -> str:
    """The card as the text of XLA's protocol buffer `GpuTargetConfigProto`."""
    major, minor = gpu.compute_capability
    properties = {
        # The same for all these cards.
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "shared_memory_per_block": 48 * 2**10,
        # The properties of this one.
        "shared_memory_per_block_optin": gpu.shared_memory_per_block,
        "shared_memory_per_core": gpu.shared_memory,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "clock_rate_ghz": gpu.clock,
        "l2_cache_size": gpu.l2_cache,
        "memory_bandwidth": int(gpu.bandwidth),
        "device_memory_size": gpu.memory,
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
    }
    lines = "\n".join(f"{key}: {value}" for key, value in properties.items())
    return (
        f"gpu_device_info {{\n{lines}\n}}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 7 }\n"
        "runtime_version { major: 13 }\n"
        f'device_description_str: "{gpu.name}"\n'
    )
