"""Training steps of projected gradients, and the refreshes between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from next_tokens import random_rows
from test_step import CONFIG as FULL
from test_step import initial

import galore_jax
from galore_jax.errors import InputError
from galore_jax.grads.refresh import refresh_due
from galore_jax.training.config_file import changed
from galore_jax.training.step import batch_loss, make_train_step
from galore_jax.training.stepper import Stepper

CONFIG = changed(FULL, optimizer={"gradients": "projected", "clip_norm": 0.5})


@pytest.fixture
def batch():
    return random_rows()


def assert_equal(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def refresh_of(config):
    loss, number = functools.partial(batch_loss, config.model), config.training.accumulation
    return jax.jit(galore_jax.refresh(loss, has_aux=True, micro_batches=number))


def test_bases_are_refreshed_before_the_steps_that_are_due(batch):
    config = changed(CONFIG, training={"accumulation": 4})
    stepper, state = Stepper(config, initial(config)), initial(config)
    step, refresh, other = make_train_step(config), refresh_of(config), initial(config)
    refreshed = []
    for t in range(8):
        if refresh_due(other.opt_state):
            other = other._replace(opt_state=refresh(other.params, other.opt_state, batch))
            refreshed.append(t)
        other, expected = step(other, batch)
        state, measured = stepper(state, batch)
        assert_equal(measured, expected)
        assert_equal(state.params, other.params)
    assert refreshed == [0, 3, 6]
    assert measured["loss"] < 4.4 < np.log(97)


def test_a_resumed_stepper_asks_when_the_next_refresh_is_due(batch):
    one, state = Stepper(CONFIG, initial(CONFIG)), initial(CONFIG)
    for _ in range(4):
        state, _ = one(state, batch)
    two, copy = Stepper(CONFIG, state), jax.tree.map(jnp.copy, state)
    for _ in range(4):
        (state, _), (copy, _) = one(state, batch), two(copy, batch)
    assert_equal(state, copy)


def test_full_and_projected_gradients_make_the_same_step(batch):
    galore = {"update_proj_gap": 4}
    settings = {"learning_rate": 0.003, "clip_norm": 0.0, "galore": galore}
    config = changed(CONFIG, optimizer=settings)
    full = changed(config, optimizer={"gradients": "full"})
    projected_step, full_step = make_train_step(config), make_train_step(full)
    refresh, state = refresh_of(config), initial(config)
    state = state._replace(opt_state=refresh(state.params, state.opt_state, batch))
    for _ in range(3):
        other, from_full = full_step(jax.tree.map(jnp.copy, state), batch)
        state, measured = projected_step(state, batch)
        assert_equal(state.params, other.params, atol=1e-5)
        np.testing.assert_allclose(
            measured["coordinates_norm"], from_full["coordinates_norm"], rtol=1e-5
        )
        assert from_full["gradient_norm"] > from_full["coordinates_norm"]
        assert "gradient_norm" not in measured


def test_diagnostics_of_projected_gradients_are_those_of_full_ones(batch):
    config = changed(CONFIG, training={"diagnostics": True})
    full = changed(config, optimizer={"gradients": "full"})
    refresh, state = refresh_of(config), initial(config)
    state = state._replace(opt_state=refresh(state.params, state.opt_state, batch))
    _, expected = make_train_step(full)(jax.tree.map(jnp.copy, state), batch)
    _, actual = make_train_step(config)(state, batch)
    for name in ("captured_energy", "update_ratio"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4)


def test_a_refresh_that_needs_full_gradients_has_them():
    svd = {"galore": {"refresh": "svd"}}
    assert not changed(FULL, optimizer={**svd, "gradients": None}).optimizer.has_projected_gradients
    with pytest.raises(InputError, match=r'optimizer.galore.refresh = "svd" needs full gradients'):
        changed(CONFIG, optimizer=svd)
    changed(CONFIG, optimizer={**svd, "name": "adamw"})


def test_a_layerwise_step_equals_an_ordinary_one(batch):
    # At this rate rounding does not grow in a few steps.
    settings = {"learning_rate": 1e-4, "warmup_steps": 0, "clip_by": "first_pass"}
    config = changed(CONFIG, optimizer=settings)
    other = changed(config, training={"layerwise": True})
    one, two = Stepper(config, initial(config)), Stepper(other, initial(other))
    state, actual = initial(config), initial(other)
    for _ in range(5):
        (state, expected), (actual, measured) = one(state, batch), two(actual, batch)
        assert_equal(actual.params, state.params, atol=1e-5)
        for name in measured:
            np.testing.assert_allclose(measured[name], expected[name], rtol=1e-4)
    assert {"loss", "targets", "learning_rate", "coordinates_norm"} <= set(measured)


@pytest.mark.parametrize(
    ("section", "settings", "sentence"),
    [
        ("training", {"accumulation": 2}, "its gradient, which excludes training.accumulation:"),
        ("training", {"diagnostics": True}, "its gradient, which excludes training.diagnostics:"),
        ("optimizer", {"clip_by": "guess"}, "optimizer.clip_by must be 'first_pass' or"),
    ],
)
def test_what_a_layerwise_run_cannot_do_is_refused_in_a_sentence(section, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        changed(changed(CONFIG, training={"layerwise": True}), **{section: settings})
