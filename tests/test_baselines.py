"""Training with LoRA, ReLoRA and low-rank factors: what a step changes, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis.products import flops
from next_tokens import random_rows
from test_adapters import ROUNDING, noisy
from test_step import CONFIG, initial

import galore_jax
from galore_jax.data.batches import train_batches
from galore_jax.data.tokenizers import ByteTokenizer
from galore_jax.errors import InputError
from galore_jax.models.adapters import FACTORS
from galore_jax.models.llama import Llama
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import CheckpointConfig, FinetuneConfig, OptimizerConfig
from galore_jax.training.config_file import changed
from galore_jax.training.optimizer import learning_rate_schedule, make_optimizer
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.relora import restart, steps_until_restart
from galore_jax.training.state import (
    abstract_state,
    batch_shapes,
    trained,
)
from galore_jax.training.step import Stepper, make_gradients, make_train_step, with_seeds

RANK = 4
NAMES = ("lora", "relora", "lowrank")
# (in, out) of the kernels of a block.
KERNELS = [(32, 32)] * 4 + [(32, 48)] * 2 + [(48, 32)]


def configured(name, **sections):
    optimizer = sections.pop("optimizer", {})
    optimizer = {"name": name, **optimizer, "lora": {"rank": RANK, **optimizer.get("lora", {})}}
    return changed(CONFIG, optimizer=optimizer, **sections)


def adapters_only():
    """As a training that starts from a checkpoint, which is not read here."""
    return configured("lora", model={"checkpoint": "folder"})


@pytest.fixture
def batch():
    return random_rows()


@functools.cache
def compiled_step(config, refreshes=False):
    return make_train_step(Pretraining(config), refreshes=refreshes)


def by_name(tree):
    return {names: np.asarray(leaf) for names, leaf in named_leaves(tree)}


def factors_of(tree):
    return {names: leaf for names, leaf in by_name(tree).items() if names[-1] in FACTORS}


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (configured("lora"), lambda names: names[-1] == "kernel" and names[0] == "layers"),
        (configured("lowrank"), lambda names: False),
        (adapters_only(), lambda names: names[-1] not in FACTORS),
    ],
    ids=["lora", "lowrank", "lora of a checkpoint"],
)
def test_frozen_leaves_stay_bit_for_bit_and_have_no_state(config, frozen, batch):
    state = initial(config)
    before, moments = by_name(state.params), by_name(state.opt_state)
    for _ in range(3):
        state, metrics = compiled_step(config)(state, batch)
    assert metrics["loss"] < 4.6
    for names, after in by_name(state.params).items():
        assert np.array_equal(after, before[names]) == frozen(names), names
        has_moments = [key for key in moments if key[-len(names) :] == names]
        assert len(has_moments) == (0 if frozen(names) else 2), names
    kept = sum(before[names].size for names in before if not frozen(names))
    assert sum(leaf.size for leaf in moments.values() if leaf.size > 1) == 2 * kept


def test_all_optimizers_start_from_the_same_parameters():
    plain = by_name(initial(configured("adamw")).params)
    for name in NAMES:
        params = by_name(initial(configured(name)).params)
        shared = params.keys() & plain.keys()
        assert len(plain) - len(shared) == (7 if name == "lowrank" else 0)
        assert all(np.array_equal(params[names], plain[names]) for names in shared)


def test_a_step_does_not_compute_the_gradients_of_frozen_kernels():
    def count(name):
        config = configured(name)
        step = make_train_step(Pretraining(config)).lower(
            abstract_state(Pretraining(config)), batch_shapes(Pretraining(config))
        )
        return flops(step.compile().as_text(), lambda within: CONFIG.model.num_layers)

    adamw, tokens = count("adamw"), 8 * 16
    # Two factors have three products each: forward, by their input and by themselves.
    factors = sum(6 * tokens * RANK * (rows + columns) for rows, columns in KERNELS)
    kernels = sum(2 * tokens * rows * columns for rows, columns in KERNELS)
    assert adamw - count("lora") == CONFIG.model.num_layers * (kernels - factors)
    assert adamw - count("lowrank") == CONFIG.model.num_layers * (3 * kernels - factors)


@pytest.mark.slow
def test_micro_batches_have_the_gradients_of_the_batch_and_dropout_of_their_own(batch):
    def gradients(dropout, accumulation):
        config = configured(
            "lora",
            optimizer={"lora": {"dropout": dropout}},
            training={"accumulation": accumulation},
        )

        @jax.jit
        def compute(params):
            seeded = with_seeds(Pretraining(config), jax.random.key(3), batch)
            return make_gradients(Pretraining(config))(params, None, seeded)[0]

        return by_name(compute(noisy(initial(config).params)))

    whole, parts = gradients(0.0, 1), gradients(0.0, 4)
    assert whole.keys() == parts.keys()
    for names in whole:
        # A gradient sums 128 tokens' products, in four parts or at once.
        scale = np.abs(whole[names]).max()
        np.testing.assert_allclose(parts[names], whole[names], atol=128 * 2.0**-24 * 8 * scale)
    one, other = gradients(0.5, 1), gradients(0.5, 4)
    assert all(np.abs(one[names] - other[names]).max() > 0 for names in factors_of(one))


def test_the_matrix_rate_is_a_factor_for_the_factors_alone():
    config = configured("lora", optimizer={"lora": {"rank": 1}, "warmup_steps": 0})
    params, _ = trained(Pretraining(config), initial(config).params)

    def updates(**settings):
        optimizer = configured("lora", optimizer={"warmup_steps": 0, **settings}).optimizer
        tx = make_optimizer(optimizer, 10)
        ones = jax.tree.map(jnp.ones_like, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return by_name(galore_jax.apply_gradients(tx, ones, galore_jax.init(tx, zeros), zeros)[0])

    plain, slow = updates(), updates(matrix_rate=0.25)
    for names, update in plain.items():
        factor = 0.25 if names[-1] in FACTORS else 1
        np.testing.assert_array_equal(slow[names], factor * update)


def test_a_restart_of_relora_leaves_the_model_and_renews_the_adapters(batch):
    config = configured("relora")
    state = initial(config)
    for _ in range(3):
        state, _ = compiled_step(config)(state, batch)
    restarted = jax.jit(functools.partial(restart, Pretraining(config)))(state)

    model = Llama(config.model, config.optimizer.adapter)
    logits = jax.jit(lambda params: model.apply({"params": params}, batch["tokens"]))
    expected = logits(state.params)
    # Seven products in each of two blocks.
    bound = 14 * ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(logits(restarted.params), expected, atol=bound)

    before, after = by_name(state.params), by_name(restarted.params)
    first = by_name(initial(config).params)
    for names, leaf in after.items():
        if names[-1] == "lora_b":
            assert not leaf.any()
            assert before[names].any()
        elif names[-1] == "lora_a":
            assert (leaf != before[names]).all()
            assert (leaf != first[names]).all()
            assert np.abs(leaf).max() <= leaf.shape[-2] ** -0.5
        else:
            is_merged = names[0] == "layers" and names[-1] == "kernel"
            assert np.array_equal(leaf, before[names]) != is_merged
    # The same from the seed and the step; another for another step.
    again = jax.jit(functools.partial(restart, Pretraining(config)))(state)
    jax.tree.map(np.testing.assert_array_equal, again, restarted)
    later = restart(Pretraining(config), state._replace(step=state.step + 1))
    assert all(
        (leaf != after[names]).all()
        for names, leaf in factors_of(later.params).items()
        if names[-1] == "lora_a"
    )
    # The moments of the factors are pruned, in each layer by itself, and the others are not.
    pruned = by_name(restarted.opt_state)
    for names, leaf in by_name(state.opt_state).items():
        if names[-1] not in FACTORS:
            np.testing.assert_array_equal(pruned[names], leaf)
            continue
        for old, new in zip(leaf, pruned[names], strict=True):
            kept = new != 0
            assert 0 < kept.sum() <= np.ceil(0.01 * new.size)
            np.testing.assert_array_equal(new[kept], old[kept])
            assert np.abs(old[kept]).min() >= np.abs(old[~kept]).max()


def test_restarts_are_due_at_multiples_of_the_gap_but_not_at_the_start(batch):
    config = configured("relora", optimizer={"lora": {"restart_gap": 3}})
    assert [steps_until_restart(3, step) for step in range(7)] == [3, 2, 1, 0, 2, 1, 0]
    stepper, state, other = Stepper(Pretraining(config)), initial(config), initial(config)
    for t in range(5):
        state, measured = stepper(state, batch)
        other, expected = compiled_step(config, refreshes=t == 3)(other, batch)
        jax.tree.map(np.testing.assert_array_equal, (state, measured), (other, expected))


def test_the_rate_of_relora_warms_up_again_after_each_restart():
    lora = {"restart_gap": 40}
    settings = {"learning_rate": 1.0, "warmup_steps": 42, "floor": 0.1, "lora": lora}
    adamw, relora = (
        np.asarray(learning_rate_schedule(OptimizerConfig(name, **settings), 200)(np.arange(200)))
        for name in ("adamw", "relora")
    )
    # The restart at 40 is in the first warm-up, which ends earlier than its own four steps would;
    # those at 80, 120 and 160 have theirs.
    ratio = np.ones(200)
    for start in (80, 120, 160):
        ratio[start : start + 4] = [0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(relora / adamw, ratio, rtol=1e-6)


@pytest.mark.slow
def test_a_restored_training_repeats_dropout_and_restarts_bit_for_bit(tmp_path):
    config = configured(
        "relora",
        model={"vocab_size": 264},
        optimizer={"lora": {"restart_gap": 2}},
        training={"folder": str(tmp_path)},
    )
    batches = train_batches(config.data, ByteTokenizer())
    stepper, state = Stepper(Pretraining(config)), initial(config)
    for _ in range(3):
        state, _ = stepper(state, next(batches))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, batches, config)
        checkpoints.wait()
        for _ in range(3):
            state, expected = stepper(state, next(batches))
        again = train_batches(config.data, ByteTokenizer())
        restored, stepper = (
            checkpoints.restore(Pretraining(config), again),
            Stepper(Pretraining(config)),
        )
        for _ in range(3):
            restored, measured = stepper(restored, next(again))
    jax.tree.map(np.testing.assert_array_equal, (restored, measured), (state, expected))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"training": {"layerwise": True}}, 'layerwise excludes optimizer.name = "lora"'),
        (
            {"optimizer": {"lora": {"dropout": 1.0}}},
            "lora.dropout must be less than 1, not 1",
        ),
        (
            {"optimizer": {"name": "lowrank"}, "model": {"checkpoint": "folder"}},
            "leave out the checkpoint",
        ),
    ],
)
def test_what_they_cannot_do_is_refused_in_a_sentence(sections, sentence):
    with pytest.raises(InputError, match=sentence):
        configured("lora", **sections)


@pytest.mark.parametrize("name", ["relora", "lowrank"])
def test_fine_tuning_refuses_what_is_for_pre_training(name):
    with pytest.raises(InputError, match=f'"{name}" is for pre-training: choose "lora"'):
        FinetuneConfig(CheckpointConfig("folder"), optimizer=OptimizerConfig(name))
