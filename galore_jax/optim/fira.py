"""Fira: GaLore with Adam, and a step along what the projection leaves out (arXiv 2410.01623).

It needs full gradients and makes full updates, so it is an ordinary optax transformation. Nothing
else in this package knows it but `apollo.py`, which takes another direction with the same state.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.ops.loops import flatten_batch
from galore_jax.ops.partition import map_batch
from galore_jax.optim.galore_settings import Settings, with_settings_of_galore
from galore_jax.optim.galore_state import boxed_as, check_gradient, map_bases, to_float32
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.new_basis import count_update, refresh_if_due
from galore_jax.subspace.placement import matrices_partition
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.subspace.rules import Rank
from galore_jax.types import Mask, PyTree

# The largest factor by which the norm of a step may grow: γ in arXiv 2410.01623 and, equation 4, in
# arXiv 2412.05270.
MAX_GROWTH = 1.01

# From the basis of one matrix, its coordinates R, Adam's result N and the gradient G, (in, out):
# two parts of the update, (in, out), of which the limiter acts on the second.
Direction = Callable[[Basis, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]


class FiraState(NamedTuple):
    """State of `scale_by_fira`; each tree is like the parameters.

    Attributes:
      count: int32 scalar, number of updates so far.
      mu: Adam's first moments, float32; for projected leaves `Coordinates`, `(*batch, r, out)` with
        a left basis, `(*batch, in, r)` with a right one.
      nu: Adam's second moments, likewise.
      bases: a `Basis` for projected leaves, elsewhere `optax.MaskedNode()`.
      norm: for projected leaves `Coordinates` whose value, float32 `(*batch,)`, is the norm of the
        last limited step that was not zero, 0 before the first; elsewhere `optax.MaskedNode()`.
    """

    count: jax.typing.ArrayLike
    mu: PyTree
    nu: PyTree
    bases: PyTree
    norm: PyTree


@with_settings_of_galore
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """Fira: AdamW on the coordinates and a scaled step along the residual (arXiv 2410.01623).

    With a left basis P, the coordinates `R = PᵀG` and Adam's result N, the update of a projected
    leaf is `lr · scale · (P N + S)`. The step along the residual, `S = (G − P R) diag(φ)`, has one
    factor for each column, `φⱼ = ‖N[:, j]‖ / ‖R[:, j]‖`; where R is 0 it is 0. With a right basis
    rows take the place of columns. The norm-growth limiter scales S down until its norm is at most
    1.01 times that of the last step that was not zero. Each matrix of a stack has its own limiter.
    Other leaves get plain AdamW.

    The state is GaLore's and one number per matrix. It takes full gradients: those of
    `jax.value_and_grad`, or of `make_step`, layer by layer too. A gradient that is not finite is
    not skipped: put `optax.apply_if_finite` around it.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: factor of both parts of the update; the paper's formula has none.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: as for `optax.adamw`.
      mask: as for `optax.adamw`.
      **settings: other arguments of `galore`, but not `moments`, which are kept.

    Returns:
      An optax transformation.

    Raises:
      ValueError: at init, both sides of a leaf are projected; and as for `galore`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> tx = galore_jax.fira(1e-2, rank=4)
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (4, 16)
      >>> grads = {"kernel": jnp.arange(128.0).reshape(8, 16)}
      >>> updates, state = tx.update(grads, state, params)
    """
    return optax.chain(
        scale_by_fira(rank, update_proj_gap, scale, b1=b1, b2=b2, eps=eps, **settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_fira(
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    **settings: Any,
) -> optax.GradientTransformation:
    """The step of `fira`, without its learning rate and decay, for chains of your own."""
    where = Settings(rank, update_proj_gap, scale, **settings)
    return in_subspaces("fira", where, optax.scale_by_adam(b1, b2, eps), _direction)


def _direction(
    basis: Basis, coordinates: jax.Array, result: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`P N` and `S = (G − P R) diag(φ)`."""
    projection, vectors = basis.projection, basis.vectors
    factors = norm_ratio(channel_norms(projection, result), channel_norms(projection, coordinates))
    residual = gradient - projection.lift_matrices(vectors, coordinates)
    return projection.lift_matrices(vectors, result), residual * factors


def in_subspaces(
    name: str, settings: Settings, adam: Any, direction: Direction
) -> optax.GradientTransformation:
    """Adam on coordinates, and updates along a direction made from its result and the gradient.

    Args:
      name: of the optimizer, for error messages.
      settings: of the projection.
      adam: `optax.scale_by_adam`.
      direction: of a projected matrix.

    Returns:
      An optax transformation of full gradients.
    """
    if settings.moments != "keep":
        raise ValueError(f'{name}: moments="{settings.moments}" is for galore alone: leave it out.')

    def init(params: PyTree) -> FiraState:
        bases = settings.start_bases(params)

        def zeros(basis: Basis) -> Coordinates:
            projection = basis.projection
            if len(projection.sides) == 2:
                raise ValueError(
                    f'{name}: proj_type="full" projects both sides of {projection.name} and leaves '
                    'no channels to scale: use "std", "reverse_std", "left" or "right".'
                )
            return Coordinates(jnp.zeros(projection.coordinates_shape, jnp.float32), projection)

        def no_norm(basis: Basis) -> Coordinates:
            return Coordinates(jnp.zeros(basis.age.shape, jnp.float32), basis.projection)

        moments: Any = adam.init(map_bases(zeros, bases, otherwise=to_float32(params)))
        norm = map_bases(no_norm, bases, otherwise=bases)
        return FiraState(moments.count, moments.mu, moments.nu, bases, norm)

    def update(grads: PyTree, state: FiraState, params: PyTree = None) -> tuple[PyTree, FiraState]:
        del params
        lazy, seed = settings.overlap_and_seed()

        def refreshed(basis: Basis, gradient: Any) -> Basis:
            check_gradient(gradient, basis.projection)
            if is_coordinates(gradient):
                raise ValueError(
                    f"{name} needs full gradients: use jax.value_and_grad, or make_step."
                )
            basis = settings.applied_to(basis)
            return refresh_if_due(basis, gradient, lazy, seed=seed, count=state.count)

        def projected(basis: Basis, gradient: jax.Array) -> Coordinates:
            return Coordinates(basis.projection.project(basis.vectors, gradient), basis.projection)

        # P, R and N.
        bases = map_bases(refreshed, state.bases, grads, otherwise=state.bases)
        coordinates = map_bases(projected, bases, grads, otherwise=to_float32(grads))
        moments: Any = optax.ScaleByAdamState(state.count, state.mu, state.nu)
        results, moments = adam.update(coordinates, moments)
        # The update and the norm of its limited part.
        arguments = grads, coordinates, results, state.norm
        step = lambda *arguments: _step(direction, *arguments)
        pairs = map_bases(step, bases, *arguments, otherwise=bases)
        updates = map_bases(lambda _, pair: pair[0], bases, pairs, otherwise=results)
        norm = map_bases(lambda _, pair: pair[1], bases, pairs, otherwise=state.norm)
        counted = lambda basis: count_update(basis, jnp.ones(basis.age.shape, bool))
        bases = map_bases(counted, bases, otherwise=bases)
        state = FiraState(moments.count, moments.mu, moments.nu, bases, norm)
        return boxed_as(grads, updates), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _step(
    direction: Direction,
    basis: Basis,
    gradient: jax.Array,
    coordinates: Coordinates,
    result: Coordinates,
    norm: Coordinates,
) -> tuple[jax.Array, Coordinates]:
    """The update of a leaf, float32 of its shape, and the norms to keep."""
    projection = basis.projection

    def of_one(arrays: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        vectors, gradient, coordinates, result, last = arrays
        of_matrix = replace(basis, vectors=vectors)
        gradient = gradient.astype(jnp.float32)
        free, limited = direction(of_matrix, coordinates, result, gradient)
        limited, norm = limit_growth(limited, last)
        return free + limited, norm

    def of_all(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        # One after the other, so that no second array of the size of a stack exists.
        batch = arrays[-1].shape
        updates, norms = lax.map(of_one, flatten_batch(arrays, len(batch)))
        return updates.reshape(*batch, *updates.shape[1:]), norms.reshape(batch)

    matrices = projection.view.to_matrices(gradient)
    arrays = basis.vectors, matrices, coordinates.value, result.value, norm.value
    update, norms = map_batch(matrices_partition(projection), of_all, *arrays)
    return projection.view.from_matrices(basis.scale * update), Coordinates(norms, projection)


def channel_norms(projection: Projection, matrix: jax.Array) -> jax.Array:
    """The norm of each column with a left basis, `(1, out)`, of each row with a right one."""
    axis = 0 if "left" in projection.sides else 1
    return jnp.linalg.norm(matrix, axis=axis, keepdims=True)


def norm_ratio(one: jax.Array, other: jax.Array) -> jax.Array:
    """The ratio of norms, 0 where the second is 0."""
    return jnp.where(other > 0, one / jnp.where(other > 0, other, 1), 0)


def limit_growth(step: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norm-growth limiter: a step's norm is at most `MAX_GROWTH` times that of the last step.

    Args:
      step: of one matrix.
      last: the norm of the last step that was not zero; 0: there was none, and the step is not
        limited.

    Returns:
      The step, and the norm to keep.
    """
    norm = jnp.linalg.norm(step)
    limit = jnp.where(last > 0, MAX_GROWTH * last, jnp.inf)
    factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1)
    return factor * step, jnp.where(norm > 0, jnp.minimum(norm, limit), last)
