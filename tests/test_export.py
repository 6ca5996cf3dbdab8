"""Trainings and texts that start from a folder of transformers, and the way back."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the files are safetensors")

from export import to_huggingface
from generate import generate_text, load_model
from model_folder import load, random_params, save

from galore_jax.data.batches import DataConfig, train_batches
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import Config, LoraConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.config_file import load_config, to_toml
from galore_jax.training.loop import train
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state, place_state

SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
MODEL = LlamaConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=6,
    qk_norm=True,
    tie_embeddings=True,
    max_length=32,
    dtype="bfloat16",
)
CONFIG = Config(MODEL, DataConfig(sequence_length=32), OptimizerConfig("adamw"))
TOKENIZER = {
    "model": {
        "type": "WordLevel",
        "vocab": {"</s>": 0, "a": 1, "b": 2, "<unk>": 3},
        "unk_token": "<unk>",
    },
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [],
}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf / 10, random_params(MODEL))


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    save(folder, MODEL, params, shard_bytes=3000)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    return folder


def save_run(run, config, folder=None, params=None):
    """A run with the tokenizer, and the parameters if none are given, of a folder."""
    if folder is not None:
        model = dataclasses.replace(config.model, checkpoint=str(folder))
        data = dataclasses.replace(config.data, tokenizer=str(folder / "tokenizer.json"))
        config = dataclasses.replace(config, model=model, data=data)
    state = place_state(Pretraining(config), None)
    if params is not None:
        state = state._replace(params=params)
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(state, train_batches(config.data, load_tokenizer("bytes")), config)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    save_run(run, CONFIG, folder)
    return run


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_way_back_gives_the_same_model(run, folder, params, tmp_path):
    to_huggingface(run, tmp_path / "back")
    model, again = load(tmp_path / "back")
    assert model == MODEL
    assert_equal_trees(again, params)
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == TOKENIZER
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"eos_token": "b"}'
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    # The end of a text is not exported as padding.
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (2, None)


@pytest.mark.parametrize("name", ["lora", "lowrank"])
def test_adapters_are_merged_into_the_kernels(name, tmp_path):
    optimizer = OptimizerConfig(name, lora=LoraConfig(rank=0.25, alpha=8.0))
    model = dataclasses.replace(MODEL, dtype="float32")
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
    draw = lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)
    params = jax.tree.map(draw, place_state(Pretraining(config), None).params)
    save_run(tmp_path / "run", config, params=params)
    to_huggingface(tmp_path / "run", tmp_path / "merged")
    exported, again = load(tmp_path / "merged")
    assert exported == model
    _, expected = load_model(tmp_path / "run")
    # A layer is merged by itself or in the stack, in products of rank 4.
    for one, other in zip(*map(jax.tree.leaves, (again, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=4 * 2.0**-24 * np.abs(other).max())


def test_text_begins_as_the_texts_of_the_training_did(folder, run, params, tmp_path, monkeypatch):
    with_start = tmp_path / "with-start"
    shutil.copytree(folder, with_start)
    processor = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
    }
    text = json.dumps(TOKENIZER | {"post_processor": processor})
    (with_start / "tokenizer.json").write_text(text)
    save_run(tmp_path / "run", CONFIG, with_start)
    prompts = []

    def generate(model, loaded, start, *others):
        assert_equal_trees(jax.tree.map(np.asarray, loaded), params)
        prompts.append(start.tolist())
        return np.array([[2]])

    with monkeypatch.context() as patched:
        patched.setattr("galore_jax.models.generation.generate", generate)
        generate_text(with_start, "a b", 1)
        generate_text(tmp_path / "run", "a b", 1)  # A training puts nothing before a document.
    assert prompts == [[[0, 1, 2]], [[1, 2]]]
    assert generate_text(run, "a b", 3) == generate_text(folder, "a b", 3)
    (with_start / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"with-start has no tokenizer\.json or tokenizer\.model"):
        generate_text(with_start, "a b", 1)


def test_a_training_starts_from_the_folder_and_its_model_goes_back(folder, params, tmp_path):
    config = Config(
        dataclasses.replace(MODEL, checkpoint=str(folder)),
        DataConfig(sequence_length=32, batch_size=4),
        OptimizerConfig("adamw", warmup_steps=0),
        TrainingConfig(steps=2, evaluation_tokens=100, folder=str(tmp_path / "run")),
    )
    state = place_state(Pretraining(config), None)
    assert_equal_trees(state.params, params)
    random = jax.jit(lambda: init_state(Pretraining(config)))()
    assert_equal_trees(state._replace(params=None), random._replace(params=None))

    train(Pretraining(config))
    _, trained = load_model(tmp_path / "run")
    to_huggingface(tmp_path / "run", tmp_path / "back")
    model, again = load(tmp_path / "back")
    assert model == MODEL
    assert_equal_trees(again, jax.tree.map(np.asarray, trained))
    moved = jax.tree.map(lambda old, new: (old != new).any(), params, trained)
    assert all(jax.tree.leaves(moved))


def test_the_command_line_takes_the_model_and_the_tokenizer_from_the_folder(folder, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        '[model]\nhidden_size = 64\nnum_heads = 8\nremat = true\nweights = "int8"\n'
        '[data]\ntokenizer = "t5.model"\nsequence_length = 16\n'
    )
    config = load_config(file, ["model.dtype=float32", f"model.checkpoint={folder}"])
    assert config.model == dataclasses.replace(
        MODEL, dtype="float32", remat=True, weights="int8", checkpoint=str(folder)
    )
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    # The file of a run needs the folder no more.
    gone = dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint="gone"))
    (tmp_path / "run.toml").write_text(to_toml(gone))
    assert load_config(tmp_path / "run.toml") == gone
    other = load_config(file, [f"model.checkpoint={folder}", "data.tokenizer=bytes"])
    assert other.data.tokenizer == "bytes"
    with pytest.raises(InputError, match=r"there is no .*nowhere/config\.json"):
        load_config(file, [f"model.checkpoint={tmp_path}/nowhere"])


def test_a_folder_without_a_tokenizer_needs_one_by_name(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    file = tmp_path / "own.toml"
    file.write_text('[data]\ntokenizer = "t5.model"\nsequence_length = 16\n')
    with pytest.raises(InputError, match=r"bare has no tokenizer.json or tokenizer.model: give"):
        load_config(file, [f"model.checkpoint={bare}"])
    own = load_config(file, [f"model.checkpoint={bare}", "data.tokenizer=own.json"])
    assert own.data.tokenizer == "own.json"


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    folder, params, tmp_path, value, monkeypatch
):
    damaged = jax.tree.map(np.array, params)
    damaged["layers"]["mlp"]["up_proj"]["kernel"][1, 2, 3] = value
    refusal = r"model\.layers\.1\.mlp\.up_proj\.weight in {} has numbers that are not finite"
    monkeypatch.setattr("galore_jax.training.checkpoint.is_finite", lambda _: True)
    save_run(tmp_path / "run", CONFIG, folder, damaged)
    with pytest.raises(InputError, match=refusal.format("the checkpoint to write")):
        to_huggingface(tmp_path / "run", tmp_path / "back")
    monkeypatch.setattr("galore_jax.interop.decoders.check_finite", lambda *_: None)
    save(tmp_path / "theirs", MODEL, damaged)
    monkeypatch.undo()
    shutil.copy(folder / "tokenizer.json", tmp_path / "theirs")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "theirs")
    with pytest.raises(InputError, match=refusal.format(".*theirs")):
        generate_text(tmp_path / "theirs", "a b", 1)


@pytest.mark.slow
def test_a_script_exports_once_and_another_generates_with_the_folder(folder, run, tmp_path):
    command = [sys.executable, str(SCRIPT), str(run), str(tmp_path / "back")]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert_equal_trees(load(tmp_path / "back")[1], load(folder)[1])
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    generate = [sys.executable, str(SCRIPT.with_name("generate.py")), str(tmp_path / "back")]
    command = [*generate, "--prompt", "a b", "--tokens", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == generate_text(run, "a b", 3) + "\n"


def test_an_export_that_fails_leaves_no_half_of_itself(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise InputError("the tokenizer cannot be converted")

    monkeypatch.setattr("galore_jax.interop.tokenizer_files.complete_tokenizer", fail)
    with pytest.raises(InputError, match="cannot be converted"):
        to_huggingface(run, tmp_path)
    assert not list(tmp_path.iterdir())
