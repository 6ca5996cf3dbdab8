"""Orthonormalisation, and the methods that compute a new basis from a gradient."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.quantization import quantize
from galore_jax.subspace.projection import Side


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
    """Draws random bases of shape `(*batch, n, r)` in a dtype, or for int8 as `Quantized`."""

    def draw(key: jax.Array) -> Any:
        columns = gaussian_basis(key, shape[-2:])
        return quantize(columns, "int8") if dtype == jnp.int8 else columns.astype(dtype)

    # Draw one matrix at a time: batched Cholesky calls deadlock on CPU in jax 0.10. Convert each
    # right away: at 7B, all of them in float32 would need more memory than a training step.
    stack = lax.map(draw, jax.random.split(key, math.prod(shape[:-2])))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape[:-2], *leaf.shape[1:]), stack)


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
