"""`optax.chain` with support for galore: what comes after it works on coordinates."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.int8 import to_arrays
from galore_jax.ops.partition import specs_of, with_auto_axes
from galore_jax.ops.precision import widened
from galore_jax.optim import stock_chain
from galore_jax.optim.galore_state import (
    ChainState,
    GaLoreState,
    bases_of,
    boxed_as,
    constrain_unprojected,
    galore_states,
    map_bases,
    none_where_no_gradient,
    projected_tree,
    start_coordinates,
)
from galore_jax.optim.moments import (
    basis_changes,
    check_rotation,
    restore_moments,
    rotate,
    skip_updates,
)
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import is_coordinates
from galore_jax.types import PyTree


class GaLore(optax.GradientTransformationExtraArgs):
    """The result of `galore`, a type of its own so that `chain` recognises it."""


class Chain(optax.GradientTransformationExtraArgs):
    """What `chain` returns: a transformation that also offers its updates before the lift."""

    @property
    def transforms(self) -> tuple[optax.GradientTransformation, ...]:
        """The parts of the chain."""
        return cast(_ChainUpdate, self.update).transforms

    @property
    def update_coordinates(self) -> Callable[..., tuple[PyTree, ChainState]]:
        """`update` that leaves `Coordinates` as they are."""
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
        full weights.

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

    def init(params: PyTree) -> ChainState:
        states, bases, params = [], [], to_arrays(params)
        for tx in transforms:
            if isinstance(tx, GaLore):
                _warn_of_full_moments(states, params)
            states.append(stock_chain.start(tx, params))
            check_rotation(states[-1], bases)
            if bases:
                stock_chain.warn_of_copies(tx, params)
            new_galores = galore_states(states[-1])
            bases += bases_of(new_galores)
            params = start_coordinates(params, new_galores)
        return ChainState(tuple(states))

    def update_coordinates(updates: PyTree, state: ChainState, params: PyTree = None, **extra_args):
        # Before galore: as in optax.chain. After it: rotate moments, update, restore the moments of
        # skipped matrices. At the end: zero their updates. `changes` says what galore has done to
        # its bases; it is empty before galore, and if that projects nothing.
        states, changes = [], {}
        params = None if params is None else none_where_no_gradient(params, updates)
        for tx, old in zip(transforms, state.inner_states, strict=True):
            _check_not_after_decay(updates)
            if changes:
                ready = rotate(old, changes)
                update = optax.with_extra_args_support(tx).update
                updates, new = update(updates, ready, params, **extra_args)
                new = restore_moments(ready, new, changes)
            else:  # Galore itself, what comes before it, or a wrapper that may contain it.
                own = isinstance(tx, GaLore)
                update = tx.update if own else partial(stock_chain.update, tx)
                updates, new = update(updates, old, params, **extra_args)
                changes = basis_changes(old, new, whole=state)
                # For what reads parameters; jit removes it where nothing does, as in Adam.
                params = None if params is None else projected_tree(params, galore_states(new))
            states.append(new)
        return skip_updates(updates, changes), ChainState(tuple(states))

    return Chain(init, _ChainUpdate(transforms, update_coordinates))


@dataclasses.dataclass(frozen=True, eq=False)
class _ChainUpdate:
    """The `update` of a chain, with what `Chain` offers besides.

    `transforms` and `update_coordinates` live on the function, because `_replace` and other ways
    of rebuilding a named tuple drop its extra attributes.
    """

    transforms: tuple[optax.GradientTransformation, ...]
    update_coordinates: Callable[..., tuple[PyTree, ChainState]]

    def __call__(
        self, updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        def update(updates: PyTree, state: Any, params: PyTree, extra_args: Any):
            like = updates if params is None else none_where_no_gradient(params, updates)
            updates, state = self.update_coordinates(updates, state, params, **extra_args)
            return _lift(updates, galore_states(state.inner_states), like), state

        # Again, as what runs inside of with_auto_axes can use no arrays from here.
        params = to_arrays(params)
        like = updates if params is None else none_where_no_gradient(params, updates)
        arguments = updates, state, params, extra_args
        return with_auto_axes(update, *arguments, out=lambda: specs_of((like, state)))


def _lift(updates: PyTree, states: list[GaLoreState], like: PyTree) -> PyTree:
    """Full updates in the dtypes of `like`: the parameters or, without them, the gradients."""

    def lifted(basis: Basis, update: Any, like: Any) -> Any:
        if not is_coordinates(update):  # lifted already, by a chain inside of this one
            return update
        projection = basis.projection
        view = projection.view
        # What `ops.lift.lift_and_add` adds to the weights in place. There is a decay only with
        # parameters, which `like` then are.
        full = basis.scale * projection.lift_matrices(basis.vectors, update.value)
        if update.decay is not None:
            full -= update.decay[..., None, None] * widened(view.to_matrices(like))
        return view.from_matrices(full)

    def cast(update: Any, like: Any) -> jax.Array:
        return jnp.asarray(update, jnp.result_type(like.value if is_coordinates(like) else like))

    for state in states:
        updates = map_bases(lifted, state.bases, updates, like, otherwise=updates)
    return constrain_unprojected(jax.tree.map(cast, boxed_as(like, updates), like), states)


def _check_not_after_decay(updates: PyTree) -> None:
    for update in jax.tree.leaves(updates, is_leaf=is_coordinates):
        if is_coordinates(update) and update.decay is not None:
            raise ValueError(
                "chain: add_decayed_full_weights, with which adamw of galore_jax ends, must come "
                "last; put what follows it in front of galore, or around the chain."
            )


def _warn_of_full_moments(states: list[PyTree], params: PyTree) -> None:
    """Warns of optimizers in front of galore: a state with more numbers than parameters."""
    for state in states:
        if optax.tree.size(state) > optax.tree.size(params):
            warnings.warn(
                f"the transformation with the state {type(state).__name__} keeps moments of full "
                "size, because it precedes galore: put galore in front of it.",
                stacklevel=2,
            )
