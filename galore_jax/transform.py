"""GaLore as an optax transformation (arXiv 2403.03507).

`galore` turns the gradient of each matrix into its coordinates in a low-rank basis; whatever optax
transformation comes after it works on the coordinates, so its state is low-rank; the end lifts
the result back. One mechanism carries it: a `Coordinates` node stands in the tree where the
parameter's leaf stood, in what `init` hands to the transformations and in what `galore` emits.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.matrices import matrix_views
from galore_jax.subspace import (
    NEVER,
    REFRESH,
    Basis,
    Coordinates,
    Projection,
    is_basis,
    is_coordinates,
    random_basis,
    refresh_due,
)

PyTree = Any


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: int32 scalar, updates so far.
      scale: float32 scalar, the factor of the lift.
      bases: the parameters' tree with a `Basis` where a leaf is projected and
        `optax.MaskedNode()` elsewhere.
      ages: the same tree with int32 `(*batch,)`: updates since each matrix's basis was made.
    """

    count: jax.typing.ArrayLike
    scale: jax.Array
    bases: PyTree
    ages: PyTree


class ChainState(NamedTuple):
    """State of a `chain`, apart from a stock one's, for its galore needs no lifting by others.

    Attributes:
      links: the states of its transformations.
    """

    links: tuple


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

    What leaves galore is float32: `Coordinates` of projected leaves, the gradients of all others.

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
      ValueError: for a rank or a gap below 1 or an unknown refresh.

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
    for name, value in (("rank", rank), ("update_proj_gap", update_proj_gap)):
        if not isinstance(value, jax.Array) and value < 1:
            raise ValueError(f"galore: {name} must be at least 1, not {value}.")

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

        if is_low_rank(state):
            updates = to_float32(updates)
        else:
            _warn_of_full_size()
        map_here = partial(map_bases, otherwise=state.bases)
        pairs = map_here(refreshed, state.bases, state.ages, updates)
        bases = map_here(lambda _, pair: pair[0], state.bases, pairs)
        ages = map_here(lambda _, pair: pair[1] + 1, state.bases, pairs)
        updates = map_bases(projected, bases, updates, otherwise=updates)
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
      *transforms: as for `optax.chain`; a chain among them is laid open, so that a clip can be put
        in front of a ready-made optimizer.

    Returns:
      A transformation whose updates have the parameters' shapes and dtypes. `apply_gradients`
      applies them without ever holding a lifted update of the whole tree.
    """
    links = tuple(
        link for tx in transforms for link in (tx.links if isinstance(tx, Chain) else (tx,))
    )
    supported = [optax.with_extra_args_support(link) for link in links]

    def init_fn(params: PyTree) -> ChainState:
        states = []
        for link in links:
            states.append(init(link, params))
            params = _start_coordinates(params, galore_states(states[-1]))
        return ChainState(tuple(states))

    def update_coordinates(updates: PyTree, state: ChainState, params: PyTree = None, **extra_args):
        states = []
        for link, link_state in zip(supported, state.links, strict=True):
            updates, link_state = link.update(updates, link_state, params, **extra_args)
            states.append(link_state)
            if params is not None:
                params = project(params, galore_states(link_state))
        return updates, ChainState(tuple(states))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None, **extra_args):
        coordinates, state = update_coordinates(updates, state, params, **extra_args)
        return _lift(
            coordinates, galore_states(state.links), updates if params is None else params
        ), state

    tx = Chain(init_fn, update_fn)
    tx.links, tx.update_coordinates = links, update_coordinates
    return tx


def init(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Starts any optax transformation so that what comes after a `galore` in it is low-rank.

    In place of `tx.init(params)` for a stock `optax.chain(galore(...), ...)`. Parameters are handed
    on as float32, so that moments are, whatever the parameters' dtype.

    Args:
      tx: any transformation, with galore anywhere in it, or without.
      params: the parameters.

    Returns:
      The optimizer's state.

    Raises:
      ValueError: where something before galore in a stock chain keeps arrays of the parameters'
        shapes; `chain` handles it.
    """
    params = to_float32(params)
    states = galore_states(jax.eval_shape(tx.init, params))
    if not all(map(is_low_rank, states)):
        params = _start_coordinates(params, states)
        _refuse_state_before_galore(jax.eval_shape(tx.init, params))
    return tx.init(params)


def galore_states(state: PyTree) -> list[GaLoreState]:
    """The states of every galore whose updates are still to be lifted: of none inside a `chain`."""
    stop = lambda node: isinstance(node, (GaLoreState, ChainState))  # noqa: E731
    return [s for s in jax.tree.leaves(state, is_leaf=stop) if isinstance(s, GaLoreState)]


def is_low_rank(state: GaLoreState) -> bool:
    """Whether what follows this galore was started with coordinates (or it projects nothing)."""
    bases = jax.tree.leaves(state.bases, is_leaf=is_basis)
    return not any(is_basis(basis) and basis.full_size for basis in bases)


def project(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """`params` with their `Coordinates` wherever one of the states has a basis."""

    def coordinates(basis: Basis, param: jax.Array) -> Coordinates:
        return Coordinates(basis.projection.project(basis.vectors, param), basis.projection)

    for state in states:
        params = map_bases(coordinates, state.bases, params, otherwise=params)
    return params


def map_bases(f: Callable[..., Any], bases: PyTree, *rest: PyTree, otherwise: PyTree) -> PyTree:
    """`f(basis, *subtrees of rest)` at the projected leaves; what `otherwise` has at the others."""

    def at_leaf(basis: Any, otherwise: Any, *subtrees: Any) -> Any:
        return f(basis, *subtrees) if is_basis(basis) else otherwise

    is_leaf = lambda node: is_basis(node) or isinstance(node, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(at_leaf, bases, otherwise, *rest, is_leaf=is_leaf)


def to_float32(tree: PyTree) -> PyTree:
    """Floating leaves as float32, others as they are."""

    def cast(leaf: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, jnp.float32) if floating else leaf

    return jax.tree.map(cast, tree)


def _start_coordinates(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """`params` with zero `Coordinates` wherever one of the states has a basis."""

    def zeros(basis: Basis) -> Coordinates:
        shape = basis.projection.coordinates_shape
        return Coordinates(jnp.zeros(shape, jnp.float32), basis.projection)

    for state in states:
        params = map_bases(zeros, state.bases, otherwise=params)
    return params


def _lift(updates: PyTree, states: list[GaLoreState], like: PyTree) -> PyTree:
    """Full updates in the dtype of `like`: the parameters, or without these the gradients."""

    def lifted(scale: jax.Array, basis: Basis, update: Any, like: Any) -> Any:
        if not is_coordinates(update):
            return update
        full = scale * basis.projection.lift(basis.vectors, update.value)
        return full if update.decay is None else full - update.decay * like

    for state in states:
        lift = partial(lifted, state.scale)
        updates = map_bases(lift, state.bases, updates, like, otherwise=updates)
    return jax.tree.map(lambda update, leaf: update.astype(leaf.dtype), updates, like)


def _refuse_state_before_galore(state: PyTree) -> None:
    """A stock chain starts all its parts alike, also those that full gradients will reach."""
    is_chain = lambda node: type(node) is tuple  # noqa: E731
    for links in filter(is_chain, jax.tree.leaves(state, is_leaf=is_chain)):
        before = list(takewhile(lambda link: not galore_states(link), links))
        if len(before) < len(links) and any(
            map(is_coordinates, jax.tree.leaves(before, is_leaf=is_coordinates))
        ):
            raise ValueError(
                "init: a transformation before galore keeps arrays of the parameters' shapes, "
                "which a stock optax.chain cannot start: use galore_jax.chain."
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
