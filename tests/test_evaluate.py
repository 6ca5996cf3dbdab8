import dataclasses
import functools

import jax
import numpy as np
import pytest
from next_tokens import next_tokens

from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.pretraining import Pretraining, batch_loss, make_evaluate, perplexity
from galore_jax.training.state import init_state

CONFIG = Config(
    LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        max_length=8,
    ),
    DataConfig(sequence_length=8, batch_size=4),
    OptimizerConfig(name="adamw", warmup_steps=0),
    TrainingConfig(steps=1),
)


def make_batches(number, seed=0):
    """Batches with fewer and fewer targets."""
    random = np.random.default_rng(seed)
    batches = []
    for i in range(number):
        segments = np.ones((4, 8), np.int32)
        segments[:, max(2, 8 - 2 * i) :] = 0
        tokens = random.integers(0, 31, (4, 8)).astype(np.int32)
        batches.append(
            {
                "tokens": tokens,
                "segments": segments,
                "targets": np.asarray(next_tokens(tokens, segments)),
                "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
            }
        )
    return batches


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_state(Pretraining(CONFIG)).params)()


@pytest.fixture(scope="module")
def sums(params):
    loss = jax.jit(functools.partial(batch_loss, CONFIG.model, params))
    results = [loss(batch) for batch in make_batches(3)]
    return np.array(results, np.float64)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_weighted_by_tokens(params, sums, accumulation):
    training = dataclasses.replace(CONFIG.training, accumulation=accumulation)
    config = dataclasses.replace(CONFIG, training=training)
    evaluation = make_evaluate(Pretraining(config))(params, make_batches(3))
    losses, targets = sums.sum(0)
    assert evaluation["validation_targets"] == targets == 4 * (7 + 5 + 3)
    np.testing.assert_allclose(evaluation["validation_loss"], losses / targets, rtol=1e-6)


def test_evaluation_tokens_stop_after_the_batch_that_completes_them(params):
    training = dataclasses.replace(CONFIG.training, evaluation_tokens=29)
    config = dataclasses.replace(CONFIG, training=training)
    assert make_evaluate(Pretraining(config))(params, make_batches(3))[
        "validation_targets"
    ] == 4 * (7 + 5)


def test_a_split_without_targets_is_refused(params):
    batch = make_batches(1)[0]
    batch["targets"] = np.full_like(batch["targets"], -1)
    with pytest.raises(InputError, match="nothing to evaluate on"):
        make_evaluate(Pretraining(CONFIG))(params, [batch])


def test_a_perplexity_that_overflows_is_infinite():
    assert perplexity(1e4) == np.inf
    assert np.isnan(perplexity(float("nan")))
    assert perplexity(0.0) == 1
