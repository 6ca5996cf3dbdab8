"""The state of galore, and trees in which coordinates stand where it has bases."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.subspace.refresh import Lazy
from galore_jax.types import PyTree


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: int32 scalar, updates so far.
      bases: the parameters' tree with a `Basis` where a leaf is projected and
        `optax.MaskedNode()` elsewhere.
      lazy: when gaps double.
      seed: of random bases, uint32 scalar.
    """

    count: jax.typing.ArrayLike
    bases: PyTree
    lazy: Lazy
    seed: jax.typing.ArrayLike


class ChainState(NamedTuple):
    """State of a `chain`, apart from a stock one's, for its galore needs no lifting by others.

    Attributes:
      inner_states: the states of its transformations.
    """

    inner_states: tuple


def galore_states(state: PyTree, *, inside_chains: bool = False) -> list[GaLoreState]:
    """The states of every galore in a state.

    Args:
      state: of any transformation.
      inside_chains: also those inside a `chain`, which lifts their updates by itself.

    Returns:
      The states.
    """
    leaves = jax.tree.leaves(state, is_leaf=_is_state(inside_chains))
    return [leaf for leaf in leaves if isinstance(leaf, GaLoreState)]


def with_galore_states(
    state: PyTree, states: list[GaLoreState], *, inside_chains: bool = False
) -> PyTree:
    """`state` with others in place of those that `galore_states` finds, in their order."""
    new = iter(states)

    def replaced(node: Any) -> Any:
        return next(new) if isinstance(node, GaLoreState) else node

    return jax.tree.map(replaced, state, is_leaf=_is_state(inside_chains))


def _is_state(inside_chains: bool) -> Callable[[Any], bool]:
    stops = GaLoreState if inside_chains else (GaLoreState, ChainState)
    return lambda node: isinstance(node, stops)


def bases_of(states: list[GaLoreState]) -> list[Basis]:
    """Every basis in these states."""
    leaves = jax.tree.leaves([state.bases for state in states], is_leaf=is_basis)
    return [leaf for leaf in leaves if is_basis(leaf)]


def is_low_rank(state: GaLoreState) -> bool:
    """Whether what follows this galore was started with coordinates (or it projects nothing)."""
    return not any(basis.full_size for basis in bases_of([state]))


def map_bases(f: Callable[..., Any], bases: PyTree, *rest: PyTree, otherwise: PyTree) -> PyTree:
    """`f(basis, *subtrees of rest)` at the projected leaves; what `otherwise` has at the others.

    What a box of Flax holds is given to `f` without it, and what `f` returns stands in its place.
    """

    def at_leaf(basis: Any, otherwise: Any, *subtrees: Any) -> Any:
        return f(basis, *map(unboxed, subtrees)) if is_basis(basis) else otherwise

    is_leaf = lambda node: is_basis(node) or isinstance(node, optax.MaskedNode)
    return jax.tree.map(at_leaf, bases, otherwise, *rest, is_leaf=is_leaf)


def without_boxes(tree: PyTree, states: list[GaLoreState]) -> PyTree:
    """A tree like the parameters without boxes where one of these galores has a basis."""
    for state in states:
        tree = map_bases(lambda _, node: node, state.bases, tree, otherwise=tree)
    return tree


def boxed_as(like: PyTree, tree: PyTree) -> PyTree:
    """A tree with the leaves of `like`, one for one, in the boxes that are there."""
    structure = jax.tree.structure(like, is_leaf=is_coordinates)
    return jax.tree.unflatten(structure, jax.tree.leaves(tree, is_leaf=is_coordinates))


def with_gradient(params: PyTree, gradients: PyTree) -> PyTree:
    """`params` with None where the gradients have None, as of the functions in an Equinox model."""

    def at_leaf(gradient: Any, param: Any) -> Any:
        return None if gradient is None else param

    is_leaf = lambda node: node is None or is_coordinates(node)
    return jax.tree.map(at_leaf, gradients, params, is_leaf=is_leaf)


def check_gradient(gradient: Any, projection: Projection) -> None:
    """Refuses what is no gradient of a projected parameter.

    Raises:
      ValueError: names the parameter.
    """
    if gradient is None:
        raise ValueError(
            f"galore: the gradient of {projection.name}, which is projected, is None: give zeros, "
            "or start the optimizer without this parameter."
        )
    projected = is_coordinates(gradient)
    shape = jnp.shape(gradient.value if projected else gradient)
    wanted = projection.coordinates_shape if projected else projection.view.shape
    if shape != wanted:
        raise ValueError(
            f"galore: the gradient of {projection.name} has the shape {shape} in place of "
            f"{wanted}: give gradients of the parameters that the optimizer was started with."
        )


def to_float32(tree: PyTree) -> PyTree:
    """Floating leaves as float32, others as they are."""

    def cast(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=jnp.float32)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(cast, tree)


def project(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """`params` as they stand after these galores: `Coordinates` where one has a basis, float32."""

    def coordinates(basis: Basis, param: jax.Array) -> Coordinates:
        return Coordinates(basis.projection.project(basis.vectors, param), basis.projection)

    for state in states:
        params = map_bases(coordinates, state.bases, params, otherwise=params)
    return to_float32(params) if states else params


def start_coordinates(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """As `project`, with zeros for coordinates: the states may be abstract."""

    def zeros(basis: Basis) -> Coordinates:
        shape = basis.projection.coordinates_shape
        return Coordinates(jnp.zeros(shape, jnp.float32), basis.projection)

    for state in states:
        params = map_bases(zeros, state.bases, otherwise=params)
    return to_float32(params) if states else params
