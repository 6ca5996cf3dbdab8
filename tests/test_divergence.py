"""Runs whose parameters become infinite or NaN, and what is kept of them."""

import itertools
import math
import os
import signal

import jax
import jax.numpy as jnp
import pytest
from analysis.comparison import compare, table

from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training import loop
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.run_folder import RunFolder
from galore_jax.training.state import TrainState, is_finite
from galore_jax.training.step import Stepper

STEPS, LAST_FINITE = 4, 2


def config_of(folder, **training):
    return Config(
        LlamaConfig(258, 16, 32, 1, 2, max_length=32),
        DataConfig(sequence_length=32, batch_size=2),
        OptimizerConfig(name="adamw", warmup_steps=0),
        TrainingConfig(
            folder=str(folder), steps=STEPS, evaluate_every=0, evaluation_tokens=200, **training
        ),
    )


@pytest.fixture
def diverging(monkeypatch):
    """After the steps in this list all parameters are NaN, and a signal comes after others."""
    after, stops = range(LAST_FINITE, STEPS), []

    class Diverging(Stepper):
        def __call__(self, state, batch):
            state, measured = super().__call__(state, batch)
            if int(state.step) in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            if int(state.step) - 1 in after:
                spoilt = jax.tree.map(lambda leaf: leaf * math.nan, state.params)
                state = state._replace(params=spoilt)
            return state, measured

    monkeypatch.setattr(loop, "Stepper", Diverging)
    return stops


def checkpoints_of(folder):
    return sorted(path.name for path in RunFolder(folder).checkpoints.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_state_is_finite_if_its_parameters_and_its_optimizer_are(number, dtype):
    number = jnp.float32(number).astype(dtype)
    ones, count = jnp.ones([2, 3], dtype), jnp.int32(5)
    bad = ones.at[1, 1].set(number)
    for params, moments in itertools.product((ones, bad), (ones, bad)):
        state = TrainState({"w": params}, (moments, jnp.zeros(4, jnp.int8), count), count, count)
        assert is_finite(state) == (params is ones and moments is ones)


def test_a_run_that_diverges_ends_keeps_its_checkpoints_and_is_not_finished(diverging, tmp_path):
    config = config_of(tmp_path, checkpoint_every=1)
    with pytest.raises(loop.Diverged) as ended:
        loop.train(Pretraining(config))
    sentence = (
        f"the parameters or the optimizer's state of {tmp_path} after 3 of 4 steps are not finite, "
        "so the run ends (the latest checkpoint is of 2): lower optimizer.learning_rate, or set "
        "optimizer.clip_norm, and name another training.folder."
    )
    assert str(ended.value) == sentence
    assert checkpoints_of(tmp_path) == [str(LAST_FINITE - 1), str(LAST_FINITE)]
    run = RunFolder(tmp_path)
    assert not run.summary.exists()
    assert run.diverged.read_text() == f"{sentence}\n"
    assert len(run.metrics.read_text().splitlines()) == LAST_FINITE + 1
    with pytest.raises(InputError, match=r"nothing can be resumed: the parameters or the "):
        loop.train(Pretraining(config), resume=True)


def test_an_evaluation_that_is_not_finite_ends_a_run_too(diverging, tmp_path):
    config = config_of(tmp_path, checkpoint_every=0)
    with pytest.raises(loop.Diverged, match=r"the evaluation \(validation_loss\) .* no checkpoint"):
        loop.train(Pretraining(config))
    assert not RunFolder(tmp_path).summary.exists()


def test_a_signal_after_it_diverged_does_not_hide_that(diverging, tmp_path):
    diverging.append(3)
    with pytest.raises(loop.Diverged, match="after 3 of 4 steps are not finite"):
        loop.train(Pretraining(config_of(tmp_path, checkpoint_every=2)))


@pytest.mark.slow
def test_a_comparison_of_runs_that_diverge_has_its_table(diverging, tmp_path, monkeypatch):
    configs = {"one": config_of(tmp_path), "other": config_of(tmp_path)}
    rows = compare(configs, (0, 1), (0.01, 0.1))
    assert (tmp_path / "comparison.md").read_text() == table(rows)
    assert table(rows).count("| diverged |") == 2
    assert (tmp_path / "comparison.png").exists()
    monkeypatch.delattr("analysis.comparison.train")  # They are not trained again.
    assert compare(configs, (0, 1), (0.01, 0.1)) == rows
