"""Stochastic rounding of float32 to bfloat16."""

import jax
import jax.numpy as jnp
from jax import lax


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, right on average.

    A number at a fraction f of the way from one neighbour to the next (away from zero) goes to the
    next with probability f, to 16 bits: random bits are added below the kept ones, which are then
    cut off. Numbers that bfloat16 holds stay as they are, and so do infinities and NaN.

    Args:
      x: float32, any shape.
      key: of the random bits.

    Returns:
      bfloat16 of the same shape, with `E[result] = x` up to 2^-16 of a spacing.
    """
    return round_with(x, jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))


def round_with(x: jax.Array, noise: jax.Array) -> jax.Array:
    """`stochastic_round` with given random numbers of 16 bits, as uint32."""
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(bits, jnp.float32)
    # Exact: the sixteen bits that bfloat16 lacks are zero.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
