"""Bases: project, lift, orthonormalise, and every way to refresh.

GaLore, arXiv 2403.03507, section 3: the gradient G of a weight matrix is kept as its coordinates
in the span of r orthonormal vectors P, `PᵀG` (left) or `G P` (right).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.matrices import MatrixView

Side = Literal["left", "right"]

# The age of a basis that no gradient has shaped yet; the next finite one does.
NEVER = 2**30


@dataclass(frozen=True)
class Projection:
    """How one parameter is projected.

    Attributes:
      view: the parameter as a batch of (in, out) matrices.
      side: "left" projects the in axis, "right" the out axis.
      rank: number r of basis vectors.
    """

    view: MatrixView
    side: Side
    rank: int

    @classmethod
    def std(cls, view: MatrixView, rank: int) -> "Projection":
        """The paper's choice: the smaller side, and of a square Flax kernel the in side."""
        return cls(view, "left" if view.rows <= view.columns else "right", rank)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """`(*batch, in, r)` for left, `(*batch, out, r)` for right."""
        size = self.view.rows if self.side == "left" else self.view.columns
        return (*self.view.batch, size, self.rank)

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """`(*batch, r, out)` for left, `(*batch, in, r)` for right."""
        if self.side == "left":
            return (*self.view.batch, self.rank, self.view.columns)
        return (*self.view.batch, self.view.rows, self.rank)

    def project(self, vectors: jax.Array, array: jax.Array) -> jax.Array:
        """`PᵀG` or `G P`: from `basis_shape`, `view.shape` to `coordinates_shape`, in float32."""
        matrices = self.view.to_matrices(array).astype(jnp.float32)
        vectors = vectors.astype(jnp.float32)
        return vectors.mT @ matrices if self.side == "left" else matrices @ vectors

    def lift_matrices(self, vectors: jax.Array, value: jax.Array) -> jax.Array:
        """`P N` or `N Pᵀ`, in float32.

        Args:
          vectors: `(..., in or out, r)`, any axes in front.
          value: `(..., r, out)` or `(..., in, r)`, the same axes in front.

        Returns:
          `(..., in, out)`.
        """
        vectors = vectors.astype(jnp.float32)
        return vectors @ value if self.side == "left" else value @ vectors.mT

    def lift(self, vectors: jax.Array, value: jax.Array) -> jax.Array:
        """From `basis_shape` and `coordinates_shape` to an array of `view.shape`, in float32."""
        return self.view.from_matrices(self.lift_matrices(vectors, value))


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Coordinates:
    """A gradient, moment or update of one projected parameter, in its basis.

    Stands in a tree where the parameter's leaf stood, so that every transformation after galore
    shapes its state by `value`.

    Attributes:
      value: `projection.coordinates_shape`.
      projection: static.
      decay: None, or the fraction of the parameter itself that the update takes away, a scalar;
        set by `decay_weights`, after which no other transformation may come.
    """

    value: Any
    projection: Projection = field(metadata={"static": True})
    decay: Any = None


def is_coordinates(node: Any) -> bool:
    """For `is_leaf` of tree maps over parameters or updates."""
    return isinstance(node, Coordinates)


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Basis:
    """The basis of one projected parameter.

    Attributes:
      vectors: orthonormal columns, `projection.basis_shape`.
      projection: static.
      full_size: static; True where the transformations after galore were started with full
        parameters, so that the gradient must reach them as `P PᵀG` in its full shape.
    """

    vectors: Any
    projection: Projection = field(metadata={"static": True})
    full_size: bool = field(default=False, metadata={"static": True})


def is_basis(node: Any) -> bool:
    """For `is_leaf` of tree maps over bases."""
    return isinstance(node, Basis)


def orthonormalise(columns: jax.Array, generic: jax.Array) -> jax.Array:
    """Orthonormal columns with the span of the given ones, by matmuls and r×r Cholesky only.

    Three passes of shifted Cholesky-QR over columns of length 1. A plain one fails where the Gram
    matrix is singular to working precision; a little of `generic` makes up what is missing.

    Args:
      columns: `(n, r)` float32, of any rank and scale, finite.
      generic: `(n, r)` full column rank, entries of size about 1/√n: the old basis or a Gaussian.

    Returns:
      Q `(n, r)`, `‖QᵀQ − I‖∞` about 1e-6.
    """
    # First by the largest entry: the squares of 1e-30 are zero in float32.
    largest = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
    columns = columns / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(columns, axis=0, keepdims=True)
    q = columns / jnp.where(length > 0, length, 1) + 1e-4 * generic
    identity = jnp.eye(q.shape[1], dtype=q.dtype)
    for shift in (1e-5, 1e-7, 1e-7):
        gram = jnp.matmul(q.T, q, precision=lax.Precision.HIGHEST)
        factor = jnp.linalg.cholesky(gram + shift * jnp.trace(gram) / len(gram) * identity)
        # The inverse times q rather than a solve against q, which would gather a sharded q.
        inverse = jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
        q = jnp.matmul(q, inverse.T, precision=lax.Precision.HIGHEST)
    return q


@partial(jax.jit, static_argnames="shape")
def random_basis(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Orthonormal Gaussian bases of shape `(*batch, n, r)`, float32."""
    batch, (n, rank) = shape[:-2], shape[-2:]

    def one(key: jax.Array) -> jax.Array:
        gaussian = jax.random.normal(key, (n, rank), jnp.float32) / n**0.5
        return orthonormalise(gaussian, gaussian)

    # One matrix at a time: batched Cholesky calls deadlock on CPU in jax 0.10.
    return lax.map(one, jax.random.split(key, math.prod(batch))).reshape(shape)


def svd(matrix: jax.Array, basis: jax.Array, rounds: jax.Array) -> jax.Array:
    """The leading left singular vectors, exactly (arXiv 2403.03507, equation 12)."""
    del rounds
    return jnp.linalg.svd(matrix, full_matrices=False)[0][:, : basis.shape[1]]


def eigh(matrix: jax.Array, basis: jax.Array, rounds: jax.Array) -> jax.Array:
    """The same subspace from the eigenvectors of `matrix @ matrix.T`: faster where n ≤ k."""
    del rounds
    gram = jnp.matmul(matrix, matrix.T, precision=lax.Precision.HIGHEST)
    return jnp.linalg.eigh(gram)[1][:, : -basis.shape[1] - 1 : -1]


def subspace_iteration(matrix: jax.Array, basis: jax.Array, rounds: jax.Array) -> jax.Array:
    """Rounds of `A = orth(Gᵀ P), P = orth(G A)`, warm-started from the old basis."""
    generic = jax.random.normal(jax.random.key(0), (matrix.shape[1], basis.shape[1]), jnp.float32)
    generic = generic / matrix.shape[1] ** 0.5

    def one_round(_: int, basis: jax.Array) -> jax.Array:
        return orthonormalise(matrix @ orthonormalise(matrix.T @ basis, generic), basis)

    return lax.fori_loop(0, rounds, one_round, basis)


# Each takes a matrix (n, k) whose n axis is projected, the old basis (n, r), and a number of
# rounds, and returns the new basis (n, r); float32.
REFRESH: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "subspace_iteration": subspace_iteration,
    "eigh": eigh,
    "svd": svd,
}


@partial(jax.jit, static_argnames="method")
def refresh_due(
    basis: Basis, ages: jax.Array, gradient: jax.Array, gap: int, method: str
) -> tuple[Basis, jax.Array]:
    """New bases for the matrices whose age has reached `gap`; the others cost nothing.

    A matrix whose gradient is not finite keeps its basis and its age, so that the next finite
    gradient refreshes it.

    Args:
      basis: of the parameter.
      ages: `(*batch,)` int32, updates since each matrix's basis was made.
      gradient: of the parameter's shape.
      gap: updates between refreshes (the paper's T).
      method: a name in `REFRESH`.

    Returns:
      The basis and the ages, 0 where a basis is new.
    """
    projection = basis.projection
    matrices = projection.view.to_matrices(gradient)
    matrices = matrices.reshape(-1, *matrices.shape[-2:])
    flat_ages = ages.reshape(-1)
    due = flat_ages >= gap
    order = jnp.argsort(~due)

    def refresh_one(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        vectors, ages = carry
        layer = order[i]
        matrix = matrices[layer].astype(jnp.float32)
        if projection.side == "right":
            matrix = matrix.T
        largest = jnp.max(jnp.abs(matrix))
        finite = jnp.isfinite(largest)
        matrix = jnp.where(finite, matrix / jnp.where(largest > 0, largest, 1), 0)
        rounds = jnp.where(ages[layer] >= NEVER, 3, 1)
        new = REFRESH[method](matrix, vectors[layer].astype(jnp.float32), rounds)
        good = finite & jnp.all(jnp.isfinite(new))
        new = jnp.where(good, new.astype(vectors.dtype), vectors[layer])
        return vectors.at[layer].set(new), ages.at[layer].set(jnp.where(good, 0, ages[layer]))

    flat_vectors = basis.vectors.reshape(-1, *basis.vectors.shape[-2:])
    # A loop over what is due, not a vmap of a cond, which would pay for every matrix every step.
    vectors, flat_ages = lax.fori_loop(0, due.sum(), refresh_one, (flat_vectors, flat_ages))
    new_basis = Basis(vectors.reshape(basis.vectors.shape), projection, basis.full_size)
    return new_basis, flat_ages.reshape(ages.shape)
