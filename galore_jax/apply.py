"""Parameters updated from coordinates in place, leaf by leaf and layer by layer."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.quantization import stochastic_round
from galore_jax.state import galore_states, map_bases
from galore_jax.subspace import Basis, is_coordinates
from galore_jax.transform import Chain, update_low_rank

PyTree = Any


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    key: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """One step: `tx.update` and `optax.apply_updates` in one, for any transformation.

    Call it under `jax.jit` with the parameters and the state donated. Coordinates are then lifted
    and added in place, one matrix at a time: no lifted update of a whole stacked leaf exists. (A
    wrapper around a `chain`, such as `optax.inject_hyperparams`, hands out lifted updates.)

    Args:
      tx: any transformation.
      grads: full gradients, or `Coordinates` where leaves are projected.
      state: from `init(tx, params)`, or from `tx.init(params)` for a `chain`.
      params: the parameters.
      key: where given, bfloat16 parameters are rounded stochastically. Rounding to nearest swallows
        updates below 1/512 of a weight; a stochastic one keeps them on average.
      **extra_args: for the transformations, as those of `tx.update`.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: a part of a stock transformation cannot work on coordinates.
    """
    if isinstance(tx, Chain):
        updates, state = tx.update_coordinates(grads, state, params, **extra_args)
        states = galore_states(state.links)
    else:
        updates, state = update_low_rank(tx, grads, state, params, **extra_args)
        states = galore_states(state)
    leaves, tree = jax.tree.flatten(params)
    keys = tree.unflatten(
        [None] * len(leaves) if key is None else jax.random.split(key, len(leaves))
    )

    def add(update: Any, param: jax.Array, key: Any) -> Any:
        if is_coordinates(update):
            return update
        param = jnp.asarray(param)
        return _rounded(_at_least_float32(param) + update, param.dtype, key)

    def lift_and_add(
        scale: jax.Array, basis: Basis, update: Any, param: jax.Array, key: Any
    ) -> Any:
        if not is_coordinates(update):
            return update
        return _lift_and_add(basis, scale, update, param, key)

    # Unprojected leaves first; then each galore puts its new parameters where coordinates stand.
    new = jax.tree.map(add, updates, params, keys, is_leaf=is_coordinates)
    for galore_state in states:
        at_leaf = partial(lift_and_add, galore_state.scale)
        new = map_bases(at_leaf, galore_state.bases, new, params, keys, otherwise=new)
    return new, state


@jax.jit
def _lift_and_add(basis: Basis, scale: jax.Array, update: Any, param: jax.Array, key: Any):
    projection = basis.projection
    vectors, value, matrices = (
        array.reshape(-1, *array.shape[-2:])
        for array in (basis.vectors, update.value, projection.view.to_matrices(param))
    )

    def one(layer: jax.Array, matrices: jax.Array) -> jax.Array:
        old = _at_least_float32(matrices[layer])
        kept = old if update.decay is None else old * (1 - update.decay)
        new = kept + scale * projection.lift_matrices(vectors[layer], value[layer])
        layer_key = None if key is None else jax.random.fold_in(key, layer)
        return matrices.at[layer].set(_rounded(new, matrices.dtype, layer_key))

    return projection.view.from_matrices(lax.fori_loop(0, len(matrices), one, matrices))


def _at_least_float32(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rounded(x: jax.Array, dtype: Any, key: jax.Array | None) -> jax.Array:
    if key is None or dtype != jnp.bfloat16:
        return x.astype(dtype)
    return stochastic_round(x, key)
