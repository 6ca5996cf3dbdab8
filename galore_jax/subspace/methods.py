"""Subspaces: orthonormal columns, and every way to refresh a basis."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.subspace.projection import Side


def orthonormalise(columns: jax.Array, generic: jax.Array) -> jax.Array:
    """Orthonormal columns with the span of the given ones, by matmuls and r×r Cholesky only.

    Four passes of shifted Cholesky-QR over columns of length 1. A plain one fails where the Gram
    matrix is singular to working precision; a little of `generic` makes up what is missing. The
    shifts are relative to a bound of the largest eigenvalue, which for parallel columns is r times
    their mean, and a shift below its rounding would not help.

    Args:
      columns: `(n, r)` float32, of any rank and scale, finite.
      generic: `(n, r)` full column rank, entries of size about 1/√n: the old basis or a Gaussian.

    Returns:
      Q `(n, r)`, `‖QᵀQ − I‖∞` about 1e-6.
    """
    return _cholesky_qr(_of_length_one(columns) + 1e-4 * generic, passes=4)


def _of_length_one(columns: jax.Array) -> jax.Array:
    # First by the largest entry: the squares of 1e-30 are zero in float32.
    largest = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
    columns = columns / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(columns, axis=0, keepdims=True)
    return columns / jnp.where(length > 0, length, 1)


def _cholesky_qr(q: jax.Array, passes: int) -> jax.Array:
    """Passes of shifted Cholesky-QR over columns of length 1 or zero."""
    identity = jnp.eye(q.shape[1], dtype=q.dtype)
    for shift in (1e-5, 1e-6, 1e-7, 1e-8)[:passes]:
        gram = jnp.matmul(q.T, q, precision=lax.Precision.HIGHEST)
        # At least 1, so that columns of zeros, which stay such, have a factor.
        bound = jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), 1)
        factor = jnp.linalg.cholesky(gram + shift * bound * identity)
        # The inverse times q rather than a solve against q, which would gather a sharded q.
        inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
        q = jnp.matmul(q, inverse.T, precision=lax.Precision.HIGHEST)
    return q


def span(columns: jax.Array) -> jax.Array:
    """Columns of the same span, orthonormal to a few percent, for a product with the gradient.

    One pass suffices where the span is all that counts: it only has to keep the weak directions
    above the rounding errors of the strong ones.
    """
    return _cholesky_qr(_of_length_one(columns), passes=1)


def gaussian_basis(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An orthonormal basis of a uniformly random subspace, `(n, r)` float32."""
    gaussian = jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
    return orthonormalise(gaussian, gaussian)


@partial(jax.jit, static_argnames="shape")
def random_basis(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bases of shape `(*batch, n, r)`, float32."""
    keys = jax.random.split(key, math.prod(shape[:-2]))
    # One matrix at a time: batched Cholesky calls deadlock on CPU in jax 0.10.
    return lax.map(lambda key: gaussian_basis(key, shape[-2:]), keys).reshape(shape)


def svd(matrix: jax.Array, side: Side, basis: jax.Array, rounds: Any, key: Any) -> jax.Array:
    """The leading singular vectors, exactly (arXiv 2403.03507, equation 12)."""
    del rounds, key
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return (left if side == "left" else right.T)[:, : basis.shape[1]]


def eigh(matrix: jax.Array, side: Side, basis: jax.Array, rounds: Any, key: Any) -> jax.Array:
    """The same subspace from the eigenvectors of the smaller Gram matrix, `G Gᵀ` or `GᵀG`."""
    del rounds, key
    matrix = _with_side_first(matrix, side)
    wide = matrix.shape[0] <= matrix.shape[1]
    smaller = matrix if wide else matrix.T
    gram = jnp.matmul(smaller, smaller.T, precision=lax.Precision.HIGHEST)
    # Without a shift LAPACK may return NaN for rows whose squares leave float32's range.
    gram = gram + 1e-12 * jnp.eye(len(gram), dtype=gram.dtype)
    leading = jnp.linalg.eigh(gram)[1][:, : -basis.shape[1] - 1 : -1]
    return leading if wide else orthonormalise(matrix @ leading, basis)


def subspace_iteration(
    matrix: jax.Array, side: Side, basis: jax.Array, rounds: jax.Array, key: jax.Array
) -> jax.Array:
    """Rounds of `A = orth(Gᵀ P), P = orth(G A)`, warm-started from the old basis."""
    del key
    matrix = _with_side_first(matrix, side)

    def one_round(_: int, basis: jax.Array) -> jax.Array:
        return orthonormalise(matrix @ span(matrix.T @ basis), basis)

    return lax.fori_loop(0, rounds, one_round, basis)


def random(matrix: jax.Array, side: Side, basis: jax.Array, rounds: Any, key: Any) -> jax.Array:
    """A random subspace, whatever the gradient."""
    del matrix, side, rounds
    return gaussian_basis(key, basis.shape)


# Each takes a matrix (in, out), the side to project, the old basis (in or out, r), a number of
# rounds and a key, and returns the new basis; float32.
REFRESH: dict[str, Callable[[jax.Array, Side, jax.Array, Any, Any], jax.Array]] = {
    "subspace_iteration": subspace_iteration,
    "eigh": eigh,
    "svd": svd,
    "random": random,
}


def overlap(old: jax.Array, new: jax.Array) -> jax.Array:
    """Mean squared cosine of the principal angles between subspaces, `‖P_oldᵀP_new‖² / r`."""
    return jnp.sum((old.mT @ new) ** 2, axis=(-2, -1)) / old.shape[-1]


def _with_side_first(matrix: jax.Array, side: Side) -> jax.Array:
    return matrix if side == "left" else matrix.T
