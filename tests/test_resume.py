"""Runs whose folder is not as the training left it: incomplete, or of another text."""

import os
import signal

import pytest

from galore_jax.data.batches import DataConfig, fingerprint, tokenizer_checksum
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training import loop
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.loop import train
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.run_folder import (
    RunFolder,
    check_same_text,
    check_same_tokenizer,
    check_start,
    open_folder,
)


def config_of(folder, **training):
    return Config(
        LlamaConfig(258, 16, 32, 1, 2, max_length=32),
        DataConfig(sequence_length=32, batch_size=2),
        OptimizerConfig(galore=GaloreConfig(rank=4), warmup_steps=0),
        TrainingConfig(folder=str(folder), evaluation_tokens=200, **training),
    )


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_metrics_is_resumed_from_the_start(tmp_path):
    config = config_of(tmp_path / "early", steps=1)
    with open_folder(config, resume=False):
        pass  # Killed here.
    check_start(config, resume=True)
    assert train(Pretraining(config), resume=True)["steps"] == 1


@pytest.mark.slow
def test_an_evaluation_that_was_lost_at_the_end_is_made_again(tmp_path, monkeypatch):
    config = config_of(tmp_path / "lost", steps=2, evaluate_every=1)
    complete = train(Pretraining(config))
    run = RunFolder(tmp_path / "lost")
    run.summary.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_evaluate", None)  # It is in the file.
        again = train(Pretraining(config), resume=True)
    assert again["validation_loss"] == complete["validation_loss"]
    run.summary.unlink()
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join(lines[:-1]) + "\n")
    assert "validation_loss" in lines[-1]
    again = train(Pretraining(config), resume=True)
    assert again["validation_loss"] == complete["validation_loss"]
    run.summary.unlink()
    run.metrics.write_text("")
    with pytest.raises(InputError, match=r"no steps in metrics\.jsonl"):
        train(Pretraining(config), resume=True)


@pytest.mark.parametrize(
    ("place", "name"), [(loop.Stepper, "__call__"), (loop, "_evaluate"), (loop, "_finish")]
)
def test_a_signal_after_the_last_step_began_ends_the_command_and_not_the_run(
    tmp_path, monkeypatch, place, name
):
    usual = getattr(place, name)

    def with_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return usual(*arguments)

    monkeypatch.setattr(place, name, with_signal)
    with pytest.raises(loop.Interrupted, match=r"the run in .*late was finished") as stopped:
        train(Pretraining(config_of(tmp_path / "late", steps=1)))
    assert stopped.value.status == 143
    assert RunFolder(tmp_path / "late").summary.exists()


def test_a_run_is_not_resumed_with_another_tokenizer(tmp_path):
    files = {name: tmp_path / name for name in ("tokenizer.json", "chat_template.jinja")}
    data = DataConfig(tokenizer=str(files["tokenizer.json"]))
    found = []
    for name in ("tokenizer.json", "tokenizer.json", "chat_template.jinja"):
        files[name].write_text(f"{len(found)}")
        found.append(fingerprint(data)["tokenizer"])
    assert len({*found, fingerprint(DataConfig())["tokenizer"]}) == 4


@pytest.mark.parametrize("file", ["train.jsonl", "validation.jsonl"])
def test_a_run_is_not_resumed_with_other_conversations(tmp_path, file):
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("first\n")
    run, data = RunFolder(tmp_path), DataConfig(rows="conversations", source=str(tmp_path))
    check_same_text(run, fingerprint(data), resume=False)
    check_same_text(run, fingerprint(data), resume=True)
    (tmp_path / file).write_text("other\n")
    with pytest.raises(InputError, match=r"the text of data\.source"):
        check_same_text(run, fingerprint(data), resume=True)


def test_a_run_is_not_read_with_another_tokenizer(tmp_path):
    run, file = RunFolder(tmp_path), tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="work in the folder in which the run was started"):
        check_same_tokenizer(run, str(file))
    file.write_text("1")
    check_same_tokenizer(run, str(file))  # A run that was not trained has no fingerprint.
    run.text.write_text(f'{{"tokenizer": {tokenizer_checksum(str(file))}}}')
    check_same_tokenizer(run, str(file))
    file.write_text("2")
    with pytest.raises(InputError, match=r"not the tokenizer .* was trained with: restore it"):
        check_same_tokenizer(run, str(file))


def test_a_run_is_not_resumed_on_another_text(tmp_path, monkeypatch):
    config = config_of(tmp_path / "text", steps=1)
    with open_folder(config, resume=False) as run:
        check_same_text(run, fingerprint(config.data), resume=False)
    changed = lambda split: 9 * [20_000 * "another text "]
    monkeypatch.setattr("galore_jax.data.batches.standard_library_texts", changed)
    with pytest.raises(
        InputError, match=r"text of data\.source, or .* not the one .*: restore it,"
    ):
        train(Pretraining(config), resume=True)
    assert (
        train(Pretraining(config), resume=False)["steps"] == 1
    )  # Nothing was trained on the other text.
