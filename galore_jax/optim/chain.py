"""`optax.chain` with support for galore: what comes after it works on coordinates."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.dtypes import widened
from galore_jax.ops.explicit import specs_of, with_auto_axes
from galore_jax.ops.lift import scaled_gradient
from galore_jax.optim.moments import BasisUpdates, check_rotation, compare_bases, rotate
from galore_jax.optim.nonfinite import (
    accumulates,
    restore_moments,
    skip_updates,
    without_skips,
)
from galore_jax.optim.state import (
    ChainState,
    GaLoreState,
    bases_of,
    boxed_as,
    constrain_unprojected,
    galore_states,
    is_low_rank,
    map_bases,
    project,
    start_coordinates,
    with_galore_states,
    with_gradient,
    without_boxes,
)
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import is_coordinates
from galore_jax.types import PyTree

# Names of states with a copy of the parameters, which would mix coordinates of different bases: of
# wrappers, which can stand around a chain, and of optimizers.
_WRAPPERS_WITH_COPIES = frozenset({"MechanicState", "SAMState", "ScheduleFreeState"})
_STATES_WITH_COPIES = _WRAPPERS_WITH_COPIES | {
    "COCOBState",
    "DoGState",
    "DoWGState",
    "MadgradState",
    "ProdigyState",
    "ScaleByDistanceOverGradientsState",
    "ScaleByLBFGSState",
}
_OWN_ERRORS = ("galore:", "chain:", "decay_weights")


class GaLore(optax.GradientTransformationExtraArgs):
    """The result of `galore`. Put it in `chain`, or call it with the inner transformation."""

    def __call__(self, inner: optax.GradientTransformation) -> "Chain":
        """`galore(...)(inner)` is `chain(galore(...), inner)`."""
        return chain(self, inner)


class FullGradientTransformation(optax.GradientTransformationExtraArgs):
    """A transformation in a `chain` that reads full gradients, although it comes after galore.

    Its `update` has three more keyword arguments: `gradients`, as galore received them;
    `coordinates`, as galore emitted them; and the `bases` that they are in.
    """


class Chain(optax.GradientTransformationExtraArgs):
    """What `chain` returns: a transformation that also offers its updates before the lift."""

    @property
    def transforms(self) -> tuple[optax.GradientTransformation, ...]:
        """The parts of the chain."""
        return cast(_ChainUpdate, self.update).transforms

    @property
    def update_coordinates(self) -> Callable[..., tuple[PyTree, PyTree, ChainState]]:
        """`update` that leaves `Coordinates` as they are.

        It also returns, before the state, the gradients to which their `channels` refer.
        """
        return cast(_ChainUpdate, self.update).update_coordinates


def is_chain(tx: Any) -> TypeGuard[Chain]:
    """Whether this is a `Chain` with the `update` that `chain` made: `_replace` may change it."""
    return isinstance(tx, Chain) and isinstance(tx.update, _ChainUpdate)


def chain(*transforms: optax.GradientTransformation) -> Chain:
    """`optax.chain` with galore in it: what comes after it works on coordinates, then is lifted.

    Transformations before `galore` see full parameters, and gradients as the update receives them:
    full ones, or coordinates from `galore_jax.value_and_grad`. Those after it are initialised with
    coordinates, and receive coordinates in place of updates and, if they use them, of parameters;
    so `optax.adamw` after galore decays only the component of the weights inside the subspace,
    while `galore_jax.adamw` decays full weights. Transformations that keep a copy of the parameters
    (schedule-free, lookahead, averages) do not belong after galore; wrap the whole chain in them.
    Nor does `optax.flatten`, whose moments no longer know their matrix, or what reads single
    weights or calls the loss, such as `optax.keep_params_nonnegative` or a line search. Functions
    for masks and labels see the path of a projected leaf with `value` at its end. If the parameters
    are in boxes (Flax's, NNX variables, Haliax' named arrays), masks and labels for optax's
    transformations after galore must be functions, or trees without boxes.

    Args:
      *transforms: as for `optax.chain`. A `chain` among them is flattened, so that a clip can be
        put in front of a ready-made optimizer. The decay of full weights comes last.

    Returns:
      A transformation whose updates have the parameters' shapes and dtypes. `apply_gradients`
      applies them without ever holding a lifted update of the whole tree.

    Raises:
      ValueError: something that is no transformation, or more than one galore; at init, moments
        that cannot be rotated, naming the leaf; at an update, a transformation after the decay of
        full weights, or one before galore that cannot work on projected gradients.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import chain, galore
      >>> tx = chain(optax.clip_by_global_norm(1.0), galore(rank=8), optax.lion(1e-4))
      >>> optax.tree.get(tx.init({"kernel": jnp.ones((64, 128))}), "mu")["kernel"].value.shape
      (8, 128)
    """
    transforms = tuple(
        inner for tx in transforms for inner in (tx.transforms if is_chain(tx) else (tx,))
    )
    for tx in transforms:
        if not callable(getattr(tx, "init", None)):
            raise ValueError(
                f"chain: {tx!r} is no optax transformation: pass what a function such as "
                "optax.adam(1e-3) returns."
            )
    if sum(isinstance(tx, GaLore) for tx in transforms) > 1:
        raise ValueError("chain: there is more than one galore; leave only one.")

    def init_fn(params: PyTree) -> ChainState:
        states, bases = [], []
        for tx in transforms:
            if isinstance(tx, GaLore):
                _warn_of_full_moments(states, params)
            states.append(start(tx, params))
            check_rotation(states[-1], bases)
            if bases:
                _warn_of_copies(states[-1])
            new_galores = galore_states(states[-1])
            bases += bases_of(new_galores)
            params = start_coordinates(params, new_galores)
        return ChainState(tuple(states))

    def update_coordinates(updates: PyTree, state: ChainState, params: PyTree = None, **extra_args):
        # `basis_updates` is empty until galore has been reached.
        states, basis_updates = [], {}
        gradients, full = updates, {}
        params = None if params is None else with_gradient(params, updates)
        for tx, old in zip(transforms, state.inner_states, strict=True):
            _check_not_after_decay(updates)
            if isinstance(tx, FullGradientTransformation):
                updates, new = tx.update(updates, old, params, **full)
            elif basis_updates:
                old = rotate(old, basis_updates)
                update = optax.with_extra_args_support(tx).update
                updates, new = update(updates, old, params, **extra_args)
                new = restore_moments(old, new, basis_updates)
            else:
                received = updates
                updates, new, basis_updates = update_low_rank(
                    tx, updates, old, params, **extra_args
                )
                if isinstance(tx, GaLore):
                    if accumulates(state):
                        basis_updates = without_skips(basis_updates)
                    gradients = received
                    full = {"bases": new.bases, "coordinates": updates, "gradients": received}
                if params is not None:
                    params = project(params, galore_states(new))
            states.append(new)
        return skip_updates(updates, basis_updates), gradients, ChainState(tuple(states))

    return Chain(init_fn, _ChainUpdate(transforms, update_coordinates))


@dataclasses.dataclass(frozen=True, eq=False)
class _ChainUpdate:
    """The `update` of a chain, with what `Chain` offers besides.

    They are here because what JAX and `_replace` make of a named tuple has its fields alone.
    """

    transforms: tuple[optax.GradientTransformation, ...]
    update_coordinates: Callable[..., tuple[PyTree, PyTree, ChainState]]

    def __call__(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        def update(updates: PyTree, state: Any, params: PyTree, extra_args: Any):
            like = updates if params is None else with_gradient(params, updates)
            found = self.update_coordinates(updates, state, params, **extra_args)
            updates, gradients, state = found
            return _lift(updates, gradients, galore_states(state.inner_states), like), state

        # Again, as what runs inside of with_auto_axes can use no arrays from here.
        like = updates if params is None else with_gradient(params, updates)
        arguments = updates, state, params, extra_args
        return with_auto_axes(update, *arguments, out=lambda: specs_of((like, state)))


def start(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Starts a transformation as `galore_jax.init` does, wherever the parameters lie."""
    states = galore_states(jax.eval_shape(tx.init, params))
    if not all(map(is_low_rank, states)):
        params = start_coordinates(params, states)
    state = tx.init(params)
    bases = bases_of(states)
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

    A stock chain hands the same `params` to all its parts. They must therefore be projected before
    it runs, into bases that it refreshes while it runs. Hence two calls: the first one is used only
    for its bases (under jit the rest of it is never compiled), and the second one finds nothing
    due.

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
    low_rank = all(map(is_low_rank, old))
    if isinstance(tx, GaLore):
        updates, state = tx.update(updates, state, params, **extra_args)
        return updates, state, compare_bases(old, galore_states(state)) if low_rank else {}
    tx = optax.with_extra_args_support(tx)
    if not old or not low_rank:
        projected = any(map(is_coordinates, jax.tree.leaves(updates, is_leaf=is_coordinates)))
        try:
            updates, new = tx.update(updates, state, params, **extra_args)
            if projected and jax.tree.structure(new) != jax.tree.structure(state):
                raise ValueError(f"its {type(state).__name__} would have another structure")
            return updates, new, {}
        except (AttributeError, TypeError, ValueError) as error:
            if not projected or str(error).startswith(_OWN_ERRORS):
                raise
            remedy = "remove it, give it labels or masks as trees instead of functions"
            if accumulates(state):
                remedy = "remove it, and accumulate by value_and_grad(…, micro_batches=…)"
            raise ValueError(
                "a wrapper around a chain with galore, or a transformation in front of galore, "
                f"cannot work on gradients that are coordinates ({str(error).splitlines()[0]}): "
                f"{remedy}, or use full gradients, by jax.value_and_grad."
            ) from error

    # First call: the refreshed bases.
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
    if accumulates(state):
        basis_updates = without_skips(basis_updates)

    # Second call: the update in these bases, whose ages of zero make no refresh due.
    fresh = [_with_age_zero(state) for state in new]
    ready = rotate(with_galore_states(state, fresh), basis_updates)
    coordinates = None if params is None else project(params, fresh)
    updates, after = tx.update(updates, ready, coordinates, **extra_args)
    after = restore_moments(ready, after, basis_updates)
    return skip_updates(updates, basis_updates), with_galore_states(after, new), basis_updates


def _with_age_zero(state: GaLoreState) -> GaLoreState:
    young = lambda basis: dataclasses.replace(basis, age=jnp.zeros_like(basis.age))
    return state._replace(bases=map_bases(young, state.bases, otherwise=state.bases))


def _lift(updates: PyTree, gradients: PyTree, states: list[GaLoreState], like: PyTree) -> PyTree:
    """Full updates in the dtypes of `like`: the parameters or, without them, the gradients."""

    def lifted(basis: Basis, update: Any, gradient: Any, like: Any) -> Any:
        if not is_coordinates(update):
            return update
        projection, full = basis.projection, jnp.float32(0)
        view = projection.view
        if update.value is not None:
            full += projection.lift_matrices(basis.vectors, update.value)
        if update.channels is not None:
            full += scaled_gradient(update.channels, view.to_matrices(gradient))
        full = basis.scale * full
        if update.decay is not None:
            full -= update.decay[..., None, None] * widened(view.to_matrices(like))
        return view.from_matrices(full)

    def cast(update: Any, like: Any) -> jax.Array:
        return jnp.asarray(update, jnp.result_type(like.value if is_coordinates(like) else like))

    for state in states:
        updates = map_bases(lifted, state.bases, updates, gradients, like, otherwise=updates)
    return constrain_unprojected(jax.tree.map(cast, boxed_as(like, updates), like), states)


def _check_not_after_decay(updates: PyTree) -> None:
    for update in jax.tree.leaves(updates, is_leaf=is_coordinates):
        if is_coordinates(update) and update.decay is not None:
            raise ValueError(
                "chain: a decay of full weights (decay_weights, and the end of galore_jax.adamw) "
                "must come last; put what follows it in front of galore, or around the chain."
            )


def _warn_of_full_moments(states: list[PyTree], params: PyTree) -> None:
    """Warns of optimizers in front of galore: a state with more numbers than parameters."""
    for state in states:
        if optax.tree.size(state) > optax.tree.size(params):
            warnings.warn(
                f"the transformation with the state {type(state).__name__} is in front of galore, "
                "where it keeps moments of full size: put galore in front of it.",
                stacklevel=2,
            )


def _warn_of_copies(state: PyTree) -> None:
    keeps_copies = lambda node: type(node).__name__ in _STATES_WITH_COPIES
    for node in jax.tree.leaves(state, is_leaf=keeps_copies):
        if keeps_copies(node):
            name = type(node).__name__
            is_wrapper = name in _WRAPPERS_WITH_COPIES
            remedy = "put it around the whole chain" if is_wrapper else "use another optimizer"
            warnings.warn(
                f"the transformation with the state {name} keeps a copy of the parameters, and "
                f"after galore these are coordinates in a basis that changes: {remedy} instead.",
                stacklevel=2,
            )
