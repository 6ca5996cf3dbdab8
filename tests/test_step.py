import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from next_tokens import next_tokens

import galore_jax
from galore_jax.data.batches import DataConfig
from galore_jax.models.llama import LlamaConfig
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.config_file import changed
from galore_jax.training.optimizer import learning_rate_schedule, make_optimizer
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state, tree_bytes
from galore_jax.training.step import make_gradients, make_train_step, subspace_metrics

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
    OptimizerConfig(
        galore=GaloreConfig(rank=8, update_proj_gap=3), warmup_steps=2, gradients="full"
    ),
    TrainingConfig(steps=10),
)


@functools.cache
def compiled_init(config):
    return jax.jit(lambda: init_state(Pretraining(config)))


def initial(config):
    """A state that may be donated; each configuration is compiled once for all tests."""
    return compiled_init(config)()


@functools.cache
def gradients(accumulation):
    """A compiled function of parameters and batch, shared by all tests."""
    config = changed(CONFIG, training={"accumulation": accumulation})
    return jax.jit(lambda params, batch: make_gradients(Pretraining(config))(params, None, batch))


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
    tokens = random.integers(0, 97, (8, 16)).astype(np.int32)
    return {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "targets": next_tokens(tokens, segments),
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
    full_batch, measured = gradients(1)(params, batch)
    parts, measured_in_parts = gradients(4)(params, batch)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(full_batch))
    for one, other in zip(jax.tree.leaves(full_batch), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)
    np.testing.assert_allclose(measured_in_parts["loss"], measured["loss"], rtol=1e-5)
    assert measured["targets"] == measured_in_parts["targets"] == 4 * 2 + 3 * 15 + 14


def test_a_batch_without_targets_gives_zero_gradients(batch, params):
    batch["targets"] = np.full_like(batch["tokens"], -1)
    actual, measured = gradients(1)(params, batch)
    assert measured["targets"] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("adamw", 0.01),
        ("galore_lion", 0.003),
    ],
)
def test_steps_learn_count_and_donate_the_state(batch, name, rate):
    config = changed(CONFIG, optimizer={"name": name, "clip_norm": 1.0, "learning_rate": rate})
    step, state = make_train_step(Pretraining(config)), initial(config)
    losses = []
    for t in range(6):
        before, (state, measured) = state, step(state, batch)
        losses.append(float(measured["loss"]))
        assert int(state.step) == t + 1
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(losses[0], np.log(97), atol=0.2)
    assert step._cache_size() == 1


def bases(opt_state):
    return bases_of(galore_states(opt_state.inner_states))


def test_every_setting_of_galore_reaches_it(batch):
    settings = {
        "rank": 0.25,
        "update_proj_gap": 14,
        "proj_type": "full",
        "moments": "rotate",
    }
    config = changed(CONFIG, optimizer={"galore": settings})
    actual = bases(initial(config).opt_state)
    assert all(basis.projection.rank == 8 for basis in actual)
    assert all(basis.projection.sides == ("left", "right") for basis in actual)
    assert all(basis.moments == "rotate" for basis in actual)
    assert all(basis.interval == 14 for basis in actual)


def test_adafactor_without_b1_and_lion_keep_less_than_adamw():
    def size(**settings):
        config = changed(CONFIG, optimizer=settings)
        return tree_bytes(jax.eval_shape(lambda: init_state(Pretraining(config))).opt_state)

    adamw = size(name="galore_adamw")
    averaged = size(name="galore_adafactor")
    assert size(name="galore_adafactor", b1=0.0) < averaged < adamw
    assert size(name="galore_lion") < adamw


def with_first_up_proj(tree, factor):
    """The tree with the first layer's up_proj times a factor."""

    def at_leaf(path, leaf):
        scaled = "up_proj" in jax.tree_util.keystr(path)
        return leaf.at[0].multiply(factor) if scaled else leaf

    return jax.tree_util.tree_map_with_path(at_leaf, tree)


def test_a_gradient_that_is_not_finite_skips_only_the_update_of_its_matrix(params):
    tx = make_optimizer(changed(CONFIG, optimizer={"clip_norm": 1.0}).optimizer, steps=10)
    gradients = with_first_up_proj(jax.tree.map(jnp.ones_like, params), jnp.nan)

    @jax.jit
    def step(params):
        return galore_jax.apply_gradients(tx, gradients, galore_jax.init(tx, params), params)

    after, opt_state = step(params)
    moved = jax.tree.map(lambda old, new: jnp.max(jnp.abs(new - old)), params, after)
    assert all(0 < distance < 0.1 for distance in jax.tree.leaves(moved))
    old, new = (tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (params, after))
    np.testing.assert_array_equal(new[0], old[0])
    assert subspace_metrics(opt_state)["skipped"] == 1


def test_refreshes_saved_are_counted_over_all_matrices(batch):
    settings = {"update_proj_gap": 2, "lazy_overlap": 1e-6}
    config = changed(CONFIG, optimizer={"galore": settings})
    step, state = make_train_step(Pretraining(config)), initial(config)
    saved = []
    for _ in range(8):
        state, measured = step(state, batch)
        saved.append(int(measured["refreshes_saved"]))
        assert measured["skipped"] == 0
        assert 0 < measured["subspace_overlap"] <= 1 + 1e-6
    # Refreshes at steps 0, 2 and 6; gaps of 2, 4 and 8 leave out those at 4 and 8.
    assert saved == [14 * count for count in (0, 0, 0, 1, 1, 1, 1, 2)]


def test_plain_adamw_has_no_subspaces_to_measure(batch):
    config = changed(CONFIG, optimizer={"name": "adamw"})
    _, measured = make_train_step(Pretraining(config))(initial(config), batch)
    assert set(measured) == {"loss", "targets", "learning_rate", "gradient_norm"}


def head_after_a_step(step, config, batch):
    state, _ = step(initial(config), batch)
    head = state.params["lm_head"]["kernel"]
    assert head.dtype == jnp.bfloat16
    return np.asarray(head, np.float32)


def test_stochastic_rounding_keeps_on_average_what_rounding_to_nearest_loses(batch):
    # Updates of 1e-6 are far below bfloat16's spacing at 0.02, 1.2e-4.
    config = changed(
        CONFIG,
        model={"dtype": "bfloat16"},
        optimizer={"name": "adamw", "learning_rate": 1e-6, "warmup_steps": 0},
    )
    before = np.asarray(initial(config).params["lm_head"]["kernel"], np.float32)
    large = np.abs(before) > 0.01
    step = make_train_step(Pretraining(config))
    after = head_after_a_step(step, config, batch)
    # Adam's first update is the learning rate times the gradient's sign: a weight moves by the
    # spacing, 2^-14 or more, with odds of 1e-6 over the spacing.
    moved = np.abs(after - before)[large]
    deviation = np.sqrt(1e-6 * 2.0**-13 / moved.size)
    assert moved.any()
    assert abs(moved.mean() - 1e-6) < 4 * deviation
    np.testing.assert_array_equal(head_after_a_step(step, config, batch), after)
