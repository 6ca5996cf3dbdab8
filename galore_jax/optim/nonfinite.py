"""What happens to a matrix whose gradient is not finite: the update leaves it as it was.

The policy, and where each part of it is carried out:

* `galore` replaces the coordinates of such a matrix by zeros (`zero_nonfinite`) and counts the
  update as skipped (`subspace.basis.count_update`); a refresh that was due stays due.
* The optimizer after it sees the zeros. Afterwards its moments are put back (`restore_moments`) and
  its updates, weight decay included, become zero (`skip_updates`), so that weights, moments and
  basis stay as they were, bit for bit.
* Where `optax.MultiSteps` after galore accumulates micro-batches, one that is not finite counts as
  zeros, and nothing is skipped (`accumulates`, `without_skips`).
* A clip in front of galore must not spread one NaN to every gradient: `clipping`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from galore_jax.optim.rotation import BasisUpdates, is_moment
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


def zero_nonfinite(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coordinates `(*batch, rows, columns)` with zeros for the matrices that are not finite.

    A matrix counts as finite if the sum of its squares is: an infinite one would end up in a second
    moment. What is not finite in a gradient shows in its coordinates.

    Returns:
      The coordinates, and which matrices are finite, `(*batch,)`.
    """
    finite = jnp.isfinite(jnp.sum(value**2, axis=(-2, -1)))
    return jnp.where(finite[..., None, None], value, 0), finite


def accumulates(state: PyTree) -> bool:
    """Whether a transformation with this state accumulates micro-batches."""
    is_accumulator = lambda node: isinstance(node, optax.MultiStepsState)
    return any(map(is_accumulator, jax.tree.leaves(state, is_leaf=is_accumulator)))


def without_skips(changes: BasisUpdates) -> BasisUpdates:
    """What happened to the bases, as if no update had been skipped."""
    return {
        path: (old, replace(new, finite=jnp.ones_like(new.finite)))
        for path, (old, new) in changes.items()
    }


def skip_updates(updates: PyTree, changes: BasisUpdates) -> PyTree:
    """The final updates of a chain, zero for the skipped matrices, which do not decay either."""

    def at_leaf(update: PyTree) -> PyTree:
        if not is_coordinates(update) or update.projection.path not in changes:
            return update  # A chain without galore may be inside of one that has it.
        finite = changes[update.projection.path][1].finite
        decay = None if update.decay is None else jnp.where(finite, update.decay, 0)
        value = jnp.where(finite[..., None, None], update.value, 0)
        return replace(update, value=value, decay=decay)

    return jax.tree.map(at_leaf, updates, is_leaf=is_coordinates)


def restore_moments(old: PyTree, new: PyTree, changes: BasisUpdates) -> PyTree:
    """The state `new` with the moments of the state `old` for the skipped matrices."""

    def at_moment(old: PyTree, new: PyTree) -> PyTree:
        if not is_moment(new) or new.projection.path not in changes:
            return new
        finite = changes[new.projection.path][1].finite
        if new.value.shape[: finite.ndim] != finite.shape:
            return new  # A statistic over several matrices, to which this one contributed zeros.
        finite = finite.reshape(finite.shape + (1,) * (new.value.ndim - finite.ndim))
        kept = jax.tree.map(lambda old, new: jnp.where(finite, new, old), old.value, new.value)
        return Coordinates(kept, new.projection)

    return jax.tree.map(at_moment, old, new, is_leaf=is_coordinates)
