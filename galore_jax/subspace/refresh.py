"""The basis of one parameter over its life: started, refreshed when due, its updates counted."""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.ops.quantization import as_float32, quantize, stored_like
from galore_jax.subspace.methods import AGE_UNINITIALIZED, overlap, random_basis, refresh_where_due
from galore_jax.subspace.projection import Basis, Moments, Projection, Side


class Lazy(NamedTuple):
    """When the gap of a matrix doubles at a refresh.

    Attributes:
      overlap: of the new subspace with the old one, from which on it does; None: never.
      max_gap: the bound of a doubled gap; None: 8 times the rule's.
    """

    overlap: Any
    max_gap: Any


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Sketch:
    """What `refresh` hands to galore for a basis, in place of a gradient.

    Attributes:
      vectors: by side, `projection.basis_shapes`, float32; where the basis is due, new ones.
      usable: bool `(*batch,)`, whether what they were made of was finite and not zero.
    """

    vectors: dict[Side, Any]
    usable: Any


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
    key = jax.random.fold_in(jax.random.key(seed), _number(projection))
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
    return basis.wait - _overdue(basis)


def _overdue(basis: Basis) -> jax.Array:
    return basis.age - jnp.where(basis.age >= AGE_UNINITIALIZED, AGE_UNINITIALIZED, basis.gap)


def refresh_basis(basis: Basis, gradient: Any, lazy: Lazy, *, seed: Any, count: Any) -> Basis:
    """New vectors for the matrices whose age has reached their gap.

    Of a `Sketch` those that are to wait after a refresh that failed are left out; of a gradient,
    which is there anyway, they are tried again at once.

    Args:
      basis: of the parameter.
      gradient: of the parameter's shape, or a `Sketch`.
      lazy: when the gap doubles.
      seed: of the random numbers.
      count: updates before this one.

    Returns:
      The basis.

    Raises:
      ValueError: a method that cannot work on a sketch.
    """
    if isinstance(gradient, Sketch) and basis.method == "subspace_iteration":
        return _from_sketch(basis, gradient, lazy)
    if isinstance(gradient, Sketch):
        if basis.method != "random":
            raise ValueError(
                f'galore: refresh="{basis.method}" of {basis.projection.name} needs its full '
                'gradient, which galore_jax.refresh never forms: use "subspace_iteration" or '
                '"random", or jax.value_and_grad.'
            )
        matrices = jnp.ones((*basis.age.shape, 1, 1))  # They only have to be finite.
    else:
        matrices = basis.projection.view.to_matrices(gradient)
    batch = basis.age.shape
    flat = lambda array: array.reshape(-1, *array.shape[len(batch) :])
    vectors, new, overlaps = refresh_where_due(
        jax.tree.map(flat, basis.vectors),
        flat(basis.age),
        flat(basis.gap),
        flat(matrices),
        (seed, count, _number(basis.projection)),
        basis.method,
    )
    vectors = jax.tree.map(lambda new, old: new.reshape(old.shape), vectors, basis.vectors)
    return _renewed(basis, vectors, new.reshape(batch), overlaps.reshape(batch), lazy)


def _from_sketch(basis: Basis, sketch: Sketch, lazy: Lazy) -> Basis:
    finite = [jnp.all(jnp.isfinite(v), axis=(-2, -1)) for v in sketch.vectors.values()]
    new = (updates_left(basis) <= 0) & sketch.usable & jnp.all(jnp.stack(finite), axis=0)

    def chosen(new_vectors: jax.Array, old: Any) -> Any:
        pick = lambda one, other: jnp.where(new[..., None, None], one, other)
        return jax.tree.map(pick, stored_like(new_vectors, old), old)

    overlaps = [
        overlap(as_float32(basis.vectors[side]), sketch.vectors[side]) for side in sketch.vectors
    ]
    vectors = {side: chosen(sketch.vectors[side], old) for side, old in basis.vectors.items()}
    return _renewed(basis, vectors, new, jnp.min(jnp.stack(overlaps), axis=0), lazy)


def _renewed(basis: Basis, vectors: Any, new: jax.Array, overlaps: jax.Array, lazy: Lazy) -> Basis:
    gap = jnp.full_like(basis.gap, basis.interval)
    if lazy.overlap is not None:
        bound = 8 * gap if lazy.max_gap is None else jnp.maximum(lazy.max_gap, gap)
        doubled = jnp.minimum(2 * jnp.maximum(basis.gap, gap), bound)
        gap = jnp.where(overlaps >= lazy.overlap, doubled, gap)
    # The first interval is as long as it was started with.
    gap = jnp.where(basis.age >= AGE_UNINITIALIZED, basis.gap, gap)
    # After a refresh that failed, as that of an expert without tokens, passes over the batch are
    # not worth their time at every update: the next tries are 1, 2, 4, … updates later.
    overdue = _overdue(basis)
    later = overdue + jnp.clip(overdue, 1, basis.interval)
    wait = jnp.where(updates_left(basis) <= 0, later, basis.wait)
    return dataclasses.replace(
        basis,
        vectors=vectors,
        age=jnp.where(new, 0, basis.age),
        gap=jnp.where(new, gap, basis.gap),
        wait=jnp.where(new, 0, wait),
        overlap=jnp.where(new, overlaps, basis.overlap),
    )


def count_update(basis: Basis, finite: jax.Array) -> Basis:
    """The basis after an update whose gradient was finite for these matrices, `(*batch,)`."""
    age = basis.age + finite
    saved = finite & (age < basis.gap) & (age % basis.interval == 0)
    return dataclasses.replace(
        basis, age=age, skipped=basis.skipped + ~finite, saved=basis.saved + saved
    )


def _number(projection: Projection) -> int:
    """A number of 31 bits for the path, that tells its random numbers from those of others."""
    return zlib.crc32(projection.name.encode()) & 0x7FFFFFFF
