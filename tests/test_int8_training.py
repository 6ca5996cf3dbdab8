"""Trainings of models with weights in 8 bits, their checkpoints and folders of transformers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from galore_jax import to_arrays, to_int8
from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.ops.int8 import is_int8
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.loop import train
from galore_jax.training.mesh import check_training_mesh
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.run_folder import RunFolder
from galore_jax.training.state import matrix_state_bytes, place_state, tree_bytes, tree_size

ROOT = Path(__file__).parents[1]
MODEL = LlamaConfig(264, 32, 48, 2, 2, 2, 16, max_length=32, dtype="bfloat16", weights="int8")


def config_of(folder, *, name="galore_muon8bit", model=MODEL, **training):
    return Config(
        model,
        DataConfig(sequence_length=32, batch_size=4),
        OptimizerConfig(name, warmup_steps=0, galore=GaloreConfig(rank=4, basis_dtype="int4")),
        TrainingConfig(steps=4, evaluation_tokens=500, folder=str(folder), **training),
    )


def params_of(config):
    """Those of the latest checkpoint, as they are stored."""
    with Checkpoints(RunFolder(config.training.folder).checkpoints) as checkpoints:
        batches = SimpleNamespace(set_state=lambda position: None)
        return checkpoints.restore(Pretraining(config), batches).params


@pytest.mark.parametrize("layerwise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_training_repeats_an_uninterrupted_one_bit_for_bit(tmp_path, layerwise):
    config = config_of(tmp_path / "run", checkpoint_every=2, layerwise=layerwise)
    whole = train(Pretraining(config))
    params = params_of(config)
    assert any(map(is_int8, jax.tree.leaves(params, is_leaf=is_int8)))
    # As after a kill at the third step.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "summary.json").unlink()
    resumed = train(Pretraining(config), resume=True)
    assert resumed["validation_loss"] == whole["validation_loss"]
    jax.tree.map(np.testing.assert_array_equal, params_of(config), params)


@pytest.mark.slow
def test_the_configuration_for_12_gb_trains_exports_and_survives_a_kill(tmp_path):
    """At a small size: from random weights, and from a folder of the trained ones."""
    pytest.importorskip("safetensors", reason="the folder holds safetensors")

    def command(name, *arguments):
        settings = (
            "model.vocab_size=264 model.hidden_size=128 model.intermediate_size=344 "
            "model.num_layers=2 model.num_heads=2 model.max_length=64 optimizer.galore.rank=32 "
            "data.source=python data.tokenizer=bytes data.sequence_length=64 "
            "optimizer.warmup_steps=1 training.steps=3 training.evaluation_tokens=100 "
            "training.log_every=1 training.checkpoint_every=1 training.evaluate_every=0"
        )
        script, file = ROOT / "scripts" / "train.py", ROOT / "configs" / "llama_7b_12gb.toml"
        folder = f"training.folder={tmp_path / name}"
        return [sys.executable, script, "--config", file, *settings.split(), folder, *arguments]

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        read = [json.loads(line) for line in lines]
        return [line.get("loss", line.get("validation_loss")) for line in read]

    for start in ([], [f"model.checkpoint={tmp_path / 'folder'}"]):
        whole, killed = ("folder-whole", "folder-killed") if start else ("whole", "killed")
        subprocess.run(command(whole, *start), check=True)
        process = subprocess.Popen(command(killed, *start))
        while not (tmp_path / killed / "checkpoints" / "1").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        subprocess.run(command(killed, *start, "--resume"), check=True)
        assert losses(killed) == losses(whole)
        assert 'weights = "int8"' in (tmp_path / whole / "config.toml").read_text()
        if not start:
            export = ROOT / "scripts" / "export.py"
            subprocess.run(
                [sys.executable, export, tmp_path / whole, tmp_path / "folder"], check=True
            )
    # The folder holds what was trained, and its training goes on from there.
    assert losses("folder-whole")[0] < losses("whole")[0]


def test_a_trained_model_is_read_as_the_arrays_it_stands_for_and_goes_out_and_in_again(tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    from export import to_huggingface
    from generate import generate_text, load_model
    from model_folder import load

    config = config_of(tmp_path / "run", layerwise=True)
    train(Pretraining(config))
    stored = params_of(config)
    model, arrays = load_model(tmp_path / "run")
    assert model.model == MODEL.plain
    assert jax.tree.structure(arrays) == jax.tree.structure(to_arrays(stored))
    jax.tree.map(np.testing.assert_array_equal, arrays, to_arrays(stored))
    assert generate_text(tmp_path / "run", "import", 3, temperature=0).startswith("import")

    to_huggingface(tmp_path / "run", tmp_path / "theirs")
    found, params = load(tmp_path / "theirs")
    assert found == MODEL.plain
    again = config_of(tmp_path / "next", model=replace(MODEL, checkpoint=str(tmp_path / "theirs")))
    started = place_state(Pretraining(again), None).params
    jax.tree.map(np.testing.assert_array_equal, started, to_int8(params))


@pytest.mark.parametrize("name", ["adamw", "galore_adamw8bit"])
def test_other_optimizers_train_it_too(tmp_path, name):
    config = config_of(tmp_path / "run", name=name)
    result = train(Pretraining(config))
    assert result["validation_loss"] < np.log(MODEL.vocab_size)
    assert result["parameters"] == tree_size(params_of(config))
    plain = Pretraining(replace(config, model=MODEL.plain))
    assert matrix_state_bytes(Pretraining(config)) == matrix_state_bytes(plain)


def test_weights_take_a_byte_each_and_four_for_a_row(tmp_path):
    config = config_of(tmp_path, model=replace(MODEL, tie_embeddings=True))
    state = place_state(Pretraining(config), None)
    rows, numbers = 264 + 2 * (4 * 32 + 2 * 32 + 48), 264 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48)
    norms = 5 * 32
    assert tree_size(state.params) == numbers + norms
    assert tree_bytes(state.params) == numbers + 4 * rows + 2 * norms


def test_what_8_bits_exclude_is_said_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="excludes optimizer"):
        config_of(tmp_path, name="lora")
    mesh = SimpleNamespace(size=2)
    with pytest.raises(InputError, match="for one device"):
        check_training_mesh(Pretraining(config_of(tmp_path)), mesh)
