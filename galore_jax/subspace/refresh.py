"""How a basis is renewed: which matrices are due, their new vectors, and the gap after that."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.loops import for_each
from galore_jax.ops.quantization import as_float32, stored_like
from galore_jax.subspace.basis import AGE_UNINITIALIZED, Basis, overdue, path_number, updates_left
from galore_jax.subspace.methods import REFRESH, overlap
from galore_jax.subspace.projection import Side


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
        (seed, count, path_number(basis.projection)),
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
    late = overdue(basis)
    later = late + jnp.clip(late, 1, basis.interval)
    wait = jnp.where(updates_left(basis) <= 0, later, basis.wait)
    return dataclasses.replace(
        basis,
        vectors=vectors,
        age=jnp.where(new, 0, basis.age),
        gap=jnp.where(new, gap, basis.gap),
        wait=jnp.where(new, 0, wait),
        overlap=jnp.where(new, overlaps, basis.overlap),
    )


@partial(jax.jit, static_argnames="method")
def refresh_where_due(
    vectors: dict[Side, Any],
    age: jax.Array,
    gap: jax.Array,
    matrices: jax.Array,
    key_data: tuple[Any, ...],
    method: str,
) -> tuple[dict[Side, Any], jax.Array, jax.Array]:
    """New bases for the matrices whose age has reached their gap; the others cost nothing.

    A matrix whose gradient is zero, as that of an expert without tokens, or not finite in its
    squares keeps its basis, so that the next good gradient refreshes it. Where a method has rounds,
    the first basis takes three of them.

    Args:
      vectors: by side, `(n, in or out, r)`, or these `Quantized`.
      age: `(n,)` int32.
      gap: `(n,)` int32.
      matrices: `(n, in, out)`, gradients.
      key_data: whole numbers that make the random key, the seed first.
      method: a name in `REFRESH`.

    Returns:
      The vectors, which of the matrices have new ones `(n,)`, and the `overlap` with the old ones
      `(n,)`, of two sides the smaller, 0 where there are none.
    """

    def refresh_one(i: jax.Array, carry: tuple[Any, jax.Array, jax.Array], matrices: jax.Array):
        vectors, refreshed, overlaps = carry
        matrix = matrices[i].astype(jnp.float32)
        largest = jnp.max(jnp.abs(matrix))
        stored = jax.tree.map(lambda stack: stack[i], vectors)
        old: dict[Side, jax.Array] = {side: as_float32(own) for side, own in stored.items()}

        def renewed() -> dict[Side, jax.Array]:
            rounds = jnp.where(age[i] >= AGE_UNINITIALIZED, 3, 1)
            key = jax.random.key(key_data[0])
            for number in (*key_data[1:], i):
                key = jax.random.fold_in(key, number)
            return {
                side: REFRESH[method](
                    matrix / largest, side, basis, rounds, jax.random.fold_in(key, number)
                )
                for number, (side, basis) in enumerate(old.items())
            }

        usable = jnp.isfinite(jnp.sum(matrix**2)) & (largest > 0)
        new = lax.cond(usable, renewed, lambda: old)
        good = usable & jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in new.values()]))
        least = jnp.min(jnp.stack([overlap(old[side], new[side]) for side in new]))
        written = {side: stored_like(new[side], own) for side, own in stored.items()}
        kept = jax.tree.map(
            lambda stack, new, old: stack.at[i].set(jnp.where(good, new, old)),
            vectors,
            written,
            stored,
        )
        return kept, refreshed.at[i].set(good), overlaps.at[i].set(jnp.where(good, least, 0))

    nothing = jnp.zeros(age.shape, bool), jnp.zeros(age.shape, jnp.float32)
    return for_each(age >= gap, refresh_one, (vectors, *nothing), matrices)
