"""Galore inside transformations that do not know it, such as a literal `optax.chain`.

Such a transformation initialises all its parts with the same parameters, and hands the same
parameters to all of them at an update. `start` therefore runs its `init` twice, and `update` its
`update`. Both serve every transformation: one without galore is called once, as it is.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr

from galore_jax.ops.int8 import to_arrays
from galore_jax.optim.galore_state import (
    GaLoreState,
    bases_of,
    check_gradient,
    galore_states,
    is_low_rank,
    map_bases,
    projected_tree,
    start_coordinates,
    with_galore_states,
    without_boxes,
)
from galore_jax.optim.moments import (
    basis_changes,
    check_rotation,
    restore_moments,
    rotate,
    skip_updates,
)
from galore_jax.subspace.basis import Basis, in_buffer_of
from galore_jax.types import PyTree


def start(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Starts any transformation: what comes after a galore in it with zero coordinates.

    Which parameters are projected shows only once its `init` has run with full ones; a `Chain` has
    already started its parts with coordinates.
    """
    params = to_arrays(params)
    states = galore_states(jax.eval_shape(tx.init, params))
    if not all(map(is_low_rank, states)):
        params = start_coordinates(params, states)
    state, bases = tx.init(params), bases_of(states)
    check_rotation(state, bases)
    if bases:
        warn_of_copies(tx, params)
    return state


def update(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """`tx.update` with the parameters' coordinates in the bases of this very update.

    A stock chain must be given projected parameters before it runs, in bases that it refreshes
    while it runs. Hence two calls: the first one is used only for its bases (under jit the rest of
    it is never compiled), and the second one finds nothing due.

    Args:
      tx: any transformation, started by `start`.
      updates: gradients, or what the transformation before it made of them.
      state: of `tx`.
      params: the parameters, or None.
      **extra_args: for `tx.update`.

    Returns:
      The updates, `Coordinates` where a galore in `tx` projects, and the state.
    """
    tx, old = optax.with_extra_args_support(tx), galore_states(state)
    if not old or not all(map(is_low_rank, old)):
        return tx.update(updates, state, params, **extra_args)

    # First call: the refreshed bases. A wrapper may not run galore this time, as
    # `optax.MultiSteps` between its updates: then nothing has happened to the bases.
    old = [state._replace(bases=_idle(state.bases)) for state in old]
    state = with_galore_states(state, old)
    updates = without_boxes(updates, old)
    # Before the parameters are projected, which a gradient of None or another shape would break.
    check = lambda basis, update: check_gradient(update, basis.projection)
    for own in old:
        map_bases(check, own.bases, updates, otherwise=own.bases)
    coordinates = None if params is None else projected_tree(params, old)
    _, probe = tx.update(updates, state, coordinates, **extra_args)
    new, changes = galore_states(probe), basis_changes(state, probe, whole=state)

    # Second call: the update in these bases, whose ages of zero make no refresh due.
    fresh = [_with_age_zero(state) for state in new]
    ready = rotate(with_galore_states(state, fresh), changes)
    coordinates = None if params is None else projected_tree(params, fresh)
    updates, after = tx.update(updates, ready, coordinates, **extra_args)
    after = restore_moments(ready, after, changes)
    return skip_updates(updates, changes), with_galore_states(after, new)


def _idle(bases: PyTree) -> PyTree:
    def at_basis(basis: Basis) -> Basis:
        flags = {
            "refreshed": in_buffer_of(basis.refreshed, False),
            "finite": in_buffer_of(basis.finite, True),
        }
        return dataclasses.replace(basis, **flags)

    return map_bases(at_basis, bases, otherwise=bases)


def _with_age_zero(state: GaLoreState) -> GaLoreState:
    young = lambda basis: dataclasses.replace(basis, age=jnp.zeros_like(basis.age))
    return state._replace(bases=map_bases(young, state.bases, otherwise=state.bases))


def warn_of_copies(tx: optax.GradientTransformation, params: PyTree) -> None:
    """Warns of a transformation whose state depends on the values of the parameters.

    After galore it would mix coordinates of different bases. Moments start at zero, whatever the
    parameters are.
    """
    jaxpr = jax.make_jaxpr(tx.init)(params).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if any(used):
        name = type(jax.eval_shape(tx.init, params)).__name__
        warnings.warn(
            f"the transformation with the state {name} keeps a copy of the parameters, and after "
            "galore these are coordinates in a basis that changes: put it around the whole chain, "
            "or use another optimizer instead.",
            stacklevel=2,
        )
