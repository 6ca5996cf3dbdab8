import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.data.batches import DataConfig
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.step import (
    init_state,
    learning_rate_schedule,
    make_train_step,
    mean_gradients,
    tree_bytes,
    tree_size,
)

CONFIG = Config(
    LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_length=16,
    ),
    DataConfig(sequence_length=16, batch_size=8),
    OptimizerConfig(rank=8, update_proj_gap=3, warmup_steps=2),
    TrainingConfig(steps=10),
)


def changed(config=CONFIG, **sections):
    """The configuration with `section={key: value}` replaced."""
    return dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values)
            for section, values in sections.items()
        },
    )


def initial(config):
    """A state that may be donated."""
    return jax.jit(lambda: init_state(config))()


@functools.cache
def gradients(accumulation):
    """`mean_gradients`, compiled once for all tests."""
    config = changed(training={"accumulation": accumulation})
    return jax.jit(functools.partial(mean_gradients, config))


@pytest.fixture(scope="module")
def params():
    return initial(CONFIG).params


@pytest.fixture
def batch():
    """Rows with very different numbers of targets: the first half is nearly all padding."""
    random = np.random.default_rng(0)
    segments = np.ones((8, 16), np.int32)
    segments[:4, 3:] = 0
    segments[5, 7:] = 2
    positions = np.tile(np.arange(16, dtype=np.int32), (8, 1))
    return {
        "tokens": random.integers(0, 97, (8, 16)).astype(np.int32),
        "segments": segments,
        "positions": positions,
    }


def test_the_learning_rate_rises_from_the_first_step_and_ends_at_the_floor():
    schedule = learning_rate_schedule(
        OptimizerConfig(learning_rate=2.0, warmup_steps=4, floor=0.1), steps=21
    )
    rates = [float(schedule(t)) for t in range(21)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[12], (2.0 + 0.2) / 2, rtol=1e-6)
    np.testing.assert_allclose(rates[20], 0.2, rtol=1e-6)
    assert all(np.diff(rates[4:]) <= 0)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5), (0, 2)])
def test_the_learning_rate_is_positive_in_the_shortest_runs(warmup, steps):
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=warmup), steps)
    assert all(0 < float(schedule(t)) <= 0.01 + 1e-9 for t in range(steps))


def test_micro_batches_change_the_gradient_by_rounding_only(batch, params):
    whole, measured = gradients(1)(params, batch)
    parts, measured_in_parts = gradients(4)(params, batch)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(whole))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)
    np.testing.assert_allclose(measured_in_parts["loss"], measured["loss"], rtol=1e-5)
    assert measured["targets"] == measured_in_parts["targets"] == 4 * 2 + 3 * 15 + 14


def test_the_loss_is_the_mean_over_the_targets(batch, params):
    logits = Llama(CONFIG.model).apply(
        {"params": params}, batch["tokens"], batch["segments"], batch["positions"]
    )
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    losses = [
        -np.log(probabilities[row, t, batch["tokens"][row, t + 1]])
        for row in range(8)
        for t in range(15)
        if batch["segments"][row, t] == batch["segments"][row, t + 1] != 0
    ]
    _, measured = gradients(1)(params, batch)
    np.testing.assert_allclose(measured["loss"], np.mean(losses), rtol=1e-5)


def test_a_batch_of_padding_alone_gives_zero_gradients(batch, params):
    batch["segments"][:] = 0
    found, measured = gradients(1)(params, batch)
    assert measured["targets"] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_steps_learn_count_and_take_over_the_state(batch, name):
    config = changed(optimizer={"name": name, "clip_norm": 1.0})
    step, state = make_train_step(config), initial(config)
    losses = []
    for t in range(6):
        before, (state, measured) = state, step(state, batch)
        losses.append(float(measured["loss"]))
        assert int(state.step) == t + 1
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(losses[0], np.log(97), atol=0.2)
    assert step._cache_size() == 1


def test_galore_keeps_a_smaller_state_than_adamw(params):
    sizes = {
        name: tree_bytes(
            jax.eval_shape(lambda: init_state(changed(optimizer={"name": name}))).opt_state  # noqa: B023
        )
        for name in ("adamw", "galore_adamw")
    }
    assert sizes["adamw"] == 8 * tree_size(params) + 8
    assert sizes["galore_adamw"] < sizes["adamw"]


def rounded(stochastic):
    """A configuration whose updates, 1e-6, are far below bfloat16's spacing at 0.02, 1.2e-4."""
    return changed(
        model={"dtype": "bfloat16"},
        optimizer={
            "name": "adamw",
            "learning_rate": 1e-6,
            "warmup_steps": 0,
            "stochastic_rounding": stochastic,
        },
    )


def head_after_a_step(step, config, batch):
    state, _ = step(initial(config), batch)
    head = state.params["lm_head"]["kernel"]
    assert head.dtype == jnp.bfloat16
    return np.asarray(head, np.float32)


def test_stochastic_rounding_keeps_on_average_what_the_nearest_loses(batch):
    config = rounded(stochastic=True)
    before = np.asarray(initial(config).params["lm_head"]["kernel"], np.float32)
    large = np.abs(before) > 0.01
    step = make_train_step(config)
    after = head_after_a_step(step, config, batch)
    # Adam's first update is the learning rate times the gradient's sign: a weight moves by the
    # spacing, 2^-14 or more, with odds of 1e-6 over the spacing.
    moved = np.abs(after - before)[large]
    deviation = np.sqrt(1e-6 * 2.0**-13 / moved.size)
    assert moved.any()
    assert abs(moved.mean() - 1e-6) < 4 * deviation
    np.testing.assert_array_equal(head_after_a_step(step, config, batch), after)


def test_rounding_to_the_nearest_is_one_switch_away(batch):
    config = rounded(stochastic=False)
    before = np.asarray(initial(config).params["lm_head"]["kernel"], np.float32)
    after = head_after_a_step(make_train_step(config), config, batch)
    assert not (after - before)[np.abs(before) > 0.01].any()
