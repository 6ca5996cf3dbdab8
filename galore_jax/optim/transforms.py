"""Links of chains: transformations that know coordinates, and what stands around them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


class DecayWeightsState(NamedTuple):
    """State of `decay_weights`: count, int32 scalar, updates so far."""

    count: jax.typing.ArrayLike


def decay_weights(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Decoupled decay of whole weights, the last link of a chain with galore; nothing comes after.

    With update u the weight becomes `(W + u) · (1 − lr · weight_decay)`, the reference's order.
    For a projected leaf the part of W outside the subspace decays too: the `Coordinates` carry the
    fraction to the lift.

    Args:
      learning_rate: a number, or a schedule of the update's number.
      weight_decay: per update and unit of learning rate.
      mask: which leaves decay, a tree of booleans or a function from the parameters (their shapes)
        to one; None: all.

    Returns:
      An optax transformation.

    Raises:
      ValueError: its `update` is called without `params`.
    """

    def init_fn(params: PyTree) -> DecayWeightsState:
        del params
        return DecayWeightsState(jnp.zeros([], jnp.int32))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        if params is None:
            raise ValueError(
                "decay_weights needs the parameters: call update(grads, state, params)."
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        fraction = jnp.asarray(rate * weight_decay, jnp.float32)

        def decay(update: Any, param: Any, decays: bool) -> Any:
            if not decays:
                return update
            if isinstance(update, Coordinates):
                return Coordinates(update.value * (1 - fraction), update.projection, fraction)
            return update * (1 - fraction) - fraction * param

        decays = True if mask is None else mask(_full_shapes(params)) if callable(mask) else mask
        decays = jax.tree.broadcast(unboxed(decays), updates, is_leaf=is_coordinates)
        updates = jax.tree.map(decay, updates, params, decays, is_leaf=is_coordinates)
        return updates, DecayWeightsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _full_shapes(params: PyTree) -> PyTree:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, Coordinates):
            return jax.ShapeDtypeStruct(leaf.projection.view.shape, leaf.value.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape, params, is_leaf=is_coordinates)


def clip_by_finite_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` in which numbers that are not finite do not count.

    With the stock one a single NaN makes the norm NaN and with it every gradient. Here the others
    are scaled as if it were not there, and it goes on as it is, for galore to leave its matrix out.
    Finite numbers stay finite, however large: those whose squares overflow float32 count too, and
    are scaled down like the rest.

    Args:
      max_norm: the gradients are scaled down to this global norm where theirs is larger.

    Returns:
      An optax transformation, to stand in front of galore.
    """

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params
        squares, large_norm = _squares_and_large_norm(updates)
        norm = jnp.hypot(jnp.sqrt(squares), large_norm)
        factor = jnp.where(norm > max_norm, max_norm / norm, 1)
        return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def finite_squares(tree: PyTree) -> jax.Array:
    """The sum of the squares of all finite numbers in a tree, a float32 scalar of at most 2^80.

    So norms of 2^40 or more count as 2^40: of these the square would soon overflow float32, and
    that of a gradient scaled down by them underflow.
    """
    squares = jnp.float32(0)
    for part, finite in _parts(tree):
        # One reduction, so that XLA keeps no array for it: larger numbers count as the bound.
        squares += jnp.sum(jnp.minimum(jnp.where(finite, part, 0) ** 2, _LARGE**2))
    return jnp.minimum(squares, _LARGE**2)


# Numbers from `_LARGE` on are scaled down before they are squared, for float32 ends at 2^128.
_LARGE, _SCALE = 2.0**40, 2.0**-80


def _squares_and_large_norm(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """Of the finite numbers in a tree: the sum of the squares below `_LARGE`, the others' norm."""
    squares = large = jnp.float32(0)
    for part, finite in _parts(tree):
        is_large = jnp.abs(part) >= _LARGE
        squares += jnp.sum(jnp.where(finite & ~is_large, part, 0) ** 2)
        large += jnp.sum(jnp.where(finite & is_large, part * _SCALE, 0) ** 2)
    return squares, jnp.sqrt(large) / _SCALE


def _parts(tree: PyTree) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The numbers of each leaf, real and imaginary parts apart, and which numbers are finite."""
    for leaf in jax.tree.leaves(tree):
        # Flat, for zeros in the shape of a leaf XLA might keep as an array.
        flat = leaf.reshape(-1)
        for part in (flat.real, flat.imag) if jnp.iscomplexobj(flat) else (flat,):
            yield part.astype(jnp.float32), jnp.isfinite(flat)


class FactoredState(NamedTuple):
    """State of `scale_by_factored_rms`, of a leaf `(*batch, in, out)`.

    Attributes:
      count: int32 scalar, updates so far.
      rows: second moments averaged over the out axis, `(*batch, in)`.
      columns: averaged over the in axis, `(*batch, out)`.
      nu: the second moments of the leaves that are not factored; each leaf is a
        `optax.MaskedNode()` either here or in the two others.
    """

    count: jax.typing.ArrayLike
    rows: PyTree
    columns: PyTree
    nu: PyTree


def scale_by_factored_rms(
    decay_rate: float = 0.8, eps: float = 1e-30, min_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Divides by the root of factored second moments (Adafactor, arXiv 1804.04235, algorithm 4).

    As `optax.scale_by_factored_rms`, but each matrix of a stack has factors of its own, along the
    last two axes; and coordinates are always factored, however small their rank.

    Args:
      decay_rate: the decay at update t, counted from 1, is `1 − t^−decay_rate`.
      eps: added to the squares.
      min_size_to_factor: other leaves are factored where both of their last two axes are this long.

    Returns:
      An optax transformation.
    """

    def is_factored(leaf: Any) -> bool:
        shape = jnp.shape(leaf.value if is_coordinates(leaf) else leaf)
        return is_coordinates(leaf) or (len(shape) >= 2 and min(shape[-2:]) >= min_size_to_factor)

    def init_fn(params: PyTree) -> FactoredState:
        def zeros(factored: bool, axis: int | None) -> PyTree:
            def at_leaf(leaf: Any) -> Any:
                if is_factored(leaf) != factored:
                    return optax.MaskedNode()
                if axis is None:
                    return jnp.zeros_like(leaf)
                return jax.tree.map(lambda array: jnp.zeros_like(array).sum(axis), leaf)

            return jax.tree.map(at_leaf, params, is_leaf=is_coordinates)

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
        average = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)

        def at_matrix(update: Any, rows: Any, columns: Any) -> tuple[Any, Any, Any]:
            square = update**2 + eps
            rows, columns = average(rows, square.mean(-1)), average(columns, square.mean(-2))
            # Root by root: of zeros in a row and a column the product of factors underflows.
            of_rows = (rows.mean(axis=-1, keepdims=True) ** 0.5 * rows**-0.5)[..., None]
            return update * of_rows * columns[..., None, :] ** -0.5, rows, columns

        def at_leaf(update: Any, rows: Any, columns: Any, nu: Any) -> tuple[Any, Any, Any, Any]:
            if is_coordinates(update):
                new, rows, columns = (
                    Coordinates(part, update.projection)
                    for part in at_matrix(update.value, rows.value, columns.value)
                )
                return new, rows, columns, nu
            if is_factored(update):
                return (*at_matrix(update, rows, columns), nu)
            nu = average(nu, update**2 + eps)
            return update * nu**-0.5, rows, columns, nu

        leaves, tree = jax.tree.flatten(updates, is_leaf=is_coordinates)
        kept = [tree.flatten_up_to(part) for part in (state.rows, state.columns, state.nu)]
        done = [at_leaf(*parts) for parts in zip(leaves, *kept, strict=True)]
        new, *factors = (jax.tree.unflatten(tree, [parts[i] for parts in done]) for i in range(4))
        return new, FactoredState(count, *factors)

    return optax.GradientTransformation(init_fn, update_fn)


def clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """Scales each matrix of coordinates, each other leaf as a whole, down to a root mean square.

    Adafactor's update clipping (arXiv 1804.04235, section 6); `optax.clip_by_block_rms` takes all
    matrices of a stack together.

    Args:
      threshold: of the root mean square.

    Returns:
      An optax transformation.
    """

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params

        def clip(update: Any) -> Any:
            axis = (-2, -1) if is_coordinates(update) else None
            array = update.value if is_coordinates(update) else update
            rms = jnp.sqrt(jnp.mean(array**2, axis=axis, keepdims=True))
            clipped = array / jnp.maximum(1, rms / threshold)
            return Coordinates(clipped, update.projection) if is_coordinates(update) else clipped

        return jax.tree.map(clip, updates, is_leaf=is_coordinates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
