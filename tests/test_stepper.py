"""Training steps of projected gradients, and the refreshes between them."""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

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
from galore_jax.training.pretraining import Pretraining, batch_loss
from galore_jax.training.state import tree_bytes
from galore_jax.training.step import Stepper, make_train_step

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
    stepper, state = Stepper(Pretraining(config)), initial(config)
    step, refresh, other = make_train_step(Pretraining(config)), refresh_of(config), initial(config)
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


@pytest.mark.slow
def test_a_resumed_stepper_asks_when_the_next_refresh_is_due(batch):
    one, state = Stepper(Pretraining(CONFIG)), initial(CONFIG)
    for _ in range(4):
        state, _ = one(state, batch)
    two, copy = Stepper(Pretraining(CONFIG)), jax.tree.map(jnp.copy, state)
    for _ in range(4):
        (state, _), (copy, _) = one(state, batch), two(copy, batch)
    assert_equal(state, copy)


def test_full_and_projected_gradients_make_the_same_step(batch):
    galore = {"update_proj_gap": 4}
    settings = {"learning_rate": 0.003, "clip_norm": 0.0, "galore": galore}
    config = changed(CONFIG, optimizer=settings)
    full = changed(config, optimizer={"gradients": "full"})
    projected_step, full_step = (
        make_train_step(Pretraining(config)),
        make_train_step(Pretraining(full)),
    )
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


def test_a_refresh_that_needs_full_gradients_has_them():
    svd = {"galore": {"refresh": "svd"}}
    assert CONFIG.optimizer.has_projected_gradients
    assert not changed(CONFIG, optimizer=svd).optimizer.has_projected_gradients


@pytest.mark.slow
def test_a_layerwise_step_equals_an_ordinary_one(batch):
    # At this rate rounding does not grow in a few steps.
    settings = {"learning_rate": 1e-4, "warmup_steps": 0, "clip_by": "this_step"}
    config = changed(CONFIG, optimizer=settings)
    other = changed(config, training={"layerwise": True})
    one, two = Stepper(Pretraining(config)), Stepper(Pretraining(other))
    state, actual = initial(config), initial(other)
    for _ in range(5):
        (state, expected), (actual, measured) = one(state, batch), two(actual, batch)
        assert_equal(actual.params, state.params, atol=1e-5)
        for name in measured:
            np.testing.assert_allclose(measured[name], expected[name], rtol=1e-4)
    assert {"loss", "targets", "learning_rate", "coordinates_norm"} <= set(measured)


@pytest.mark.parametrize("targets", ["many", "fewer than micro-batches"])
def test_a_layerwise_step_over_micro_batches_weighs_every_target_alike(batch, targets):
    batch["targets"] = batch["targets"].at[::2, 3:].set(-1).at[1].set(-1)
    if targets != "many":
        batch["targets"] = batch["targets"].at[1:].set(-1)
    settings = {"learning_rate": 1e-4, "warmup_steps": 0}
    config = changed(CONFIG, optimizer=settings, training={"accumulation": 4})
    other = changed(config, training={"layerwise": True})
    one, two = (make_train_step(Pretraining(each)) for each in (config, other))
    (state, expected), (actual, measured) = one(initial(config), batch), two(initial(other), batch)
    assert_equal(actual.params, state.params, atol=1e-5)
    for name in measured:
        np.testing.assert_allclose(measured[name], expected[name], rtol=1e-4)


def test_an_unknown_way_to_clip_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"optimizer\.clip_by must be 'this_step' or"):
        changed(CONFIG, optimizer={"clip_by": "guess"})


def test_programs_are_compiled_when_needed_and_shared_by_runs_that_differ_in_their_seed(batch):
    compiled, said, shared = [], [], {}

    @contextlib.contextmanager
    def compiling():
        compiled.append(1)
        yield

    for seed in (0, 1):
        task = Pretraining(changed(CONFIG, training={"seed": seed}))
        stepper = Stepper(task, programs=shared, compiling=compiling, say=said.append)
        state = initial(task.config)
        losses = []
        for _ in range(2):
            state, measured = stepper(state, batch)
            losses.append(float(measured["loss"]))
        if seed:
            own, state = Stepper(task), initial(task.config)
            for loss in losses:
                state, measured = own(state, batch)
                assert measured["loss"] == loss
    assert len(compiled) == 2  # a step that refreshes, and one that does not
    sizes = [re.fullmatch(r"a step.* needs (.*) MB of the device's (.*) GB", one) for one in said]
    state_bytes = tree_bytes(initial(task.config))
    assert [float(size[1]) * 1e6 > state_bytes for size in sizes] == [True, True]
    assert stepper.compile_seconds == 0


CACHE = """
import sys
import jax
from galore_jax.training.processes import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("chosen", [None, "own"])
def test_programs_are_kept_between_processes_where_the_user_wants_them(tmp_path, chosen):
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / chosen)
    command = [sys.executable, "-c", CACHE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder = Path(run.stdout.strip())
    assert folder.is_relative_to(tmp_path / (chosen or "cache"))
    assert any(folder.glob("*-cache"))
    assert (tmp_path / "cache").exists() != bool(chosen)


def test_programs_for_several_devices_are_not_kept(tmp_path):
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", CACHE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"
    assert not any(tmp_path.iterdir())
