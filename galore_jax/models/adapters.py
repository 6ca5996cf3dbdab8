"""Low-rank adapters: LoRA (arXiv 2106.09685), and low-rank factors in place of a kernel.

An adapted layer has the parameters `lora_a` (in, rank) and `lora_b` (rank, out), with the leading
layer axis of its kernel. In a tree of parameters they are next to `kernel` (in, out), which is then
frozen, or there is no `kernel`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from galore_jax.types import PyTree, ReadPart

A, B, KERNEL = "lora_a", "lora_b", "kernel"
FACTORS = (A, B)
# The head of a classifier, which LoRA trains in full beside the adapters.
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of each kernel in the blocks of a model.

    Attributes:
      rank: of the factors, or its fraction of the kernel's smaller side.
      alpha: the product of the factors is multiplied by alpha / rank if it is added to a kernel.
      dropout: rate of dropout of the factors' input, if there is a random stream "dropout".
      has_kernel: True: `y = x W + alpha / rank · (dropout(x) A) B` with a frozen kernel W;
        False: `y = (x A) B`.
    """

    rank: int | float
    alpha: float = 32.0
    dropout: float = 0.0
    has_kernel: bool = True

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank of the factors of a kernel with this shape."""
        if isinstance(self.rank, int):
            return self.rank
        return max(1, round(self.rank * min(rows, columns)))

    def scale_of(self, rank: int) -> float:
        """The factor of the product of factors with this rank."""
        return self.alpha / rank if self.has_kernel else 1.0

    def initializers(self, rank: int, kernel_deviation: float) -> tuple[Any, Any]:
        """Initial values of A and B.

        Beside a kernel A is uniform within ±1/√in, as PEFT's, and B is 0, so that the model is
        unchanged. In place of a kernel both are normal with equal variances, and the product has
        the standard deviation that the kernel would have.
        """
        if self.has_kernel:
            uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            return uniform, nn.initializers.zeros
        normal = nn.initializers.normal(math.sqrt(kernel_deviation / math.sqrt(rank)))
        return normal, normal


def is_factor(names: Sequence[str]) -> bool:
    """Whether the leaf with these names in its path is A or B of an adapter."""
    return len(names) > 0 and names[-1] in FACTORS


def _product(adapter: Adapter, a: Any, b: Any) -> jax.Array:
    """What the factors add to a kernel, or the kernel that they replace, float32 (…, in, out)."""
    a, b = (jnp.asarray(factor, jnp.float32) for factor in (a, b))
    return adapter.scale_of(a.shape[-1]) * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def merge(params: PyTree, adapter: Adapter | None) -> PyTree:
    """The parameters of the model without an adapter that computes the same, in the same dtypes."""
    if adapter is None:
        return params
    flat: Any = flatten_dict(params)
    plain = {path: leaf for path, leaf in flat.items() if not is_factor(path)}
    for path, a in flat.items():
        if path[-1] == A:
            layer = path[:-1]
            kernel = _product(adapter, a, flat[*layer, B])
            if adapter.has_kernel:
                kernel += flat[*layer, KERNEL].astype(jnp.float32)
            plain[*layer, KERNEL] = kernel.astype(a.dtype)
    return unflatten_dict(plain)


def merged(read: ReadPart, adapter: Adapter) -> ReadPart:
    """Reads parts of the parameters that `merge` would return, from parts of a decoder's."""

    def read_merged(path: str, index: tuple[slice, ...]) -> np.ndarray:
        layer = path.removesuffix(KERNEL)
        if not path.startswith("layers/") or layer == path:
            return read(path, index)
        *batch, rows, columns = index
        part = {
            A: read(layer + A, (*batch, rows, slice(None))),
            B: read(layer + B, (*batch, slice(None), columns)),
        }
        if adapter.has_kernel:
            part[KERNEL] = read(path, index)
        return np.asarray(merge({"layer": part}, adapter)["layer"][KERNEL])

    return read_merged


def split(params: PyTree, adapters_only: bool = False) -> tuple[PyTree, PyTree]:
    """Splits parameters into those that are trained and those that are frozen.

    Args:
      params: nested dictionaries.
      adapters_only: False freezes the kernels that have an adapter; True freezes everything but
        adapters and the head of a classifier.

    Returns:
      Two trees, which `combine` joins again. Without adapters the second one is empty, unless
      `adapters_only`.
    """
    flat: Any = flatten_dict(params)

    def is_trained(path: tuple[str, ...]) -> bool:
        if adapters_only:
            return is_factor(path) or path[0] == HEAD
        return path[-1] != KERNEL or (*path[:-1], A) not in flat

    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def combine(params: PyTree, others: PyTree) -> PyTree:
    """The leaves of both trees in one; where both have a leaf, that of `others`."""
    return unflatten_dict({**flatten_dict(params), **flatten_dict(others)})


def factors(params: PyTree) -> PyTree:
    """The factors alone, in a tree without the other leaves."""
    flat: Any = flatten_dict(params)
    return unflatten_dict({path: leaf for path, leaf in flat.items() if is_factor(path)})
