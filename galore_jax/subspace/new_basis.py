"""The refresh of a basis: which matrices are due, their new vectors, and their next gap."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.ops.loops import flatten_batch, for_each
from galore_jax.ops.partition import map_batch
from galore_jax.ops.quantization import as_float32, stored_like
from galore_jax.subspace.basis import (
    AGE_UNINITIALIZED,
    Basis,
    path_hash,
    replacing,
    updates_left,
    updates_overdue,
)
from galore_jax.subspace.methods import EXACT, REFRESH, overlap
from galore_jax.subspace.placement import constrain, matrices_partition
from galore_jax.subspace.projection import Projection, Side


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Sketch:
    """New vectors for a basis, which `galore_jax.refresh` computes without a full gradient.

    Attributes:
      vectors: for each side, float32 of shape `projection.basis_shapes`; new vectors for matrices
        that are due.
      usable: bool `(*batch,)`, whether the products they were computed from were finite and not
        all zero.
    """

    vectors: dict[Side, Any]
    usable: Any


def refresh_basis(
    basis: Basis, gradient: Any, lazy_overlap: Any, *, seed: Any, count: Any
) -> Basis:
    """Refreshes the matrices whose age has reached their gap.

    After a failed refresh, the next one from a full gradient is attempted immediately, because the
    gradient is available anyway; the next one from a `Sketch` is attempted after `basis.wait`.

    Args:
      basis: the basis of the parameter.
      gradient: the gradient of the parameter, or a `Sketch`.
      lazy_overlap: the smallest overlap of the old and the new subspace that doubles the gap of a
        matrix, up to 8 times `update_proj_gap`; None: gaps never double.
      seed: seed of the random numbers.
      count: number of updates before this one.

    Returns:
      The basis.

    Raises:
      ValueError: the method needs a full gradient, but a sketch was given.
    """
    # Take the vectors of a sketch, or find the matrices to compute new ones from.
    if isinstance(gradient, Sketch) and basis.method == "subspace_iteration":
        return _refresh_from_sketch(basis, gradient, lazy_overlap)
    if isinstance(gradient, Sketch):
        if basis.method != "random":
            raise ValueError(
                f'galore: refresh="{basis.method}" of {basis.projection.name} needs its full '
                'gradient, which galore_jax.refresh never computes: use "subspace_iteration" or '
                '"random", or full gradients from jax.value_and_grad.'
            )
        # "random" ignores the gradient; ones pass the check for usable gradients.
        matrices = jnp.ones((*basis.age.shape, 1, 1))
    else:
        matrices = basis.projection.view.to_matrices(gradient)

    # Compute new vectors, with the batch axes flattened.
    key_data = seed, count, path_hash(basis.projection)

    def refresh_all(vectors: Any, age: Any, *others: Any) -> Any:
        refresh: Callable[..., Any] = partial(refresh_where_due, method=basis.method)
        if basis.method in EXACT:
            refresh = _on_whole_matrices(refresh, basis.projection)
        stacks = flatten_batch((vectors, age, *others), age.ndim)
        results = refresh(*stacks, key_data)
        return jax.tree.map(lambda new, old: new.reshape(old.shape), results, (vectors, age, age))

    arguments = basis.vectors, basis.age, basis.gap, basis.number, matrices
    if basis.method in EXACT:
        results = refresh_all(*arguments)
    else:
        results = map_batch(matrices_partition(basis.projection), refresh_all, *arguments)
    vectors, refreshed, overlaps = results
    return _apply_refresh(basis, vectors, refreshed, overlaps, lazy_overlap)


def _on_whole_matrices(refresh: Callable[..., Any], projection: Projection) -> Callable[..., Any]:
    """A refresh of a stack of which each device has whole matrices in place of parts of all.

    The exact methods cannot work on parts. An all-to-all moves less than gathering the stack, and
    the devices share the work. Where the devices do not divide the number of matrices, XLA gathers
    one matrix after the other.
    """
    partition = matrices_partition(projection)
    count = math.prod(projection.view.batch)
    if partition is None or count % math.prod(partition.mesh.shape[n] for n in partition.used):
        return refresh
    matrices = PartitionSpec(partition.used or None)
    in_specs = (*5 * (matrices,), PartitionSpec())
    return partition.map_parts(refresh, in_specs, matrices)


def _refresh_from_sketch(basis: Basis, sketch: Sketch, lazy_overlap: Any) -> Basis:
    """Takes the vectors of a sketch for the matrices that are due and have usable ones."""
    finite = [jnp.all(jnp.isfinite(v), axis=(-2, -1)) for v in sketch.vectors.values()]
    refreshed = (updates_left(basis) <= 0) & sketch.usable & jnp.all(jnp.stack(finite), axis=0)

    def select(new_vectors: jax.Array, old: Any) -> Any:
        where_refreshed = lambda new, old: jnp.where(refreshed[..., None, None], new, old)
        return jax.tree.map(where_refreshed, stored_like(new_vectors, old), old)

    overlaps = [
        overlap(as_float32(basis.vectors[side]), sketch.vectors[side]) for side in sketch.vectors
    ]
    vectors = {side: select(sketch.vectors[side], old) for side, old in basis.vectors.items()}
    return _apply_refresh(
        basis, vectors, refreshed, jnp.min(jnp.stack(overlaps), axis=0), lazy_overlap
    )


def _apply_refresh(
    basis: Basis, vectors: Any, refreshed: jax.Array, overlaps: jax.Array, lazy_overlap: Any
) -> Basis:
    """Stores the vectors and schedules the next refresh of each matrix.

    Args:
      basis: before the refresh.
      vectors: new where refreshed, otherwise the old ones.
      refreshed: bool `(*batch,)`.
      overlaps: float32 `(*batch,)`, of the old and the new subspace.
      lazy_overlap: see `refresh_basis`.

    Returns:
      The basis after the refresh.
    """
    # The next gap is the interval, or longer if the subspace has hardly changed. The overlap with
    # the first basis, which is random, says nothing.
    gap = interval = jnp.full_like(basis.gap, basis.interval)
    if lazy_overlap is not None:
        stays = (overlaps >= lazy_overlap) & (basis.age < AGE_UNINITIALIZED)
        doubled = jnp.minimum(2 * jnp.maximum(basis.gap, interval), 8 * interval)
        gap = jnp.where(stays, doubled, interval)

    # After a failed refresh, for example of an expert without tokens, retrying at every update is
    # not worth the passes over the batch: attempts follow 1, 2, 4, 8, … updates after the due one.
    overdue = updates_overdue(basis)
    backoff = overdue + jnp.clip(overdue, 1, basis.interval)
    wait = jnp.where(updates_left(basis) <= 0, backoff, basis.wait)
    new = dataclasses.replace(
        basis,
        vectors=vectors,
        age=jnp.where(refreshed, 0, basis.age),
        gap=jnp.where(refreshed, gap, basis.gap),
        wait=jnp.where(refreshed, 0, wait),
        refreshed=replacing(basis.refreshed, refreshed),
        overlap=jnp.where(refreshed, overlaps, basis.overlap),
    )
    return constrain(new)


@partial(jax.jit, static_argnames="method")
def refresh_where_due(
    vectors: dict[Side, Any],
    age: jax.Array,
    gap: jax.Array,
    numbers: jax.Array,
    matrices: jax.Array,
    key_data: tuple[Any, ...],
    method: str,
) -> tuple[dict[Side, Any], jax.Array, jax.Array]:
    """Computes new vectors for the matrices whose age has reached their gap.

    The other matrices cost nothing. If the gradient of a matrix is zero, for example that of an
    expert without tokens, or if the sum of its squares is not finite, the matrix keeps its basis
    and is refreshed from the next usable gradient. Subspace iteration runs for three iterations at
    the first refresh and for one at later ones.

    Args:
      vectors: for each side, `(n, in or out, r)`, possibly `Quantized`.
      age: int32 `(n,)`.
      gap: int32 `(n,)`.
      numbers: int32 `(n,)`, of the matrices, which may be some of a larger stack.
      matrices: the gradients, `(n, in, out)`.
      key_data: integers from which, with its number, the random key of a matrix is made, starting
        with the seed.
      method: a name in `methods.REFRESH`.

    Returns:
      The vectors; whether each matrix was refreshed, bool `(n,)`; and the `overlap` of its old and
      new subspace, float32 `(n,)`, the minimum over the projected sides, 0 if not refreshed.
    """

    def refresh_one(i: jax.Array, carry: tuple[Any, jax.Array, jax.Array], matrices: jax.Array):
        vectors, refreshed, overlaps = carry
        matrix = matrices[i].astype(jnp.float32)
        largest = jnp.max(jnp.abs(matrix))
        stored = jax.tree.map(lambda stack: stack[i], vectors)
        old: dict[Side, jax.Array] = {side: as_float32(array) for side, array in stored.items()}

        def compute_vectors() -> dict[Side, jax.Array]:
            iterations = jnp.where(age[i] >= AGE_UNINITIALIZED, 3, 1)
            key = jax.random.key(key_data[0])
            for number in (*key_data[1:], numbers[i]):
                key = jax.random.fold_in(key, number)
            return {
                side: REFRESH[method](
                    matrix / largest, side, basis, iterations, jax.random.fold_in(key, number)
                )
                for number, (side, basis) in enumerate(old.items())
            }

        # Compute new vectors from a usable gradient, and check them.
        usable = jnp.isfinite(jnp.sum(matrix**2)) & (largest > 0)
        new = lax.cond(usable, compute_vectors, lambda: old)
        success = usable & jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in new.values()]))
        min_overlap = jnp.min(jnp.stack([overlap(old[side], new[side]) for side in new]))

        # Store them in place.
        to_store = {side: stored_like(new[side], array) for side, array in stored.items()}
        vectors = jax.tree.map(
            lambda stack, new, old: stack.at[i].set(jnp.where(success, new, old)),
            vectors,
            to_store,
            stored,
        )
        overlaps = overlaps.at[i].set(jnp.where(success, min_overlap, 0))
        return vectors, refreshed.at[i].set(success), overlaps

    none_refreshed = jnp.zeros(age.shape, bool), jnp.zeros(age.shape, jnp.float32)
    return for_each(age >= gap, refresh_one, (vectors, *none_refreshed), matrices)
