"""Decoupled weight decay of full weights, for chains with galore."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.subspace.matrix_view import is_function, unboxed
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.subspace.rules import static_hint
from galore_jax.types import Mask, PyTree


class AddDecayedFullWeightsState(NamedTuple):
    """State of `add_decayed_full_weights`: count, int32 scalar, number of updates so far."""

    count: jax.typing.ArrayLike


def add_decayed_full_weights(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask = None,
) -> optax.GradientTransformation:
    """Decoupled decay of full weights, as the last transformation of a chain with galore.

    With the update u, a weight becomes `(W + u) · (1 − lr · weight_decay)`, in the order of the
    reference. For a projected leaf the component of W outside the subspace decays too: the
    `Coordinates` carry the fraction to the lift.

    Args:
      learning_rate: a number, or a schedule of the update count.
      weight_decay: the coefficient, a number or a schedule: an update shrinks weights by the
        fraction `lr · weight_decay`.
      mask: which leaves decay, a tree of booleans or a function from the parameters (their shapes)
        to one; None: all.

    Returns:
      An optax transformation.

    Raises:
      ValueError: its `update` is called without `params`, or the mask is one boolean for a tree of
        parameters.
    """

    def init_fn(params: PyTree) -> AddDecayedFullWeightsState:
        del params
        return AddDecayedFullWeightsState(jnp.zeros([], jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        if params is None:
            raise ValueError(
                "add_decayed_full_weights needs the parameters: call update(grads, state, params)."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        coefficient = weight_decay(state.count) if callable(weight_decay) else weight_decay
        fraction = jnp.asarray(rate * coefficient, jnp.float32)
        is_tree = not jax.tree_util.all_leaves([params])
        if is_tree and isinstance(mask, bool | jax.Array):
            # What optax.inject_hyperparams makes of a function, which it calls with the count.
            raise ValueError(
                "add_decayed_full_weights: mask must be a function or a tree of booleans like the "
                f"parameters, not {mask}; {static_hint('mask')}."
            )

        def decay(update: Any, param: Any, decays: bool) -> Any:
            if not decays:
                return update
            if isinstance(update, Coordinates):
                shrunk = jax.tree.map(lambda part: part * (1 - fraction), update)
                return replace(shrunk, decay=fraction)
            return widened(update) * (1 - fraction) - fraction * widened(param)

        decays: Any = True if mask is None else mask
        if is_function(decays):
            decays = decays(_full_shapes(params))
        # One answer for each parameter, not for each array of its coordinates.
        leaves = jax.tree.map(lambda _: 0, updates, is_leaf=is_coordinates)
        decays = jax.tree.broadcast(unboxed(decays), leaves)
        updates = jax.tree.map(decay, updates, params, decays, is_leaf=is_coordinates)
        return updates, AddDecayedFullWeightsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _full_shapes(params: PyTree) -> PyTree:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, Coordinates):
            return jax.ShapeDtypeStruct(leaf.projection.view.shape, leaf.value.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape, params, is_leaf=is_coordinates)
