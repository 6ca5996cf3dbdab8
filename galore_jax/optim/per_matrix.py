"""An optimizer for each matrix, with moments and a count of its own, which a new basis resets.

So the bias correction of any optimizer goes by the matrix's own updates since its moments started,
where one count for all would make the first update after a reset several times too large.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.optim.moments import BasisUpdates
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


class PerMatrixState(NamedTuple):
    """State of a transformation that runs once for each matrix and once for what is whole.

    Attributes:
      whole: its state for the leaves that are not projected.
      matrices: the parameters' tree with its state where a leaf is projected, a new axis in front
        of each array: one state a matrix; and `optax.MaskedNode()` elsewhere.
    """

    whole: PyTree
    matrices: PyTree


def init_per_matrix(tx: optax.GradientTransformation, params: PyTree) -> PerMatrixState:
    """Starts `tx` from the parameters as they stand after galore.

    Raises:
      ValueError: it cannot run on one matrix alone; names the leaf.
    """

    def at_leaf(param: Any) -> PyTree:
        if not is_coordinates(param):
            return optax.MaskedNode()
        try:
            return jax.vmap(tx.init)(_flat(param))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f'galore: moments="reset" starts what follows galore for {param.projection.name} '
                f"by itself, which it cannot ({str(error).splitlines()[0]}): give masks and labels "
                'as functions of the parameters, or use moments="keep".'
            ) from error

    matrices = jax.tree.map(at_leaf, params, is_leaf=is_coordinates)
    return PerMatrixState(tx.init(_whole(params)), matrices)


def update_per_matrix(
    tx: optax.GradientTransformation,
    updates: PyTree,
    state: PerMatrixState,
    params: PyTree,
    basis_updates: BasisUpdates,
    **extra_args: Any,
) -> tuple[PyTree, PerMatrixState]:
    """`tx.update` for each matrix, started anew where its basis is new.

    Anew starts what stands beside moments, Adam's count among it; the count of a schedule goes on.

    Args:
      tx: a transformation that treats each leaf by itself.
      updates: `Coordinates` where galore projects.
      state: from `init_per_matrix`.
      params: as `updates`, or None.
      basis_updates: what this update did to the bases.
      **extra_args: for `tx.update`.

    Returns:
      The updates and the state, in which a skipped matrix has the moments it had.
    """
    tx = optax.with_extra_args_support(tx)
    whole_params = None if params is None else _whole(params)
    whole, whole_state = tx.update(_whole(updates), state.whole, whole_params, **extra_args)

    def one(update: Any, state: PyTree, param: Any) -> tuple[Any, PyTree]:
        return tx.update(update, state, param, **extra_args)

    leaves, tree = jax.tree.flatten(updates, is_leaf=is_coordinates)
    own_params = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
    done, states = tree.flatten_up_to(whole), tree.flatten_up_to(state.matrices)
    for i, (update, param) in enumerate(zip(leaves, own_params, strict=True)):
        if not is_coordinates(update):
            continue
        basis_update, flat = basis_updates[update.projection.path], _flat(update)
        fresh = jax.vmap(tx.init)(jax.tree.map(jnp.zeros_like, flat))
        start = _where(basis_update.is_first_update.reshape(-1), fresh, states[i])
        new, after = jax.vmap(one)(flat, start, None if param is None else _flat(param))
        done[i] = Coordinates(new.value.reshape(update.value.shape), update.projection)
        states[i] = _where(basis_update.skipped.reshape(-1), start, after)
    matrices = jax.tree.unflatten(tree, states)
    return jax.tree.unflatten(tree, done), PerMatrixState(whole_state, matrices)


def _where(flags: jax.Array, one: PyTree, other: PyTree) -> PyTree:
    """`one` where the flag of a matrix is set, for what stands beside moments; else `other`."""

    def beside_moments(node: Any) -> bool:
        return is_coordinates(node) or (
            isinstance(node, tuple) and any(is_coordinates(field) for field in node)
        )

    def at_node(one: Any, other: Any) -> Any:
        if not beside_moments(one):
            return other
        pick = lambda a, b: jnp.where(flags.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)
        return jax.tree.map(pick, one, other)

    return jax.tree.map(at_node, one, other, is_leaf=beside_moments)


def _flat(node: Any) -> Any:
    return Coordinates(node.value.reshape(-1, *node.value.shape[-2:]), node.projection)


def _whole(tree: PyTree) -> PyTree:
    masked = lambda leaf: optax.MaskedNode() if is_coordinates(leaf) else leaf
    return jax.tree.map(masked, tree, is_leaf=is_coordinates)
