"""The step along random directions of the complement, which no moment remembers.

Nothing is known about these directions, so their step is the first one that the optimizer takes
from a state of zeros: for Adam and Lion the sign of the coordinates, for Muon their orthogonal
factor, for SGD the coordinates themselves.
"""

from dataclasses import replace
from typing import Any

import jax
import optax

from galore_jax.subspace.matrix_view import named_leaves, unboxed
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


def without_complement(tree: PyTree) -> PyTree:
    """A tree whose `Coordinates` have no complement and no directions."""
    bare = lambda node: replace(node, complement=None, directions=None)
    return _map_coordinates(bare, tree)


def only_complement(tree: PyTree) -> PyTree:
    """A tree in which the coordinates are those of the complement; None if there are none."""
    nodes = jax.tree.leaves(tree, is_leaf=is_coordinates)
    if not any(is_coordinates(node) and node.complement is not None for node in nodes):
        return None
    return _map_coordinates(lambda node: Coordinates(node.complement, node.projection), tree)


def with_complement(updates: PyTree, complement: PyTree, like: PyTree) -> PyTree:
    """Updates joined with those of the complement, along the directions of the tree `like`."""

    def at_node(update: Any, other: Any, like: Any) -> Any:
        if not is_coordinates(update):
            return update
        return replace(update, complement=other.value, directions=like.directions)

    return jax.tree.map(at_node, updates, complement, like, is_leaf=is_coordinates)


def in_directions(params: PyTree, like: PyTree) -> PyTree:
    """The parameters' coordinates in the directions of the tree `like`."""

    def at_node(node: Any, param: Any) -> Any:
        if not is_coordinates(node):
            return param
        coordinates = node.projection.project(node.directions, unboxed(param))
        return Coordinates(coordinates, node.projection)

    return jax.tree.map(at_node, like, params, is_leaf=is_coordinates)


def first_update(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> PyTree:
    """The update of `tx` with all moments, and what is stored next to them, as at the start.

    The counts of schedules are those of `state`.
    """
    fresh = tx.init(updates)
    leaves = named_leaves(fresh, is_coordinates)
    # A moment is the field of a state, below which there is a tree like the parameters.
    owners = {
        names[: len(names) - len(node.projection.path) - 1]
        for names, node in leaves
        if is_coordinates(node)
    }
    current = dict(named_leaves(state, is_coordinates))

    def restarted(names: tuple[str, ...], leaf: Any) -> Any:
        is_fresh = any(names[: len(owner)] == owner for owner in owners)
        return leaf if is_fresh else current.get(names, leaf)

    tree = jax.tree.structure(fresh, is_leaf=is_coordinates)
    start = tree.unflatten([restarted(*leaf) for leaf in leaves])
    update = optax.with_extra_args_support(tx).update
    return update(updates, start, params, **extra_args)[0]


def _map_coordinates(f: Any, tree: PyTree) -> PyTree:
    at_node = lambda node: f(node) if is_coordinates(node) else node
    return jax.tree.map(at_node, tree, is_leaf=is_coordinates)
