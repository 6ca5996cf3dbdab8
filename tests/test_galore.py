"""The optax face: galore, chain, init, apply_gradients."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import PLAIN, STACKED, gradients, loss, max_difference, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore, init
from galore_jax.optim.galore import _warn_of_full_size


def test_chain_holds_low_rank_adam_moments():
    params = random_params(PLAIN)
    state = chain(galore(rank=8), optax.adam(1e-3)).init(params)
    shapes = jax.tree.map(jnp.shape, optax.tree.get(state, "nu"))
    assert shapes["wide"]["kernel"].value == (8, 20)
    assert shapes["tall"]["kernel"].value == (20, 8)
    assert shapes["square"]["kernel"].value == (8, 16)
    assert shapes["bias"]["bias"] == (12,)


@pytest.mark.parametrize(
    "inner",
    [optax.adam(1e-2), optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)],
    ids=["adam", "adamw", "momentum"],
)
def test_the_stock_chain_started_with_init_gives_the_same_parameters_as_chain(inner):
    target = random_params(STACKED, seed=1)
    runs = []
    parts = galore(rank=8, update_proj_gap=2), inner
    for tx in (chain(*parts), optax.chain(*parts), optax.chain(optax.identity(), chain(*parts))):
        params = random_params(STACKED)
        state = init(tx, params)
        step = jax.jit(lambda p, s, tx=tx: apply_gradients(tx, jax.grad(loss)(p, target), s, p))
        for _ in range(5):
            params, state = step(params, state)
        runs.append((params, state))
    (params, state), (stock_params, stock_state), (wrapped_params, _) = runs
    assert jax.tree.structure(state.inner_states) == jax.tree.structure(stock_state)
    shapes = [jax.tree.map(jnp.shape, jax.tree.leaves(s)) for s in (state, stock_state)]
    assert shapes[0] == shapes[1]
    assert max_difference(params, stock_params) <= 1e-6
    assert max_difference(params, wrapped_params) == 0


def test_a_bare_init_trains_with_full_size_moments_and_warns_once_with_both_remedies():
    _warn_of_full_size.cache_clear()
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    tx = optax.chain(galore(rank=8), optax.adam(3e-2))
    state = tx.init(params)
    assert jax.tree.map(jnp.shape, optax.tree.get(state, "mu")) == jax.tree.map(jnp.shape, params)
    before = loss(params, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            updates, state = tx.update(gradients(params, target), state, params)
            params = optax.apply_updates(params, updates)
    (warning,) = caught
    assert "galore_jax.chain" in str(warning.message)
    assert "galore_jax.init(tx, params)" in str(warning.message)
    assert loss(params, target) < 0.7 * before


def test_a_bare_init_hands_on_the_gradient_projected_in_its_full_shape():
    _warn_of_full_size.cache_clear()
    params = random_params({"wide": (12, 20)})
    tx = galore(rank=5)
    with pytest.warns(UserWarning, match="full-size"):
        updates, state = tx.update(params, tx.init(params), params)
    basis = state.bases["wide"]["kernel"].vectors["left"]
    expected = basis @ basis.T @ params["wide"]["kernel"]
    np.testing.assert_allclose(updates["wide"]["kernel"], expected, atol=1e-5)


def test_transformations_before_galore_see_full_gradients():
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    tx = chain(optax.trace(0.9), optax.clip_by_global_norm(1.0), galore(rank=8), optax.identity())
    state = tx.init(params)
    grads = gradients(params, target)
    updates, state = tx.update(grads, state, params)
    assert max_difference(state.inner_states[0].trace, grads) == 0
    clipped = grads["bias"]["bias"] / optax.tree.norm(grads)
    np.testing.assert_allclose(updates["bias"]["bias"], clipped, rtol=1e-5)


def test_a_ready_made_chain_can_be_extended_in_front():
    tx = chain(optax.clip_by_global_norm(1.0), galore_jax.adamw(1e-2, rank=4))
    params = random_params(PLAIN)
    assert optax.tree.get(tx.init(params), "mu")["wide"]["kernel"].value.shape == (4, 20)
    assert len(tx.init(params).inner_states) == 5


def test_what_enters_the_inner_optimizer_is_float32_and_updates_leave_in_the_parameters_dtype():
    seen = {}

    def update(updates, state, params=None):
        seen["updates"], seen["params"] = updates, params
        return updates, state

    probe = optax.GradientTransformation(lambda params: seen.update(start=params), update)
    params = random_params(PLAIN, dtype=jnp.bfloat16)
    tx = chain(galore(rank=4), probe)
    updates, _ = tx.update(params, tx.init(params), params)
    for name in ("start", "updates", "params"):
        assert {leaf.dtype for leaf in jax.tree.leaves(seen[name])} == {jnp.dtype("float32")}
        assert seen[name]["wide"]["kernel"].value.shape == (4, 20)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def arrays_for_gap_scale_and_seed():
    return chain(galore(4, jnp.int32(5), jnp.float32(0.5), seed=jnp.uint32(3)), optax.sgd(1.0))


def injected_hyperparameters():
    make = optax.inject_hyperparams(
        galore_jax.adamw, static_args="rank", hyperparam_dtype=jnp.float32
    )
    return make(learning_rate=1e-3, rank=4)


@pytest.mark.parametrize("make", [arrays_for_gap_scale_and_seed, injected_hyperparameters])
def test_settings_that_are_arrays_outlive_a_donated_state(make):
    tx, grads = make(), random_params(STACKED, seed=2)
    step = jax.jit(lambda p, s, g: apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
    for _ in range(2):
        params = random_params(STACKED)
        state = tx.init(params)
        for _ in range(2):
            params, state = step(params, state, grads)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_no_lifted_update_of_a_whole_stacked_leaf_exists():
    params = {"kernel": jnp.zeros((16, 128, 256))}
    tx = galore_jax.adamw(1e-2, rank=4)
    step = jax.jit(lambda p, s, g: apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
    memory = step.lower(params, tx.init(params), params).compile().memory_analysis()
    # A few matrices of the sixteen, and coordinates of 1/32 of the size.
    assert memory.temp_size_in_bytes < params["kernel"].nbytes / 4


def test_integers_and_scalars_are_updated_as_optax_does():
    params = {"count": jnp.int32(2**24 + 1), "number": 1.0, "kernel": jnp.ones((12, 20))}
    tx = chain(galore(4), optax.set_to_zero())
    new, _ = apply_gradients(tx, params, tx.init(params), params)
    assert int(new["count"]) == 2**24 + 1
    assert float(new["number"]) == 1.0


def test_bases_have_the_dtype_and_the_seed_that_are_asked_for():
    params = random_params({"wide": (12, 20)})

    def start(**settings):
        return init(galore(4, **settings), params).bases["wide"]["kernel"].vectors["left"]

    assert start(basis_dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert bool((start(seed=3) == start(seed=3)).all())
    assert not bool((start(seed=3) == start(seed=4)).any())


@pytest.mark.slow
def test_every_refresh_runs_with_64_bits_enabled():
    code = """
import jax, jax.numpy as jnp, galore_jax
jax.config.update("jax_enable_x64", True)
for method in ("subspace_iteration", "eigh", "svd"):
    for dtype in (jnp.float32, jnp.float64):
        params = {"w": jnp.ones((12, 20), dtype)}
        tx = galore_jax.adamw(0.1, rank=4, refresh=method)
        new, _ = galore_jax.apply_gradients(tx, params, tx.init(params), params)
        assert new["w"].dtype == dtype
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jaxs_checks_and_its_guard_against_transfers_find_nothing():
    params = random_params(PLAIN)
    tx = galore_jax.adamw(0.1, 4, moments="rotate", lazy_overlap=0.5, weight_decay=0.1)
    with jax.enable_checks(True), jax.transfer_guard("disallow"):
        state = jax.jit(tx.init)(params)
        params, state = jax.jit(lambda p, s: apply_gradients(tx, p, s, p))(params, state)
        jax.jit(tx.update)(params, state, params)
