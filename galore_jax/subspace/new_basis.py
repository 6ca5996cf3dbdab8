"""The refresh of a basis: which matrices are due, their new vectors, and their next gap.

In reading order: the schedule, the refresh of a stack of matrices, the methods that compute new
vectors from a gradient, and orthonormalisation.
"""

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
from galore_jax.ops.quantization import as_float32, quantize, stored_like
from galore_jax.subspace.basis import AGE_UNINITIALIZED, Basis, in_buffer_of, path_hash
from galore_jax.subspace.placement import constrain, matrices_partition
from galore_jax.subspace.projection import Projection, Side


def updates_left(basis: Basis) -> jax.Array:
    """Number of updates until the next attempt at a refresh, int32 `(*batch,)`; due if <= 0."""
    return basis.wait - updates_overdue(basis)


def updates_overdue(basis: Basis) -> jax.Array:
    """Number of updates since the refresh became due, int32 `(*batch,)`; negative before that."""
    return basis.age - jnp.where(basis.age >= AGE_UNINITIALIZED, AGE_UNINITIALIZED, basis.gap)


def count_update(basis: Basis, finite: jax.Array) -> Basis:
    """Counts one update of each matrix.

    Args:
      basis: before the update.
      finite: bool `(*batch,)`, whether the gradient of the matrix was finite; if not, the update
        was skipped.

    Returns:
      The basis with its counters advanced.
    """
    count = lambda number, happened: jnp.where(happened, number + 1, number)
    age = count(basis.age, finite)
    saved = count(basis.saved, finite & (age < basis.gap) & (age % basis.interval == 0))
    skipped = count(basis.skipped, ~finite)
    # Read off the counter: with the sum of squares itself, XLA's CPU compiler keeps up to 8 MB more
    # of temporaries in the full-gradient step of `benchmark.py step layers=2`.
    finite = in_buffer_of(basis.finite, skipped == basis.skipped)
    return dataclasses.replace(basis, age=age, finite=finite, skipped=skipped, saved=saved)


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Sketch:
    """New vectors for a basis, which `galore_jax.refresh` computes without a full gradient.

    Attributes:
      vectors: for each side, an array of shape `projection.basis_shapes`, in the dtype of the
        basis, or float32 if that is quantised; new vectors for matrices that are due.
      usable: bool `(*batch,)`, whether the products they were computed from were finite and not
        all zero.
    """

    vectors: dict[Side, Any]
    usable: Any


def refresh_if_due(
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
    partition = None if basis.method in EXACT else matrices_partition(basis.projection)
    vectors, refreshed, overlaps = map_batch(partition, refresh_all, *arguments)
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
      lazy_overlap: see `refresh_if_due`.

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
        refreshed=in_buffer_of(basis.refreshed, refreshed),
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
      method: a name in `REFRESH`.

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
                    matrix / largest, side, vectors, iterations, jax.random.fold_in(key, place)
                )
                for place, (side, vectors) in enumerate(old.items())
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


def svd(matrix: jax.Array, side: Side, basis: jax.Array, iterations: Any, key: Any) -> jax.Array:
    """Computes the exact leading singular vectors (arXiv 2403.03507, equation 12)."""
    del iterations, key
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return (left if side == "left" else right.T)[:, : basis.shape[1]]


def eigh(matrix: jax.Array, side: Side, basis: jax.Array, iterations: Any, key: Any) -> jax.Array:
    """Computes the subspace of `svd` from the eigenvectors of the smaller of `G Gᵀ` and `GᵀG`."""
    del iterations, key
    matrix = _with_side_first(matrix, side)
    wide = matrix.shape[0] <= matrix.shape[1]
    smaller = matrix if wide else matrix.T
    gram = jnp.matmul(smaller, smaller.T, precision=lax.Precision.HIGHEST)
    # Without a shift LAPACK may return NaN for rows whose squares are outside float32's range.
    gram = gram + 1e-12 * jnp.eye(len(gram), dtype=gram.dtype)
    leading = jnp.linalg.eigh(gram)[1][:, : -basis.shape[1] - 1 : -1]
    return leading if wide else orthonormalise(matrix @ leading, basis)


def subspace_iteration(
    matrix: jax.Array, side: Side, basis: jax.Array, iterations: jax.Array, key: jax.Array
) -> jax.Array:
    """Iterates `A = orth(Gᵀ P), P = orth(G A)`, warm-started from the old basis."""
    del key
    matrix = _with_side_first(matrix, side)

    def iterate(_: int, basis: jax.Array) -> jax.Array:
        return orthonormalise(matrix @ span(matrix.T @ basis), basis)

    return lax.fori_loop(0, iterations, iterate, basis)


def random(matrix: jax.Array, side: Side, basis: jax.Array, iterations: Any, key: Any) -> jax.Array:
    """Draws a random subspace, independent of the gradient."""
    del matrix, side, iterations
    return gaussian_basis(key, basis.shape)


# Each method takes a matrix (in, out), the side to project, the old basis (in or out, r), a number
# of iterations and a random key, and returns the new basis; float32.
REFRESH: dict[str, Callable[[jax.Array, Side, jax.Array, Any, Any], jax.Array]] = {
    "subspace_iteration": subspace_iteration,
    "eigh": eigh,
    "svd": svd,
    "random": random,
}

# The methods that need a matrix as a whole.
EXACT = frozenset({"eigh", "svd"})


def overlap(old: jax.Array, new: jax.Array) -> jax.Array:
    """Mean squared cosine of the principal angles between two subspaces, `‖P_oldᵀP_new‖² / r`."""
    return jnp.sum((old.mT @ new) ** 2, axis=(-2, -1)) / old.shape[-1]


def _with_side_first(matrix: jax.Array, side: Side) -> jax.Array:
    return matrix if side == "left" else matrix.T


def orthonormalise(columns: jax.Array, generic: jax.Array) -> jax.Array:
    """Orthonormalises columns with only matrix products and r × r Cholesky factorisations.

    Four passes of shifted Cholesky-QR are applied to columns normalised to length 1. Without the
    shift Cholesky-QR fails if the Gram matrix is singular to working precision. A small multiple of
    `generic` supplies the directions that the columns lack. Shifts scale with an upper bound on
    the largest eigenvalue, not with the mean: for parallel columns the mean is r times smaller, and
    the shift would be lost to rounding.

    Args:
      columns: `(n, r)` float32, finite, of any rank and scale.
      generic: `(n, r)` of full column rank, with entries of about 1/√n: the old basis or Gaussian
        random numbers.

    Returns:
      Q `(n, r)` with `‖QᵀQ − I‖∞` of about 1e-6. Its span differs from that of well-conditioned
      columns by about 1e-4.
    """
    return _cholesky_qr(_normalise(columns) + 1e-4 * generic, passes=4)


def _normalise(columns: jax.Array) -> jax.Array:
    """Scales each column to length 1; columns of zeros are unchanged."""
    # Divide by the largest entry first: the square of 1e-30 is zero in float32.
    largest = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
    columns = columns / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(columns, axis=0, keepdims=True)
    return columns / jnp.where(length > 0, length, 1)


def _cholesky_qr(q: jax.Array, passes: int) -> jax.Array:
    """Applies passes of shifted Cholesky-QR to columns of length 1 or 0."""
    identity = jnp.eye(q.shape[1], dtype=q.dtype)
    for shift in (1e-5, 1e-6, 1e-7, 1e-8)[:passes]:
        gram = jnp.matmul(q.T, q, precision=lax.Precision.HIGHEST)
        # At least 1, so that the factorisation exists even for zero columns, which stay zero.
        bound = jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), 1)
        factor = jnp.linalg.cholesky(gram + shift * bound * identity)
        # Multiply by the inverse rather than solve against q, which would gather a sharded q.
        inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
        q = jnp.matmul(q, inverse.T, precision=lax.Precision.HIGHEST)
    return q


def span(columns: jax.Array) -> jax.Array:
    """Orthonormalises columns to within a few percent, for a product with the gradient.

    One pass suffices when only the span of the columns matters: it just has to keep the weak
    directions above the rounding errors of the strong ones.
    """
    return _cholesky_qr(_normalise(columns), passes=1)


def gaussian_basis(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws an orthonormal basis of a uniformly random subspace, `(n, r)` float32."""
    gaussian = jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
    return orthonormalise(gaussian, gaussian)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def random_basis(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Draws random bases of shape `(*batch, n, r)` in a dtype, of integers as `Quantized`."""

    def draw(key: jax.Array) -> Any:
        columns = gaussian_basis(key, shape[-2:])
        if jnp.issubdtype(dtype, jnp.integer):
            code: Any = jnp.dtype(dtype).name
            return quantize(columns, code)
        return columns.astype(dtype)

    # Draw one matrix at a time: batched Cholesky calls deadlock on CPU in jax 0.10. Convert each
    # right away: at 7B, all of them in float32 would need more memory than a training step.
    stack = lax.map(draw, jax.random.split(key, math.prod(shape[:-2])))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape[:-2], *leaf.shape[1:]), stack)
