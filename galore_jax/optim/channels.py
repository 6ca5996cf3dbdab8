"""Steps along the full gradient with a factor per channel: what Fira and APOLLO have in common.

A channel is a column of a gradient with a left basis, and a row with a right one: what runs along
the projected axis. A factor per channel is an array `(*batch, 1, out)` or `(*batch, in, 1)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.ops.loops import flatten_batch
from galore_jax.ops.partition import map_batch
from galore_jax.ops.quantization import as_float32
from galore_jax.optim.chain import FullGradientTransformation
from galore_jax.optim.flax_serialization import register_if_flax_imported
from galore_jax.optim.state import map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.placement import matrices_partition
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.types import PyTree

# The largest factor by which the norm of a step may grow: γ in arXiv 2410.01623 and, equation 4, in
# arXiv 2412.05270.
MAX_GROWTH = 1.01

# From the basis, the optimizer's result N, the coordinates R, the gradient `(*batch, in, out)` and
# the norm before, `(*batch,)`: the update, with channels, and the norm to keep.
Step = Callable[[Basis, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Coordinates, jax.Array]]


class ScaleChannelsState(NamedTuple):
    """State of `scale_channels`.

    Attributes:
      norm: the parameters' tree with `Coordinates` for projected leaves, whose value, float32
        `(*batch,)`, is the norm of each matrix's last step along its gradient, 0 before the first;
        `optax.MaskedNode()` elsewhere.
    """

    norm: PyTree


def scale_channels(name: str, step: Step) -> FullGradientTransformation:
    """Adds a step along the full gradient to each update of coordinates, or puts it in its place.

    Args:
      name: of the optimizer, for error messages.
      step: computes the update of a projected leaf. Other leaves are passed on.

    Returns:
      A transformation for a `chain`, behind the one that turns R into N.
    """

    def init_fn(params: PyTree) -> ScaleChannelsState:
        register_if_flax_imported()

        def zeros(param: Any) -> Any:
            if not is_coordinates(param):
                return optax.MaskedNode()
            projection = param.projection
            if len(projection.sides) == 2:
                raise ValueError(
                    f'{name}: proj_type="full" projects both sides of {projection.name} and leaves '
                    'no channels to scale: use "std", "reverse_std", "left" or "right".'
                )
            return Coordinates(jnp.zeros(projection.view.batch, jnp.float32), projection)

        return ScaleChannelsState(jax.tree.map(zeros, params, is_leaf=is_coordinates))

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        bases: PyTree = None,
        coordinates: PyTree = None,
        gradients: PyTree = None,
    ) -> tuple[PyTree, ScaleChannelsState]:
        del params

        def at_leaf(basis: Basis, update: Any, coordinates: Any, gradient: Any, norm: Any) -> Any:
            if is_coordinates(gradient):
                raise ValueError(FULL_GRADIENTS)
            projection = basis.projection
            matrices = projection.view.to_matrices(gradient)
            arguments = update.value, coordinates.value, matrices, norm.value
            update, norm = step(basis, *arguments)
            return update, Coordinates(norm, projection)

        arguments = updates, coordinates, gradients, state.norm
        pairs = map_bases(at_leaf, bases, *arguments, otherwise=bases)
        new, norm = (
            map_bases(lambda _, pair, i=i: pair[i], bases, pairs, otherwise=otherwise)
            for i, otherwise in enumerate((updates, state.norm))
        )
        return new, ScaleChannelsState(norm)

    return FullGradientTransformation(init_fn, update_fn)


FULL_GRADIENTS = (
    "galore_jax.fira and galore_jax.apollo need full gradients: use jax.value_and_grad without "
    "galore_jax.refresh, or layerwise.make_step(…, projected=False)."
)


def check_coordinates_suffice(state: PyTree) -> None:
    """Raises a ValueError if the state is of an optimizer that needs full gradients."""
    is_state = lambda node: isinstance(node, ScaleChannelsState)
    if any(map(is_state, jax.tree.leaves(state, is_leaf=is_state))):
        raise ValueError(FULL_GRADIENTS)


def channel_norms(projection: Projection, matrices: jax.Array) -> jax.Array:
    """The norm of each channel of a gradient or of coordinates, `(…, in, out)`."""
    axis = -2 if "left" in projection.sides else -1
    return jnp.sqrt(jnp.sum(matrices.astype(jnp.float32) ** 2, axis=axis, keepdims=True))


def residual_norms(basis: Basis, coordinates: jax.Array, matrices: jax.Array) -> jax.Array:
    """The norm of each channel of the residual `G − P PᵀG` (left), `G − G P Pᵀ` (right).

    Args:
      basis: P.
      coordinates: of the gradient, `(*batch, rows, columns)`.
      matrices: the gradient, `(*batch, in, out)`.
    """
    projection = basis.projection

    def of_one(arguments: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        vectors, coordinates, matrix = arguments
        lifted = projection.lift_matrices(vectors, coordinates)
        return channel_norms(projection, as_float32(matrix) - lifted)

    def of_each(vectors: Any, coordinates: jax.Array, matrices: jax.Array) -> jax.Array:
        # One after the other, so that the residual of only one matrix exists.
        batch = matrices.shape[:-2]
        stacks = flatten_batch((vectors, coordinates, matrices), len(batch))
        norms = lax.map(of_one, stacks)
        return norms.reshape(*batch, *norms.shape[1:])

    partition = matrices_partition(projection)
    return map_batch(partition, of_each, basis.vectors, coordinates, matrices)


def norm_ratio(one: jax.Array, other: jax.Array) -> jax.Array:
    """The ratio of norms, 0 where the second is 0."""
    return jnp.where(other > 0, one / jnp.where(other > 0, other, 1), 0)


def limit_growth(norms: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norm-growth limiter: a step's norm is at most `MAX_GROWTH` times that of the last step.

    Args:
      norms: of the channels of the step, with the last two axes of a matrix.
      last: the norm of the last step that was not zero, `(*batch,)`; 0: there was none, and the
        step is not limited.

    Returns:
      The factor of the step, `(*batch, 1, 1)`, which is 0 if its norm is not finite; and the norm
      to keep.
    """
    norm = jnp.sqrt(jnp.sum(norms**2, axis=(-2, -1)))
    limit = jnp.where(last > 0, MAX_GROWTH * last, jnp.inf)
    finite = jnp.isfinite(norm)
    factor = jnp.where(norm > limit, limit / norm, 1)
    kept = jnp.where(finite & (norm > 0), jnp.minimum(norm, limit), last)
    return jnp.where(finite, factor, 0)[..., None, None], kept
