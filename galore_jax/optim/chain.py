"""Chains that know galore: started with coordinates, run in them, lifted at the end."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.optim.moments import (
    BasisUpdates,
    check_rotation,
    compare_bases,
    is_moment,
    keep_skipped,
    rotate,
    skip,
)
from galore_jax.optim.per_matrix import PerMatrixState, init_per_matrix, update_per_matrix
from galore_jax.optim.state import (
    ChainState,
    GaLoreState,
    bases_of,
    boxed_as,
    galore_states,
    is_low_rank,
    map_bases,
    project,
    start_coordinates,
    with_galore_states,
    with_gradient,
    without_boxes,
)
from galore_jax.subspace.matrix_view import MatrixView
from galore_jax.subspace.projection import Basis, Coordinates, Moments, Projection, is_coordinates
from galore_jax.types import PyTree

# States that keep a copy of the parameters, which would mix coordinates of different bases.
_KEEP_COPIES = frozenset(
    {
        "COCOBState",
        "DoGState",
        "DoWGState",
        "MechanicState",
        "ProdigyState",
        "SAMState",
        "ScaleByLBFGSState",
        "ScheduleFreeState",
    }
)


class GaLore(optax.GradientTransformationExtraArgs):
    """What `galore` returns: a transformation for `chain`, or called with what comes after it."""

    moments: Moments

    def __call__(self, inner: optax.GradientTransformation) -> "Chain":
        """`galore(...)(inner)` is `chain(galore(...), inner)`."""
        return chain(self, inner)


class Chain(optax.GradientTransformationExtraArgs):
    """What `chain` returns: an optax transformation that also offers its update before the lift."""

    transforms: tuple[optax.GradientTransformation, ...]
    update_coordinates: Callable[..., tuple[PyTree, ChainState]]


def chain(*transforms: optax.GradientTransformation) -> Chain:
    """`optax.chain` that knows galore: what comes after it runs in coordinates, then is lifted.

    Transformations before `galore` see full gradients and parameters; those after it are started
    with and fed coordinates, of the parameters too where they read them. So `optax.adamw` there
    decays only the part of the weights inside the subspace: `galore_jax.adamw` decays them
    whole. Transformations that keep a copy of the parameters (schedule-free, lookahead, averages)
    do not belong after galore; wrap the whole chain in them. Where the parameters are in Flax's
    boxes, masks and labels for optax's transformations after galore are functions, or trees without
    boxes.

    With `galore(moments="reset")` those that keep moments run once for each matrix, with a count of
    its own: what they do across leaves, such as a clip by global norm inside an `optax.chain`, they
    then do within one. Make it an argument of its own.

    Args:
      *transforms: as for `optax.chain`; a `chain` among them is laid open, so that a clip can be
        put in front of a ready-made optimizer. What decays whole weights comes last.

    Returns:
      A transformation whose updates have the parameters' shapes and dtypes. `apply_gradients`
      applies them without ever holding a lifted update of the whole tree.

    Raises:
      ValueError: more than one galore; at init, moments that cannot be rotated, naming the leaf;
        at an update, something after a decay of whole weights.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import chain, galore
      >>> tx = chain(optax.clip_by_global_norm(1.0), galore(rank=8), optax.lion(1e-4))
      >>> optax.tree.get(tx.init({"kernel": jnp.ones((64, 128))}), "mu")["kernel"].value.shape
      (8, 128)
    """
    transforms = tuple(
        inner for tx in transforms for inner in (tx.transforms if isinstance(tx, Chain) else (tx,))
    )
    if sum(isinstance(tx, GaLore) for tx in transforms) > 1:
        raise ValueError("chain: there is more than one galore; leave only one.")

    def init_fn(params: PyTree) -> ChainState:
        states, bases, resets = [], [], False
        for tx in transforms:
            if resets and _keeps_moments(tx):
                states.append(init_per_matrix(tx, params))
            else:
                states.append(init(tx, params))
            check_rotation(states[-1], bases)
            if bases:
                _warn_of_copies(states[-1])
            resets |= isinstance(tx, GaLore) and tx.moments == "reset"
            found = galore_states(states[-1])
            bases += bases_of(found)
            params = start_coordinates(params, found)
        return ChainState(tuple(states))

    def update_coordinates(updates: PyTree, state: ChainState, params: PyTree = None, **extra_args):
        states, basis_updates = [], {}
        params = None if params is None else with_gradient(params, updates)
        for tx, old in zip(transforms, state.inner_states, strict=True):
            _check_not_after_decay(updates)
            if isinstance(old, PerMatrixState):
                updates, new = update_per_matrix(
                    tx, updates, old, params, basis_updates, **extra_args
                )
            elif basis_updates:
                old = rotate(old, basis_updates)
                extended = optax.with_extra_args_support(tx)
                updates, new = extended.update(updates, old, params, **extra_args)
                new = keep_skipped(old, new, basis_updates)
            else:
                updates, new, basis_updates = update_low_rank(
                    tx, updates, old, params, **extra_args
                )
                if params is not None:
                    params = project(params, galore_states(new))
            states.append(new)
        return skip(updates, basis_updates), ChainState(tuple(states))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        coordinates, state = update_coordinates(updates, state, params, **extra_args)
        like = updates if params is None else with_gradient(params, updates)
        return _lift(coordinates, galore_states(state.inner_states), like), state

    tx = Chain(init_fn, update_fn)
    tx.transforms, tx.update_coordinates = transforms, update_coordinates
    return tx


def init(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Starts any optax transformation so that what comes after a `galore` in it is low-rank.

    In place of `tx.init(params)` for a stock `optax.chain(galore(...), ...)`. What comes after
    galore is started with float32, so moments are float32 whatever the parameters' dtype: zero
    `Coordinates` for projected leaves, the others themselves. Without galore it is `tx.init`.

    Args:
      tx: any transformation, with galore anywhere in it, or without.
      params: the parameters.

    Returns:
      The optimizer's state, for `apply_gradients`. (The updates of a stock `tx.update` are not
      lifted; those of a `chain` are.)

    Raises:
      ValueError: a stock transformation around `galore(moments="reset")`; moments that cannot be
        rotated, naming the leaf.
    """
    states = galore_states(jax.eval_shape(tx.init, params))
    if not all(map(is_low_rank, states)):
        params = start_coordinates(params, states)
    state = tx.init(params)
    bases = bases_of(states)
    if not isinstance(tx, GaLore) and any(basis.moments == "reset" for basis in bases):
        raise ValueError(
            'galore: moments="reset" needs galore_jax.chain in place of optax.chain: a stock chain '
            "keeps one count for all matrices."
        )
    check_rotation(state, bases)
    if bases:
        _warn_of_copies(state)
    return state


def update_low_rank(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, PyTree, BasisUpdates]:
    """`tx.update` with the parameters' coordinates in the bases of this very update.

    A stock chain hands the same `params` to all its parts, so they must be projected before it
    runs, into bases that it refreshes while it runs. Hence a first call that is asked for nothing
    but the bases (under jit the rest of it is never compiled), and a second that finds them fresh.

    Args:
      tx: any transformation, started by `init`.
      updates: gradients, or what the transformation before it made of them.
      state: of `tx`.
      params: the parameters, or None.
      **extra_args: for `tx.update`.

    Returns:
      The updates, `Coordinates` where a galore in `tx` projects; the state; and what happened to
      the bases.

    Raises:
      ValueError: a part of a stock transformation cannot work on coordinates.
    """
    old = galore_states(state)
    tx = tx if isinstance(tx, GaLore) else optax.with_extra_args_support(tx)
    if isinstance(tx, GaLore):
        updates, state = tx.update(updates, state, params, **extra_args)
        new = galore_states(state)
        return updates, state, compare_bases(old, new) if all(map(is_low_rank, old)) else {}
    if not old or not all(map(is_low_rank, old)):
        try:
            return *tx.update(updates, state, params, **extra_args), {}
        except (AttributeError, TypeError, ValueError) as error:
            if not any(map(is_coordinates, jax.tree.leaves(updates, is_leaf=is_coordinates))):
                raise
            raise ValueError(
                "a wrapper around a chain with galore, or what stands in front of galore, cannot "
                f"work on gradients that are coordinates ({str(error).splitlines()[0]}): take it "
                "away, or use full gradients, by jax.value_and_grad."
            ) from error
    try:
        updates = without_boxes(updates, old)
        coordinates = None if params is None else project(params, old)
        _, probe = tx.update(updates, state, coordinates, **extra_args)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "a transformation around or before galore cannot work on its coordinates "
            f"({error}): use galore_jax.chain in place of optax.chain, inside all wrappers."
        ) from error
    new = galore_states(probe)
    basis_updates = compare_bases(old, new)
    fresh = [_with_age_zero(state) for state in new]
    ready = rotate(with_galore_states(state, fresh), basis_updates)
    coordinates = None if params is None else project(params, fresh)
    updates, after = tx.update(updates, ready, coordinates, **extra_args)
    after = keep_skipped(ready, after, basis_updates)
    return skip(updates, basis_updates), with_galore_states(after, new), basis_updates


def _keeps_moments(tx: optax.GradientTransformation) -> bool:
    """Whether it keeps something for each parameter, found without any: for `optax.tree`."""
    view = MatrixView((2, 3), (0,), (1,))
    sample = Coordinates(jnp.zeros((1, 3)), Projection((), view, ("left",), 1))
    try:
        state = jax.eval_shape(tx.init, sample)
    except (AttributeError, TypeError, ValueError):
        return True  # It wants a whole tree; `init_per_matrix` will say which leaf is refused.
    return any(map(is_moment, jax.tree.leaves(state, is_leaf=is_coordinates)))


def _with_age_zero(state: GaLoreState) -> GaLoreState:
    young = lambda basis: dataclasses.replace(basis, age=jnp.zeros_like(basis.age))
    return state._replace(bases=map_bases(young, state.bases, otherwise=state.bases))


def _lift(updates: PyTree, states: list[GaLoreState], like: PyTree) -> PyTree:
    """Full updates in the dtype of `like`: the parameters, or without these the gradients."""

    def lifted(basis: Basis, update: Any, like: Any) -> Any:
        if not is_coordinates(update):
            return update
        view = basis.projection.view
        full = basis.scale * basis.projection.lift(basis.vectors, update.value)
        if update.decay is None:
            return full
        return full - view.from_matrices(update.decay[..., None, None] * view.to_matrices(like))

    def cast(update: Any, like: Any) -> jax.Array:
        return jnp.asarray(update, jnp.result_type(like.value if is_coordinates(like) else like))

    for state in states:
        updates = map_bases(lifted, state.bases, updates, like, otherwise=updates)
    return jax.tree.map(cast, boxed_as(like, updates), like)


def _check_not_after_decay(updates: PyTree) -> None:
    for update in jax.tree.leaves(updates, is_leaf=is_coordinates):
        if is_coordinates(update) and update.decay is not None:
            raise ValueError(
                "chain: a decay of whole weights (decay_weights, and the end of galore_jax.adamw) "
                "must come last; put what follows it in front of galore, or around the chain."
            )


def _warn_of_copies(state: PyTree) -> None:
    keeps_copies = lambda node: type(node).__name__ in _KEEP_COPIES
    for node in jax.tree.leaves(state, is_leaf=keeps_copies):
        if keeps_copies(node):
            warnings.warn(
                f"the transformation with the state {type(node).__name__} keeps a copy of the "
                "parameters, and after galore these are coordinates in a basis that changes: put "
                "it around the whole chain instead.",
                stacklevel=2,
            )
