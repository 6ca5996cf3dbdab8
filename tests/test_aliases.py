"""The ready-made chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients
from galore_jax.optim.factored_rms import scale_by_factored_rms


def params_and_grads(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda i, shape: jax.random.normal(keys[i], shape, dtype)
    return tuple({"kernel": draw(i, (12, 20)), "bias": draw(i + 1, (20,))} for i in (0, 2))


def step(tx, params, grads, state=None, key=None):
    state = tx.init(params) if state is None else state
    return apply_gradients(tx, grads, state, params, key=key)


@pytest.mark.parametrize(
    ("mask", "decays"),
    [
        ({"kernel": True, "bias": False}, {"kernel"}),
        (lambda params: jax.tree.map(lambda p: p.shape == (12, 20), params), {"kernel"}),
        ({"kernel": False, "bias": False}, set()),
    ],
    ids=["kernel", "function of the full shapes", "nothing"],
)
@pytest.mark.parametrize("make", ["adamw", "muon", "lion", "adafactor"])
def test_a_mask_says_which_leaves_decay(make, mask, decays):
    params, grads = params_and_grads()
    make = getattr(galore_jax, make)
    plain, _ = step(make(0.1, rank=4), params, grads)
    decayed, _ = step(make(0.1, rank=4, weight_decay=0.5, mask=mask), params, grads)
    for name in params:
        if name in decays:
            np.testing.assert_allclose(decayed[name], plain[name] * 0.95, atol=1e-6)
        else:
            np.testing.assert_array_equal(decayed[name], plain[name])


def test_a_schedule_sets_the_coefficient_of_the_decay():
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = galore_jax.lion(0.5, rank=2, weight_decay=lambda count: 0.1 * (count + 1))
    state = tx.init(params)
    for expected in (0.95, 0.95 * 0.9):
        params, state = galore_jax.apply_gradients(tx, zeros, state, params)
        for leaf in jax.tree.leaves(params):
            np.testing.assert_allclose(leaf, expected, rtol=1e-6)


def test_a_schedule_sets_the_rate_of_the_update_and_of_the_decay():
    params, grads = params_and_grads()
    schedule = lambda count: jnp.where(count == 0, 0.0, 0.1)
    tx = galore_jax.adamw(schedule, rank=4, weight_decay=0.5)
    after_one, state = step(tx, params, grads)
    np.testing.assert_array_equal(after_one["kernel"], params["kernel"])
    after_two, _ = step(tx, after_one, jax.tree.map(jnp.zeros_like, grads), state)
    # The second update comes from the moments of the first; the decay takes 5% of the result.
    tx = galore_jax.adamw(schedule, rank=4)
    undecayed, _ = step(
        tx, after_one, jax.tree.map(jnp.zeros_like, grads), step(tx, params, grads)[1]
    )
    np.testing.assert_allclose(after_two["kernel"], undecayed["kernel"] * 0.95, atol=1e-6)


def test_adafactor_leaves_rows_and_columns_of_zeros_at_zero():
    tx = scale_by_factored_rms(min_size_to_factor=2)
    grads = {"kernel": jnp.full((8, 12), 1e6).at[0].set(0).at[:, 0].set(0)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    expected = jnp.where(grads["kernel"] > 0, updates["kernel"][1, 1], 0)
    np.testing.assert_array_equal(updates["kernel"], expected)
    assert jnp.isfinite(updates["kernel"]).all()


def test_stochastic_rounding_keeps_on_average_what_rounding_to_nearest_swallows():
    params, grads = params_and_grads(jnp.bfloat16)
    params = jax.tree.map(jnp.ones_like, params)
    tx = optax.sgd(1.0)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0**-12), params)
    nearest, _ = step(tx, params, grads)
    assert all(bool((leaf == 1).all()) for leaf in jax.tree.leaves(nearest))
    moved = []
    for seed in range(200):
        rounded, _ = step(tx, params, grads, key=jax.random.key(seed))
        moved.append([float((1 - leaf.astype(jnp.float32)).mean()) for leaf in rounded.values()])
    # Below 1 neighbours lie 2^-8 apart: a step of 2^-12 goes there one time in 16. For 20 numbers
    # and 200 seeds the standard error of the mean is 2^-8 · √(15/256/4000).
    error = 2.0**-8 * (15 / 256 / 4000) ** 0.5
    np.testing.assert_allclose(np.mean(moved, axis=0), 2.0**-12, atol=5 * error)


def test_stochastic_rounding_differs_between_the_layers_of_a_stack():
    params = {"kernel": jnp.ones((3, 12, 20), jnp.bfloat16)}
    grads = {
        "kernel": jnp.broadcast_to(jax.random.normal(jax.random.key(0), (12, 20)), (3, 12, 20))
    }
    tx = galore_jax.adamw(1e-3, rank=4, refresh="svd")
    new, _ = step(tx, params, grads, key=jax.random.key(0))
    assert new["kernel"].dtype == jnp.bfloat16
    assert not bool((new["kernel"][0] == new["kernel"][1]).all())
