"""GaLore as an optax transformation (arXiv 2403.03507).

`galore` turns the gradient of each matrix into its coordinates in a low-rank basis; whatever optax
transformation comes after it works on the coordinates, so its state is low-rank; the end lifts
the result back. One mechanism carries it: a `Coordinates` node stands in the tree where the
parameter's leaf stood, in what `init` hands to the transformations and in what `galore` emits.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrices import matrix_views
from galore_jax.state import (
    ChainState,
    GaLoreState,
    galore_states,
    is_low_rank,
    map_bases,
    project,
    start_coordinates,
    to_float32,
    with_galore_states,
)
from galore_jax.subspace import (
    NEVER,
    REFRESH,
    Basis,
    Coordinates,
    Projection,
    is_coordinates,
    random_basis,
    refresh_due,
)

PyTree = Any


class GaLore(optax.GradientTransformationExtraArgs):
    """What `galore` returns: a link for `chain`, or called with what shall come after it."""

    def __call__(self, inner: optax.GradientTransformation) -> "Chain":
        """`galore(...)(inner)` is `chain(galore(...), inner)`."""
        return chain(self, inner)


class Chain(optax.GradientTransformationExtraArgs):
    """What `chain` returns: an optax transformation that also offers its update before the lift."""

    links: tuple[optax.GradientTransformation, ...]
    update_coordinates: Callable[..., tuple[PyTree, ChainState]]


def galore(
    rank: int,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    refresh: str = "subspace_iteration",
    basis_dtype: Any = None,
    seed: int = 0,
) -> GaLore:
    """Projects gradients into low-rank bases (arXiv 2403.03507, algorithm 2).

    Matrices are the last two axes of a leaf, axes before them a batch; `matrix_views` says which
    leaves are projected. The smaller side is projected (`std` of the paper). Bases are made anew at
    updates 0, T, 2T, … from that update's gradient; the moments stay as they are.

    What leaves galore is float32: `Coordinates` of projected leaves, `(*batch, r, out)` where the
    in side is the smaller and `(*batch, in, r)` where the out side is; other gradients whole.

    Args:
      rank: number of basis vectors r. A leaf whose smaller side is not larger stays whole.
      update_proj_gap: updates between refreshes, the paper's T.
      scale: factor of the lifted update, the paper's α.
      refresh: "subspace_iteration" (matmuls only, warm-started), "eigh" (exact, from the Gram
        matrix of the smaller side) or "svd" (exact, slow).
      basis_dtype: of the stored bases; None: float32.
      seed: of the bases before the first gradient.

    Returns:
      A transformation for `chain`, or for `optax.chain` with `init` and `apply_gradients`.

    Raises:
      ValueError: a rank that is no integer of at least 1, a gap below 1, an unknown refresh.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from galore_jax import apply_gradients, chain, galore
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}
      >>> tx = chain(galore(rank=8), optax.adam(1e-3))  # or galore(rank=8)(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (8, 128)
      >>> params, state = apply_gradients(tx, jax.tree.map(jnp.ones_like, params), state, params)
    """
    if refresh not in REFRESH:
        raise ValueError(f"galore: refresh must be one of {', '.join(REFRESH)}, not {refresh!r}.")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"galore: rank must be an integer of at least 1, not {rank!r}; under "
            "optax.inject_hyperparams name it among the static_args."
        )
    if not isinstance(update_proj_gap, jax.Array) and update_proj_gap < 1:
        raise ValueError(f"galore: update_proj_gap must be at least 1, not {update_proj_gap}.")

    def init_fn(params: PyTree) -> GaLoreState:
        # Coordinates stand where `init` has been here before; a whole matrix means that it has not.
        views = matrix_views(params, rank)
        keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)) + 1))

        def basis(leaf: Any, view: Any) -> Basis | optax.MaskedNode:
            key = next(keys)
            if is_coordinates(leaf):
                projection, full_size = leaf.projection, False
            elif view is not None:
                projection, full_size = Projection.std(view, rank), True
            else:
                return optax.MaskedNode()
            vectors = random_basis(key, projection.basis_shape)
            return Basis(vectors.astype(basis_dtype or jnp.float32), projection, full_size)

        bases = jax.tree.map(basis, params, views, is_leaf=is_coordinates)
        never = lambda basis: jnp.full(basis.projection.view.batch, NEVER, jnp.int32)  # noqa: E731
        ages = map_bases(never, bases, otherwise=bases)
        return GaLoreState(jnp.zeros([], jnp.int32), jnp.asarray(scale, jnp.float32), bases, ages)

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        del params, extra_args

        def refreshed(basis: Basis, ages: jax.Array, gradient: Any) -> tuple[Basis, jax.Array]:
            if is_coordinates(gradient):
                return basis, ages
            return refresh_due(basis, ages, gradient, update_proj_gap, refresh)

        def projected(basis: Basis, gradient: Any) -> Any:
            if is_coordinates(gradient):
                return gradient
            value = basis.projection.project(basis.vectors, gradient)
            if basis.full_size:
                return basis.projection.lift(basis.vectors, value).astype(gradient.dtype)
            return Coordinates(value, basis.projection)

        unprojected = to_float32(updates) if is_low_rank(state) else updates
        if not is_low_rank(state):
            _warn_of_full_size()
        map_here = partial(map_bases, otherwise=state.bases)
        pairs = map_here(refreshed, state.bases, state.ages, updates)
        bases = map_here(lambda _, pair: pair[0], state.bases, pairs)
        ages = map_here(lambda _, pair: pair[1] + 1, state.bases, pairs)
        updates = map_bases(projected, bases, updates, otherwise=unprojected)
        count = optax.safe_increment(state.count)
        return updates, GaLoreState(count, jnp.asarray(scale, jnp.float32), bases, ages)

    return GaLore(init_fn, update_fn)


def chain(*transforms: optax.GradientTransformation) -> Chain:
    """`optax.chain` that knows galore: what comes after it runs in coordinates, then is lifted.

    Transformations before `galore` see full gradients and parameters; those after it are started
    with and fed coordinates, of the parameters too where they read them. So `optax.adamw` there
    decays only the part of the weights inside the subspace: `galore_jax.adamw` decays them
    whole. Transformations that keep a copy of the parameters (schedule-free, lookahead, averages)
    do not belong after galore; wrap the whole chain in them.

    Args:
      *transforms: as for `optax.chain`; a `chain` among them is laid open, so that a clip can be
        put in front of a ready-made optimizer. What decays whole weights comes last.

    Returns:
      A transformation whose updates have the parameters' shapes and dtypes. `apply_gradients`
      applies them without ever holding a lifted update of the whole tree.

    Raises:
      ValueError: more than one galore; at an update, something after a decay of whole weights.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import chain, galore
      >>> tx = chain(optax.clip_by_global_norm(1.0), galore(rank=8), optax.lion(1e-4))
      >>> optax.tree.get(tx.init({"kernel": jnp.ones((64, 128))}), "mu")["kernel"].value.shape
      (8, 128)
    """
    links = tuple(
        link for tx in transforms for link in (tx.links if isinstance(tx, Chain) else (tx,))
    )
    if sum(isinstance(link, GaLore) for link in links) > 1:
        raise ValueError("chain: there is more than one galore; leave only one.")

    def init_fn(params: PyTree) -> ChainState:
        states = []
        for link in links:
            states.append(init(link, params))
            params = start_coordinates(params, galore_states(states[-1]))
        return ChainState(tuple(states))

    def update_coordinates(updates: PyTree, state: ChainState, params: PyTree = None, **extra_args):
        states = []
        for link, link_state in zip(links, state.links, strict=True):
            _refuse_after_decay(updates)
            updates, link_state = update_low_rank(link, updates, link_state, params, **extra_args)
            states.append(link_state)
            if params is not None:
                params = project(params, galore_states(link_state))
        return updates, ChainState(tuple(states))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        coordinates, state = update_coordinates(updates, state, params, **extra_args)
        like = updates if params is None else params
        return _lift(coordinates, galore_states(state.links), like), state

    tx = Chain(init_fn, update_fn)
    tx.links, tx.update_coordinates = links, update_coordinates
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
    """
    states = galore_states(jax.eval_shape(tx.init, params))
    if not all(map(is_low_rank, states)):
        params = start_coordinates(params, states)
    return tx.init(params)


def update_low_rank(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
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
      The updates, `Coordinates` where a galore in `tx` projects, and the state.

    Raises:
      ValueError: a part of a stock transformation cannot work on coordinates.
    """
    tx = tx if isinstance(tx, GaLore) else optax.with_extra_args_support(tx)
    states = galore_states(state)
    if isinstance(tx, GaLore) or not states or not all(map(is_low_rank, states)):
        return tx.update(updates, state, params, **extra_args)
    try:
        coordinates = None if params is None else project(params, states)
        _, probe = tx.update(updates, state, coordinates, **extra_args)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "a transformation around or before galore cannot work on its coordinates "
            f"({error}): use galore_jax.chain in place of optax.chain, inside all wrappers."
        ) from error
    refreshed = galore_states(probe)
    fresh = [s._replace(ages=jax.tree.map(jnp.zeros_like, s.ages)) for s in refreshed]
    ready = with_galore_states(state, fresh)
    coordinates = None if params is None else project(params, fresh)
    updates, new = tx.update(updates, ready, coordinates, **extra_args)
    return updates, with_galore_states(new, refreshed)


def _lift(updates: PyTree, states: list[GaLoreState], like: PyTree) -> PyTree:
    """Full updates in the dtype of `like`: the parameters, or without these the gradients."""

    def lifted(scale: jax.Array, basis: Basis, update: Any, like: Any) -> Any:
        if not is_coordinates(update):
            return update
        full = scale * basis.projection.lift(basis.vectors, update.value)
        return full if update.decay is None else full - update.decay * like

    def cast(update: Any, like: Any) -> jax.Array:
        return jnp.asarray(update, jnp.result_type(like.value if is_coordinates(like) else like))

    for state in states:
        lift = partial(lifted, state.scale)
        updates = map_bases(lift, state.bases, updates, like, otherwise=updates)
    return jax.tree.map(cast, updates, like)


def _refuse_after_decay(updates: PyTree) -> None:
    for update in jax.tree.leaves(updates, is_leaf=is_coordinates):
        if is_coordinates(update) and update.decay is not None:
            raise ValueError(
                "chain: a decay of whole weights (decay_weights, and the end of galore_jax.adamw) "
                "must come last; put what follows it in front of galore, or around the chain."
            )


@cache
def _warn_of_full_size() -> None:
    """Once a process."""
    warnings.warn(
        "galore was started with tx.init(params), so the optimizer after it keeps full-size "
        "moments. For low-rank ones use galore_jax.chain in place of optax.chain, or start with "
        "galore_jax.init(tx, params) and step with galore_jax.apply_gradients.",
        stacklevel=2,
    )
