"""Clips for chains with galore: by the norm of finite gradients, and per matrix."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.precision import widened
from galore_jax.subspace.matrix_view import is_vector, named_leaves
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree

# Elements from `_LARGE` on are scaled down before they are squared: float32 overflows at 2^128.
_LARGE, _SCALE = 2.0**40, 2.0**-80


def clip_by_finite_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by the norm of the finite elements.

    With the stock transformation a single NaN makes the norm, and with it every gradient, NaN. Here
    the finite elements are clipped as if the others were zero. The others are passed on unchanged,
    so that galore skips their matrices. Finite elements stay finite, however large: those whose
    squares overflow float32 count too, and are scaled down like the rest.

    Of a projected gradient, the norm is that of its coordinates.

    Args:
      max_norm: gradients with a larger global norm are scaled down to this one.

    Returns:
      An optax transformation, to be put in front of galore.
    """

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params
        squares, large_norm = _squares_and_large_norm(updates)
        norm = jnp.hypot(jnp.sqrt(squares), large_norm)
        factor = clip_factor(norm, max_norm)
        clip = lambda leaf: (widened(leaf) * factor).astype(leaf.dtype)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def clip_factor(norm: jax.Array, max_norm: float | jax.Array) -> jax.Array:
    """The factor, at most 1, that brings a norm down to the largest one."""
    return jnp.where(norm > max_norm, max_norm / norm, 1)


def finite_squares(tree: PyTree) -> jax.Array:
    """The sum of squares of all finite elements of a tree, a float32 scalar of at most 2^80.

    Norms above 2^40 thus count as 2^40: the square of a larger norm may overflow float32, and the
    square of a gradient divided by it underflow.
    """
    squares = jnp.float32(0)
    for part, finite in _parts(tree):
        # A single reduction, for which XLA stores no array; larger elements count as the bound.
        squares += jnp.sum(jnp.minimum(jnp.where(finite, part, 0) ** 2, _LARGE**2))
    return jnp.minimum(squares, _LARGE**2)


def _squares_and_large_norm(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """The sum of squares of finite elements below `_LARGE`, and the norm of the larger ones."""
    squares = large = jnp.float32(0)
    for part, finite in _parts(tree):
        is_large = jnp.abs(part) >= _LARGE
        squares += jnp.sum(jnp.where(finite & ~is_large, part, 0) ** 2)
        large += jnp.sum(jnp.where(finite & is_large, part * _SCALE, 0) ** 2)
    return squares, jnp.sqrt(large) / _SCALE


def _parts(tree: PyTree) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The elements of each leaf, real and imaginary parts separately, and which are finite."""
    for leaf in jax.tree.leaves(tree):
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            yield part.astype(jnp.float32), jnp.isfinite(leaf)


def clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """Clips the root mean square of each matrix, and of each bias, scale and other vector.

    Adafactor's update clipping (arXiv 1804.04235, section 6). `optax.clip_by_block_rms` treats all
    matrices of a stack together. Unprojected leaves are matrices or vectors by their names, so that
    what happens to a layer does not depend on whether it is stacked.

    Args:
      threshold: the largest root mean square.

    Returns:
      An optax transformation.
    """

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params

        def clip(names: tuple[str, ...], update: Any) -> Any:
            array = update.value if is_coordinates(update) else update
            axes = 1 if not is_coordinates(update) and is_vector(names) else 2
            axis = tuple(range(max(array.ndim - axes, 0), array.ndim))
            rms = jnp.sqrt(jnp.mean(jnp.abs(array) ** 2, axis=axis, keepdims=True))
            clipped = array / jnp.maximum(1, rms / threshold)
            return Coordinates(clipped, update.projection) if is_coordinates(update) else clipped

        clipped = [clip(*leaf) for leaf in named_leaves(updates, is_coordinates)]
        return jax.tree.structure(updates, is_coordinates).unflatten(clipped), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)
