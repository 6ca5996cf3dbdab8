"""The basis of one parameter: its vectors, its refresh schedule and its counters."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.ops.implementation import Implementation
from galore_jax.subspace.projection import Moments, Projection, Side

# The age of a random initial basis, which the next finite gradient replaces.
AGE_UNINITIALIZED = 2**30
# The largest `update_proj_gap`: the bound of a doubled gap, eight times as large, is still below
# `AGE_UNINITIALIZED`, and twice that bound fits in int32.
MAX_GAP = 10**8


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Basis:
    """The basis of one projected parameter and its state; each matrix of a batch has its own.

    Attributes:
      vectors: for each side, orthonormal columns of shape `projection.basis_shapes`, possibly
        `Quantized`.
      number: int32 `(*batch,)`, the place of the matrix in the batch. Random numbers depend on it,
        even where a layer-wise step sees one matrix alone.
      age: int32 `(*batch,)`, number of finite updates since the last refresh; at least
        `AGE_UNINITIALIZED` before the first.
      gap: int32 `(*batch,)`, the age at which the next refresh is due.
      wait: int32 `(*batch,)`, after failed refreshes, the number of updates between the one at
        which the refresh became due and the next attempt.
      refreshed: bool `(*batch,)`, whether the last update, or a later call of `galore_jax.refresh`,
        gave the matrix new vectors. An update by projected gradients, before which that function
        refreshes and rotates the moments, sets it to False.
      finite: bool `(*batch,)`, whether its last gradient was; if not, the update was skipped.
      skipped: int32 `(*batch,)`, number of updates skipped because the gradient was not finite.
      saved: int32 `(*batch,)`, number of refreshes avoided by gaps longer than `update_proj_gap`.
      overlap: float32 `(*batch,)`, the mean squared cosine of the principal angles between the
        last two bases, 1 if the subspace did not change; the minimum over the projected sides.
      scale: float32 scalar, factor of the lifted update.
      interval: int32 scalar, `update_proj_gap`.
      projection: static.
      method: static; how a refresh computes the vectors, a name in `new_basis.REFRESH`.
      moments: static; what a refresh does with the moments.
      full_size: static; True if the transformations after galore were initialised with the full
        parameters, so that they must receive the gradient in its full shape, as `P PᵀG`.
      implementation: static; of the lift.
    """

    vectors: dict[Side, Any]
    number: Any
    age: Any
    gap: Any
    wait: Any
    refreshed: Any
    finite: Any
    skipped: Any
    saved: Any
    overlap: Any
    scale: Any
    interval: Any
    projection: Projection = field(metadata={"static": True})
    method: str = field(metadata={"static": True})
    moments: Moments = field(metadata={"static": True})
    full_size: bool = field(metadata={"static": True})
    implementation: Implementation = field(metadata={"static": True})


def is_basis(node: Any) -> bool:
    """Whether a node is a `Basis`, for the argument `is_leaf` of tree maps."""
    return isinstance(node, Basis)


def in_buffer_of(old: jax.Array, new: jax.typing.ArrayLike) -> jax.Array:
    """The new array, computed so that it depends on the old one.

    JAX drops arguments that nothing depends on. It would then give the buffers of the donated state
    to other numbers than those they hold, all of which XLA would copy at each step.
    """
    return jnp.where(old == new, old, new)


def path_hash(projection: Projection) -> int:
    """A 31-bit hash of the parameter's path, so that parameters get different random numbers."""
    return zlib.crc32(projection.name.encode()) & 0x7FFFFFFF
