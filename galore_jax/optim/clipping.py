"""Clips for chains with galore: by the norm of finite gradients, and per matrix."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import PyTree


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
