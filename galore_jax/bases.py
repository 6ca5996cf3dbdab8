"""The basis of one parameter over its life: started, refreshed when due, its updates counted."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.projection import Basis, Moments, Projection, Side
from galore_jax.rules import Rule
from galore_jax.subspace import NEVER, random_basis, refresh_due


def start_basis(
    projection: Projection,
    *,
    scale: Any,
    gap: Any,
    moments: Moments,
    full_size: bool,
    dtype: Any,
    seed: Any,
) -> Basis:
    """A random basis, which the first finite gradient replaces.

    Args:
      projection: of the parameter.
      scale: factor of the lift.
      gap: updates from the first refresh to the second, a number or an array `(*batch,)`.
      moments: what happens to the moments at a refresh.
      full_size: see `Basis`.
      dtype: of the vectors.
      seed: of the random numbers.

    Returns:
      The basis.
    """
    batch = projection.view.batch
    key = jax.random.fold_in(jax.random.key(seed), _number(projection))
    vectors: dict[Side, Any] = {
        side: random_basis(jax.random.fold_in(key, i), shape).astype(dtype)
        for i, (side, shape) in enumerate(projection.basis_shapes.items())
    }
    return Basis(
        vectors=vectors,
        age=jnp.full(batch, NEVER, jnp.int32),
        gap=jnp.full(batch, gap, jnp.int32),
        skipped=jnp.zeros(batch, jnp.int32),
        saved=jnp.zeros(batch, jnp.int32),
        overlap=jnp.zeros(batch, jnp.float32),
        scale=jnp.asarray(scale, jnp.float32),
        projection=projection,
        moments=moments,
        full_size=full_size,
    )


def refresh_basis(
    basis: Basis,
    gradient: jax.Array,
    rule: Rule,
    *,
    lazy_overlap: Any,
    max_gap: Any,
    seed: Any,
    count: Any,
) -> Basis:
    """New vectors, from the gradient, for the matrices whose age has reached their gap.

    Args:
      basis: of the parameter.
      gradient: of the parameter's shape.
      rule: how it is projected, complete.
      lazy_overlap: the overlap of the new subspace with the old one from which the gap doubles.
      max_gap: the bound of a doubled gap.
      seed: of the random numbers.
      count: updates before this one.

    Returns:
      The basis.
    """
    batch = basis.age.shape
    flat = lambda array: array.reshape(-1, *array.shape[len(batch) :])  # noqa: E731
    vectors, new, overlap = refresh_due(
        jax.tree.map(flat, basis.vectors),
        flat(basis.age),
        flat(basis.gap),
        flat(basis.projection.view.to_matrices(gradient)),
        (seed, count, _number(basis.projection)),
        str(rule.refresh),
    )
    new, overlap = new.reshape(batch), overlap.reshape(batch)
    gap = jnp.full_like(basis.gap, rule.update_proj_gap)
    if lazy_overlap is not None:
        bound = 8 * gap if max_gap is None else jnp.maximum(max_gap, gap)
        doubled = jnp.minimum(2 * jnp.maximum(basis.gap, gap), bound)
        gap = jnp.where(overlap >= lazy_overlap, doubled, gap)
    # The first interval is as long as it was started with.
    gap = jnp.where(basis.age >= NEVER, basis.gap, gap)
    return dataclasses.replace(
        basis,
        vectors=jax.tree.map(lambda new, old: new.reshape(old.shape), vectors, basis.vectors),
        age=jnp.where(new, 0, basis.age),
        gap=jnp.where(new, gap, basis.gap),
        overlap=jnp.where(new, overlap, basis.overlap),
    )


def count_update(basis: Basis, rule: Rule, finite: jax.Array) -> Basis:
    """The basis after an update whose gradient was finite for these matrices, `(*batch,)`."""
    age = basis.age + finite
    saved = finite & (age < basis.gap) & (age % rule.update_proj_gap == 0)
    return dataclasses.replace(
        basis,
        age=age,
        skipped=basis.skipped + ~finite,
        saved=basis.saved + saved,
        scale=jnp.asarray(rule.scale, jnp.float32),
    )


def _number(projection: Projection) -> int:
    """A number of 31 bits for the path, that tells its random numbers from those of others."""
    return zlib.crc32(projection.name.encode()) & 0x7FFFFFFF
