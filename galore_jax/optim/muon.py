"""Muon's orthogonalised momentum, for coordinates and for whole matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.newton_schulz import newton_schulz
from galore_jax.ops.precision import widened
from galore_jax.ops.quantization import as_float32, stored_like
from galore_jax.optim.adam8bit import zero_moment
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree

# The singular values of an update over √max(in, out). It gives the entries of a full-rank update a
# root mean square of 0.2, as AdamW's typically have: arXiv 2502.16982, section 2.2.
SCALE = 0.2


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      mu: the moments, arrays or `Quantized` with "signed" codes.
    """

    mu: PyTree


def scale_by_muon(beta: float = 0.95, *, eight_bit: bool = False) -> optax.GradientTransformation:
    """Replaces each matrix by its orthogonalised momentum (Muon), the only moment that it keeps.

    The moment is `M ← β M + (1 − β) R`, and the update is the orthogonal factor O of the polar
    decomposition of `β M + (1 − β) R`, approximated by five steps of Newton–Schulz on the
    coordinates themselves, times `0.2 √max(in, out)`.

    For coordinates in a basis P the lifted update `P O` is the orthogonal factor of the lifted
    moment `P M`. So it is full-rank Muon's step for a gradient that vanishes outside the subspace,
    with the same singular values whatever the rank. Muon is steepest descent in the spectral norm
    (arXiv 2409.20325), and in that norm a step along r directions is as long as one along all of
    them: the learning rate of full-rank Muon, which itself carries over from AdamW and across
    widths by the factor above (arXiv 2502.16982), suits every rank.

    Args:
      beta: decay of the moment.
      eight_bit: whether the moment is kept in 8-bit codes, as in `scale_by_adam8bit`.

    Returns:
      An optax transformation for coordinates and for leaves whose last two axes are matrices.

    Raises:
      ValueError: at init, a leaf that is not a matrix, naming it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import chain, galore, scale_by_muon
      >>> tx = chain(galore(rank=8, scale=1.0), scale_by_muon(), optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 128))})
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (8, 128)
    """

    def init_fn(params: PyTree) -> ScaleByMuonState:
        for names, leaf in named_leaves(params, is_coordinates):
            if not is_coordinates(leaf) and (jnp.ndim(leaf) < 2 or jnp.iscomplexobj(leaf)):
                raise ValueError(
                    f"scale_by_muon: {'/'.join(names)} is {jax.typeof(leaf)}, and only real "
                    "matrices are orthogonalised: use galore_jax.muon, which updates the rest with "
                    "AdamW, or optax.partition."
                )
        zeros = lambda leaf: zero_moment(leaf, "signed" if eight_bit else None, is_matrix=True)
        return ScaleByMuonState(jax.tree.map(zeros, params, is_leaf=is_coordinates))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params

        def at_array(update: jax.Array, mu: Any) -> tuple[jax.Array, Any]:
            gradient = widened(update)
            new = beta * as_float32(mu) + (1 - beta) * gradient
            direction = newton_schulz(beta * new + (1 - beta) * gradient)
            return direction.astype(update.dtype), stored_like(new, mu)

        def at_leaf(update: Any, mu: Any) -> tuple[Any, Any]:
            if not is_coordinates(update):
                direction, mu = at_array(update, mu)
                return SCALE * max(update.shape[-2:]) ** 0.5 * direction, mu
            projection = update.projection
            direction, value = at_array(update.value, mu.value)
            longer = max(projection.view.rows, projection.view.columns)
            scaled = SCALE * longer**0.5 * direction
            return Coordinates(scaled, projection), Coordinates(value, projection)

        leaves, tree = jax.tree.flatten(updates, is_leaf=is_coordinates)
        pairs = list(map(at_leaf, leaves, tree.flatten_up_to(state.mu)))
        new, mu = (tree.unflatten([pair[i] for pair in pairs]) for i in range(2))
        return new, ScaleByMuonState(mu)

    return optax.GradientTransformation(init_fn, update_fn)
