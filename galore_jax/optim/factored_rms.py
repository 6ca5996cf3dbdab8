"""Adafactor's factored second moments, per matrix and for coordinates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.subspace.matrix_view import is_vector, named_leaves
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


class FactoredState(NamedTuple):
    """State of `scale_by_factored_rms`; shapes are those for a leaf `(*batch, in, out)`.

    Attributes:
      count: int32 scalar, number of updates so far.
      rows: second moments averaged over the out axis, `(*batch, in)`.
      columns: second moments averaged over the in axis, `(*batch, out)`.
      nu: full second moments of the leaves that are not factored. Each leaf is an
        `optax.MaskedNode()` either here or in `rows` and `columns`.
    """

    count: jax.typing.ArrayLike
    rows: PyTree
    columns: PyTree
    nu: PyTree


def scale_by_factored_rms(
    decay_rate: float = 0.8, eps: float = 1e-30, min_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Divides by the root of factored second moments (Adafactor, arXiv 1804.04235, algorithm 4).

    It differs from `optax.scale_by_factored_rms` in that each matrix of a stack has factors of its
    own, along the last two axes, and that coordinates are always factored, whatever their rank.

    Args:
      decay_rate: the decay at update t, counted from 1, is `1 − t^−decay_rate`.
      eps: added to the squared gradient.
      min_size_to_factor: other leaves are factored if both of their last two axes are at least this
        long, but for biases, scales and norms by their names, which may be stacked vectors.

    Returns:
      An optax transformation.
    """

    def is_factored(names: tuple[str, ...], leaf: Any) -> bool:
        if is_coordinates(leaf):
            return True
        shape = jnp.shape(leaf)
        is_large = len(shape) >= 2 and min(shape[-2:]) >= min_size_to_factor
        return is_large and not is_vector(names)

    def init_fn(params: PyTree) -> FactoredState:
        def zeros(factored: bool, axis: int | None) -> PyTree:
            def at_leaf(names: tuple[str, ...], leaf: Any) -> Any:
                if is_factored(names, leaf) != factored:
                    return optax.MaskedNode()
                if axis is None:
                    return jnp.zeros_like(leaf)
                return jax.tree.map(lambda array: jnp.zeros_like(array).sum(axis), leaf)

            new = [at_leaf(*leaf) for leaf in named_leaves(params, is_coordinates)]
            return jax.tree.structure(params, is_coordinates).unflatten(new)

        return FactoredState(
            count=jnp.zeros([], jnp.int32),
            rows=zeros(factored=True, axis=-1),
            columns=zeros(factored=True, axis=-2),
            nu=zeros(factored=False, axis=None),
        )

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params
        count = optax.safe_increment(state.count)
        decay = 1 - jnp.asarray(count, jnp.float32) ** -decay_rate
        average = lambda old, new: (decay * widened(old) + (1 - decay) * new).astype(old.dtype)

        def at_matrix(update: Any, rows: Any, columns: Any) -> tuple[Any, Any, Any]:
            update = widened(update)
            square = jnp.abs(update) ** 2 + eps
            rows, columns = average(rows, square.mean(-1)), average(columns, square.mean(-2))
            # Separate roots: the product of two tiny factors would underflow.
            by_row, by_column = widened(rows), widened(columns)
            of_rows = (by_row.mean(axis=-1, keepdims=True) ** 0.5 * by_row**-0.5)[..., None]
            return update * of_rows * by_column[..., None, :] ** -0.5, rows, columns

        def at_leaf(names: tuple[str, ...], update: Any, rows: Any, columns: Any, nu: Any) -> Any:
            if is_coordinates(update):
                arrays = at_matrix(update.value, rows.value, columns.value)
                return *(Coordinates(array, update.projection) for array in arrays), nu
            if is_factored(names, update):
                return *at_matrix(update, rows, columns), nu
            update = widened(update)
            nu = average(nu, jnp.abs(update) ** 2 + eps)
            return update * widened(nu) ** -0.5, rows, columns, nu

        leaves = named_leaves(updates, is_coordinates)
        tree = jax.tree.structure(updates, is_coordinates)
        kept = [tree.flatten_up_to(part) for part in (state.rows, state.columns, state.nu)]
        results = [at_leaf(*leaf, *parts) for leaf, *parts in zip(leaves, *kept, strict=True)]
        new, *factors = (tree.unflatten([parts[i] for parts in results]) for i in range(4))
        return new, FactoredState(count, *factors)

    return optax.GradientTransformation(init_fn, update_fn)
