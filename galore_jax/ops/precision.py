"""The dtypes in which this package computes, and rounding from them to bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def promoted(one: Any, other: Any) -> Any:
    """The dtype to which JAX by default promotes two others, of which float8 counts as float32."""

    def known(dtype: Any) -> Any:
        is_float8 = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1
        return jnp.float32 if is_float8 else dtype

    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(known(one), known(other))


def widened(array: Any) -> jax.Array:
    """An array, or a number, in float32 or in its own dtype if that is wider or complex."""
    array = jnp.asarray(array)
    return array.astype(promoted(array.dtype, jnp.float32))


def as_multiplied_on_tpu(array: jax.Array) -> jax.Array:
    """A factor of a product on a TPU, which by default rounds float32 to bfloat16."""
    config: Any = jax.config
    is_default = config.jax_default_matmul_precision in (None, "default", "fastest", "bfloat16")
    is_rounded = is_default and array.dtype == jnp.float32
    return array.astype(jnp.bfloat16) if is_rounded else array


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 stochastically to one of the two neighbouring bfloat16 values, unbiased.

    Random bits are added below the bits that bfloat16 keeps, and then the lower 16 bits are cut
    off. Numbers that bfloat16 represents exactly are unchanged, as are infinities and NaN.

    Args:
      x: float32, any shape.
      key: for the random bits.

    Returns:
      bfloat16 of the same shape, with `E[result] = x` up to 2^-16 of the spacing of its neighbours.
    """
    return round_with_noise(x, jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))


def round_with_noise(x: jax.Array, noise: jax.Array) -> jax.Array:
    """`stochastic_round` with the given 16 random bits per number, as uint32."""
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(bits, jnp.float32)
    # The cast is exact: the 16 bits that bfloat16 lacks are zero.
    return jnp.where(jnp.abs(x) < jnp.inf, rounded, x).astype(jnp.bfloat16)
