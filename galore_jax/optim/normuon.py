"""NorMuon: Muon whose updates have neurons of equal size (arXiv 2510.05491)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.optim.muon import SCALE
from galore_jax.types import PyTree


class NeuronNormsState(NamedTuple):
    """State of `scale_by_neuron_norms`.

    Attributes:
      columns: for each leaf `(*batch, in, out)` the moving average of the squared updates of its
        neurons, float32 `(*batch, out)`.
    """

    columns: PyTree


def scale_by_neuron_norms(b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """Divides each neuron's update by its root mean square over time: NorMuon after Muon.

    With O the orthogonalised momentum of a kernel (in, out), NorMuon keeps for each of the out
    neurons `v ← b2 v + (1 − b2) mean(O²)`, the mean over the in axis. The update is
    `Ô = O / (√v + eps)`, scaled to a root mean square of 0.2. Put it after `scale_by_muon`, whose
    own factor it replaces.

    Args:
      b2: decay of the squares.
      eps: added to their root.

    Returns:
      An optax transformation of leaves whose last two axes are matrices.
    """

    def init_fn(params: PyTree) -> NeuronNormsState:
        zeros = lambda leaf: jnp.zeros((*leaf.shape[:-2], leaf.shape[-1]), jnp.float32)
        return NeuronNormsState(jax.tree.map(zeros, params))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params

        def averaged(update: jax.Array, old: jax.Array) -> jax.Array:
            return b2 * old + (1 - b2) * jnp.mean(widened(update) ** 2, -2)

        def at_leaf(update: jax.Array, columns: jax.Array) -> jax.Array:
            equal = widened(update) / (jnp.sqrt(columns[..., None, :]) + eps)
            square = jnp.mean(equal**2, (-2, -1), keepdims=True)
            factor = SCALE / jnp.sqrt(jnp.where(square > 0, square, 1))
            return (factor * equal).astype(update.dtype)

        columns = jax.tree.map(averaged, updates, state.columns)
        return jax.tree.map(at_leaf, updates, columns), NeuronNormsState(columns)

    return optax.GradientTransformation(init_fn, update_fn)
