"""NVIDIA GPUs as XLA's compiler needs to know them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from galore_jax.errors import InputError

# Cards in a node, which are connected by a faster network than the nodes are.
NODE = 8
# The fraction of a card's memory that JAX allocates by default, and the one that it can be told to
# allocate: the rest is for the driver and the CUDA context.
JAX_FRACTION, MAX_FRACTION = 0.75, 0.95
# XLA would log each program that does not fit as an error, between the lines of a table.
ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
# Without a card the compiler cannot choose kernels by timing them.
FLAGS = {"xla_gpu_autotune_level": "0"}


@dataclass(frozen=True)
class Gpu:
    """The properties of a card.

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
      peak: dense bfloat16 products, operations a second; the compiler does not need it.
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
    peak: float

    @property
    def usable(self) -> float:
        """Bytes of memory that JAX can take."""
        return MAX_FRACTION * self.memory

    @property
    def taken(self) -> float:
        """Bytes of memory that JAX takes by default."""
        return JAX_FRACTION * self.memory

    def devices(self, number: int) -> Sequence[Any]:
        """Absent cards of this kind.

        Raises:
          InputError: no CUDA compiler; more than `NODE` cards that do not fill their nodes.
        """
        nodes, left = divmod(number, NODE) if number > NODE else (1, 0)
        if left:
            raise InputError(
                f"{number} cards do not fill nodes of {NODE}: choose a multiple of {NODE}, or "
                "fewer."
            )
        try:
            return topologies.get_topology_desc(
                platform="cuda",
                target_config=self._text(),
                topology=f"1x{nodes}x{number // nodes}",
            ).devices
        except NotImplementedError as error:
            raise InputError(
                "no CUDA compiler was found: install galore-jax[cuda] on Python 3.12 or later, "
                "and start it before JAX uses another device."
            ) from error

    def _text(self) -> str:
        """The card as the text of XLA's protocol buffer `GpuTargetConfigProto`."""
        major, minor = self.compute_capability
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
            "shared_memory_per_block_optin": self.shared_memory_per_block,
            "shared_memory_per_core": self.shared_memory,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "clock_rate_ghz": self.clock,
            "l2_cache_size": self.l2_cache,
            "memory_bandwidth": int(self.bandwidth),
            "device_memory_size": self.memory,
            "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
        }
        lines = "\n".join(f"{key}: {value}" for key, value in properties.items())
        return (
            f"gpu_device_info {{\n{lines}\n}}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 7 }\n"
            "runtime_version { major: 13 }\n"
            f'device_description_str: "{self.name}"\n'
        )


GPUS = {
    "a100": Gpu(
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
        peak=312e12,
    ),
    "rtx3060": Gpu(
        name="NVIDIA GeForce RTX 3060",
        compute_capability=(8, 6),
        cores=28,
        lanes=128,
        threads=1536,
        shared_memory=102400,
        shared_memory_per_block=101376,
        memory=12 * 2**30,
        bandwidth=3.6e11,
        l2_cache=3 * 2**20,
        clock=1.777,
        peak=25.6e12,
    ),
    "rtx4080": Gpu(
        name="NVIDIA GeForce RTX 4080",
        compute_capability=(8, 9),
        cores=76,
        lanes=128,
        threads=1536,
        shared_memory=102400,
        shared_memory_per_block=101376,
        memory=16 * 2**30,
        bandwidth=7.168e11,
        l2_cache=64 * 2**20,
        clock=2.505,
        peak=97.5e12,
    ),
    "rtx4090": Gpu(
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
        peak=165e12,
    ),
    "h100": Gpu(
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
        peak=989e12,
    ),
}
