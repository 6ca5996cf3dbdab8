"""The state of galore, and trees in which `Coordinates` replace projected leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.int8 import is_int8
from galore_jax.ops.partition import Partition
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import named_leaves, unboxed
from galore_jax.subspace.projection import Coordinates, Projection, is_coordinates
from galore_jax.types import PyTree


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
      count: int32 scalar, number of updates so far.
      bases: the parameters' tree with a `Basis` for projected leaves, and elsewhere
        `optax.MaskedNode()` or, on a mesh, `Unprojected`.
      lazy_overlap: float32 scalar, the overlap from which a gap doubles; None: no gap does.
      seed: uint32 scalar, the seed of random bases.
    """

    count: jax.typing.ArrayLike
    bases: PyTree
    lazy_overlap: Any
    seed: jax.typing.ArrayLike


@jax.tree_util.register_static
@dataclass(frozen=True)
class Unprojected:
    """A parameter that is not projected, on a mesh: it has no basis, but its partition is known."""

    partition: Partition


class ChainState(NamedTuple):
    """State of a `chain`.

    It is a separate type so that `galore_states` can skip chains, which lift their own updates.

    Attributes:
      inner_states: the states of its transformations.
    """

    inner_states: tuple


def galore_states(state: PyTree, *, inside_chains: bool = False) -> list[GaLoreState]:
    """The state of every galore in an optimizer's state.

    Args:
      state: the state of any transformation.
      inside_chains: whether to include those inside a `chain`, which lifts their updates itself.

    Returns:
      The states, in the order of the tree.
    """
    leaves = jax.tree.leaves(state, is_leaf=_is_state(inside_chains))
    return [leaf for leaf in leaves if isinstance(leaf, GaLoreState)]


def with_galore_states(
    state: PyTree, states: list[GaLoreState], *, inside_chains: bool = False
) -> PyTree:
    """An optimizer's state with the given states in place of those from `galore_states`."""
    new = iter(states)

    def replaced(node: Any) -> Any:
        return next(new) if isinstance(node, GaLoreState) else node

    return jax.tree.map(replaced, state, is_leaf=_is_state(inside_chains))


def _is_state(inside_chains: bool) -> Callable[[Any], bool]:
    stops = GaLoreState if inside_chains else (GaLoreState, ChainState)
    return lambda node: isinstance(node, stops)


def bases_of(states: list[GaLoreState]) -> list[Basis]:
    """All bases in these states."""
    leaves = jax.tree.leaves([state.bases for state in states], is_leaf=is_basis)
    return [leaf for leaf in leaves if is_basis(leaf)]


def is_low_rank(state: GaLoreState) -> bool:
    """Whether the transformations after this galore were initialised with coordinates."""
    return not any(basis.full_size for basis in bases_of([state]))


def map_bases(f: Callable[..., Any], bases: PyTree, *rest: PyTree, otherwise: PyTree) -> PyTree:
    """Maps `f(basis, *leaves of rest)` over projected leaves; others are taken from `otherwise`.

    Values in Flax's boxes are passed to `f` without the box, which its result replaces.
    """

    def at_leaf(basis: Any, otherwise: Any, *subtrees: Any) -> Any:
        return f(basis, *map(unboxed, subtrees)) if is_basis(basis) else otherwise

    return jax.tree.map(at_leaf, bases, otherwise, *rest, is_leaf=is_parameter)


def constrain_unprojected(tree: PyTree, states: list[GaLoreState]) -> PyTree:
    """A tree like the parameters, with the leaves that are not projected where those lie."""

    def at_leaf(node: Any, subtree: PyTree) -> PyTree:
        if not isinstance(node, Unprojected):
            return subtree
        return jax.tree.map(node.partition.constrain, subtree)

    for state in states:
        tree = jax.tree.map(at_leaf, state.bases, tree, is_leaf=is_parameter)
    return tree


def is_parameter(node: Any) -> bool:
    """Whether a node of `GaLoreState.bases` stands for a parameter."""
    return is_basis(node) or isinstance(node, optax.MaskedNode | Unprojected)


def without_boxes(tree: PyTree, states: list[GaLoreState]) -> PyTree:
    """A tree like the parameters, with projected leaves taken out of Flax's boxes."""
    for state in states:
        tree = map_bases(lambda _, node: node, state.bases, tree, otherwise=tree)
    return tree


def boxed_as(like: PyTree, tree: PyTree) -> PyTree:
    """A tree with the structure of `like`, boxes included, and the leaves of `tree`."""
    structure = jax.tree.structure(like, is_leaf=is_coordinates)
    return jax.tree.unflatten(structure, jax.tree.leaves(tree, is_leaf=is_coordinates))


def none_where_no_gradient(params: PyTree, gradients: PyTree) -> PyTree:
    """`params` with None where the gradients are None, as for functions in an Equinox model.

    Raises:
      ValueError: they have different structures; names up to three differing leaves.
    """

    def at_leaf(gradient: Any, param: Any) -> Any:
        return None if gradient is None else param

    is_leaf = lambda node: node is None or is_coordinates(node)
    try:
        return jax.tree.map(at_leaf, gradients, params, is_leaf=is_leaf)
    except ValueError as error:
        paths = lambda tree: {"/".join(names) for names, _ in named_leaves(tree, is_leaf)}
        differing = ", ".join(sorted(paths(params) ^ paths(gradients))[:3])
        raise ValueError(
            "the gradients have another structure than the parameters"
            f"{f' (only one of them has {differing})' if differing else ''}: pass the gradients of "
            "these parameters."
        ) from error


def check_gradient(gradient: Any, projection: Projection) -> None:
    """Checks a gradient of a projected parameter.

    Raises:
      ValueError: it is None or has the wrong shape; names the parameter.
    """
    if gradient is None:
        raise ValueError(
            f"galore: the gradient of {projection.name}, which is projected, is None: pass zeros, "
            "or initialise the optimizer without this parameter."
        )
    projected = is_coordinates(gradient)
    shape = jnp.shape(gradient.value if projected else gradient)
    expected = projection.coordinates_shape if projected else projection.view.shape
    if shape != expected:
        raise ValueError(
            f"galore: the gradient of {projection.name} has the shape {shape} instead of "
            f"{expected}: pass gradients of the parameters that the optimizer was initialised with."
        )


def to_float32(tree: PyTree) -> PyTree:
    """Casts floating leaves to float32, also those in 8 bits; other leaves are unchanged."""

    def cast(leaf: Any) -> Any:
        if is_int8(leaf):
            is_shape = isinstance(leaf.codes, jax.ShapeDtypeStruct)
            return leaf.codes.update(dtype=jnp.float32) if is_shape else leaf.float32()
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=jnp.float32)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(cast, tree, is_leaf=is_int8)


def projected_tree(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """The parameters as transformations after these galores see them: projected, float32."""

    def coordinates(basis: Basis, param: jax.Array) -> Coordinates:
        return Coordinates(basis.projection.project(basis.vectors, param), basis.projection)

    for state in states:
        params = map_bases(coordinates, state.bases, params, otherwise=params)
    return to_float32(params) if states else params


def start_coordinates(params: PyTree, states: list[GaLoreState]) -> PyTree:
    """Like `projected_tree`, with zeros for coordinates; the states may be abstract."""

    def zeros(basis: Basis) -> Coordinates:
        shape = basis.projection.coordinates_shape
        return Coordinates(jnp.zeros(shape, jnp.float32), basis.projection)

    for state in states:
        params = map_bases(zeros, state.bases, otherwise=params)
    return to_float32(params) if states else params
