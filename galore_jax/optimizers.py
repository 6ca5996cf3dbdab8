"""Ready-made chains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.subspace import Coordinates, is_coordinates
from galore_jax.transform import Chain, chain, galore

PyTree = Any


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    refresh: str = "subspace_iteration",
    basis_dtype: Any = None,
    seed: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> Chain:
    """AdamW on the coordinates, with weight decay in the full space (arXiv 2403.03507, section 4).

    Projected leaves move by `lr · scale · lift(Adam(R))`, all others by `lr · Adam(G)`; then every
    weight shrinks by `lr · weight_decay` of itself. The defaults are the reference's; `eps` is
    added after the bias correction, as in optax, where the reference adds it before.

    Args:
      learning_rate: a number, or a schedule of the update's number.
      rank: as are `update_proj_gap`, `scale`, `refresh`, `basis_dtype` and `seed`: see `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, times the learning rate, not times `scale`.
      mask: as for `optax.adamw`: which leaves decay, a tree of booleans or a function from the
        parameters (their shapes) to one; None: all.

    Returns:
      A `chain`; put a clip in front by `chain(clip, adamw(...))`. Nothing may come after it.

    Example:
      >>> import galore_jax, jax.numpy as jnp
      >>> tx = galore_jax.adamw(1e-2, rank=4, weight_decay=0.1)
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
    """
    return chain(
        galore(rank, update_proj_gap, scale, refresh=refresh, basis_dtype=basis_dtype, seed=seed),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.scale_by_learning_rate(learning_rate),
        decay_weights(learning_rate, weight_decay, mask),
    )


class DecayWeightsState(NamedTuple):
    """State of `decay_weights`: count, int32 scalar, updates so far."""

    count: jax.typing.ArrayLike


def decay_weights(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Decoupled decay of whole weights, the last link of a chain with galore; nothing comes after.

    With update u the weight becomes `(W + u) · (1 − lr · weight_decay)`, the reference's order.
    For a projected leaf the part of W outside the subspace decays too: the `Coordinates` carry the
    fraction to the lift.

    Args:
      learning_rate: a number, or a schedule of the update's number.
      weight_decay: per update and unit of learning rate.
      mask: which leaves decay, a tree of booleans or a function from the parameters (their shapes)
        to one; None: all.

    Returns:
      An optax transformation.

    Raises:
      ValueError: its `update` is called without `params`.
    """

    def init_fn(params: PyTree) -> DecayWeightsState:
        del params
        return DecayWeightsState(jnp.zeros([], jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        if params is None:
            raise ValueError(
                "decay_weights needs the parameters: call update(grads, state, params)."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        fraction = jnp.asarray(rate * weight_decay, jnp.float32)

        def decay(update: Any, param: Any, decays: bool) -> Any:
            if not decays:
                return update
            if isinstance(update, Coordinates):
                return Coordinates(update.value * (1 - fraction), update.projection, fraction)
            return update * (1 - fraction) - fraction * param

        decays = True if mask is None else mask(_full_shapes(params)) if callable(mask) else mask
        decays = jax.tree.broadcast(decays, updates, is_leaf=is_coordinates)
        updates = jax.tree.map(decay, updates, params, decays, is_leaf=is_coordinates)
        return updates, DecayWeightsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _full_shapes(params: PyTree) -> PyTree:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, Coordinates):
            return jax.ShapeDtypeStruct(leaf.projection.view.shape, leaf.value.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape, params, is_leaf=is_coordinates)
