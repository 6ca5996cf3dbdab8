"""The basis of one parameter: its vectors, when they are due for a refresh, updates counted."""

import dataclasses
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.ops.quantization import quantize
from galore_jax.subspace.methods import random_basis
from galore_jax.subspace.projection import Moments, Projection, Side

# The age of a basis that no gradient has shaped yet; the next finite one does.
AGE_UNINITIALIZED = 2**30
# The largest number of updates between two refreshes: eight times it, the bound of a doubled gap,
# is below `AGE_UNINITIALIZED`, and twice that fits int32.
MAX_GAP = 10**8


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Basis:
    """The basis of one projected parameter, and what is known of it; each matrix has its own.

    Attributes:
      vectors: by side, orthonormal columns, `projection.basis_shapes`; or these `Quantized`.
      age: int32 `(*batch,)`, finite updates since the basis was made.
      gap: int32 `(*batch,)`, updates after which the next one is made.
      wait: int32 `(*batch,)`, by how many updates more that is put off after refreshes that failed.
      skipped: int32 `(*batch,)`, updates left out because the gradient was not finite.
      saved: int32 `(*batch,)`, refreshes that a gap longer than `update_proj_gap` has saved.
      overlap: float32 `(*batch,)`, the mean squared cosine of the principal angles between the
        last two bases: 1 where the subspace stayed; of two sides the smaller.
      scale: float32 scalar, the factor of the lift.
      interval: int32 scalar, `update_proj_gap`.
      projection: static.
      method: static; how a refresh finds the vectors, see `subspace.REFRESH`.
      moments: static; what happens to the moments at a refresh.
      full_size: static; True where the transformations after galore were started with full
        parameters, so that the gradient must reach them as `P PᵀG` in its full shape.
    """

    vectors: dict[Side, Any]
    age: Any
    gap: Any
    wait: Any
    skipped: Any
    saved: Any
    overlap: Any
    scale: Any
    interval: Any
    projection: Projection = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    moments: Moments = field(default="keep", metadata={"static": True})
    full_size: bool = field(default=False, metadata={"static": True})


def is_basis(node: Any) -> bool:
    """For `is_leaf` of tree maps over bases."""
    return isinstance(node, Basis)


def start_basis(
    projection: Projection,
    *,
    scale: Any,
    interval: Any,
    gap: Any,
    method: str,
    moments: Moments,
    full_size: bool,
    dtype: Any,
    seed: Any,
) -> Basis:
    """A random basis, which the first finite gradient replaces.

    Args:
      projection: of the parameter.
      scale: factor of the lift.
      interval: updates between refreshes.
      gap: updates from the first refresh to the second, a number or an array `(*batch,)`.
      method: of refreshes.
      moments: what happens to the moments at a refresh.
      full_size: see `Basis`.
      dtype: of the vectors; int8 stores them as `Quantized`.
      seed: of the random numbers.

    Returns:
      The basis.
    """
    batch = projection.view.batch
    key = jax.random.fold_in(jax.random.key(seed), path_number(projection))
    vectors: dict[Side, Any] = {}
    for i, (side, shape) in enumerate(projection.basis_shapes.items()):
        stack = random_basis(jax.random.fold_in(key, i), shape)
        is_int8 = jnp.dtype(dtype) == jnp.int8
        vectors[side] = quantize(stack, "int8") if is_int8 else stack.astype(dtype)
    return Basis(
        vectors=vectors,
        age=jnp.full(batch, AGE_UNINITIALIZED, jnp.int32),
        gap=jnp.full(batch, gap, jnp.int32),
        wait=jnp.zeros(batch, jnp.int32),
        skipped=jnp.zeros(batch, jnp.int32),
        saved=jnp.zeros(batch, jnp.int32),
        overlap=jnp.zeros(batch, jnp.float32),
        scale=jnp.asarray(scale, jnp.float32),
        interval=jnp.asarray(interval, jnp.int32),
        projection=projection,
        method=method,
        moments=moments,
        full_size=full_size,
    )


def updates_left(basis: Basis) -> jax.Array:
    """`(*batch,)` int32, updates until the next try of a refresh; 0 or less: it is due."""
    return basis.wait - overdue(basis)


def overdue(basis: Basis) -> jax.Array:
    """`(*batch,)` int32, updates since the refresh became due, negative before that."""
    return basis.age - jnp.where(basis.age >= AGE_UNINITIALIZED, AGE_UNINITIALIZED, basis.gap)


def count_update(basis: Basis, finite: jax.Array) -> Basis:
    """The basis after an update whose gradient was finite for these matrices, `(*batch,)`."""
    age = basis.age + finite
    saved = finite & (age < basis.gap) & (age % basis.interval == 0)
    return dataclasses.replace(
        basis, age=age, skipped=basis.skipped + ~finite, saved=basis.saved + saved
    )


def path_number(projection: Projection) -> int:
    """A number of 31 bits for the path, that tells its random numbers from those of others."""
    return zlib.crc32(projection.name.encode()) & 0x7FFFFFFF
