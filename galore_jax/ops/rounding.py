"""Stochastic rounding of float32 to bfloat16."""

import jax
import jax.numpy as jnp
from jax import lax


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 stochastically to one of the two neighbouring bfloat16 values, unbiased.

    A number at a fraction f of the distance from its neighbour towards zero to its neighbour away
    from zero is rounded away from zero with probability f, at a resolution of 16 bits: random bits
    are added below the bits that bfloat16 keeps, and then the lower bits are cut off. Numbers that
    bfloat16 represents exactly are unchanged, as are infinities and NaN.

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
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
