"""Stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.quantization import stochastic_round


def test_numbers_that_bfloat16_holds_stay_as_they_are():
    held = jax.random.normal(jax.random.key(0), (1000,)).astype(jnp.bfloat16)
    held = jnp.concatenate([held, jnp.array([0.0, -0.0, jnp.inf, -jnp.inf], jnp.bfloat16)])
    rounded = stochastic_round(held.astype(jnp.float32), jax.random.key(1))
    np.testing.assert_array_equal(rounded.view(jnp.uint16), held.view(jnp.uint16))


def test_nan_stays_nan():
    assert bool(jnp.isnan(stochastic_round(jnp.array([jnp.nan]), jax.random.key(0))).all())


def test_a_number_goes_to_one_of_its_two_neighbours():
    x = jax.random.normal(jax.random.key(0), (10_000,))
    rounded = stochastic_round(x, jax.random.key(1)).astype(jnp.float32)
    # Neighbours lie 2^-7 of the power of two below x apart.
    spacing = 2.0 ** (jnp.floor(jnp.log2(jnp.abs(x))) - 7)
    assert bool((jnp.abs(rounded - x) < spacing).all())


def test_the_mean_is_the_number():
    # 0.3 of the way from 1 to its neighbour 1 + 2^-7; 200,000 draws: standard error 0.46/447.
    x = jnp.full(200_000, 1 + 0.3 * 2.0**-7)
    for sign in (1, -1):
        up = stochastic_round(sign * x, jax.random.key(0)).astype(jnp.float32) * sign > 1
        assert abs(float(up.mean()) - 0.3) < 5 * 0.46 / 447
