"""Runs made from folders of transformers, trainings that start from one, and the way back."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the files are safetensors")

from model_folder import load, random_params, save

from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.interop.tokenizer_files import copy_tokenizer
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.checkpoint import load_for_inference, save_parameters
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.config_file import load_config, to_toml
from galore_jax.training.convert import from_huggingface, to_huggingface
from galore_jax.training.loop import train
from galore_jax.training.sample import generate_text
from galore_jax.training.state import init_state, place_state

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert.py"
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


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    from_huggingface(folder, run)
    return run


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_run_has_the_model_and_the_tokenizer_and_writes_text(run, folder, params):
    config, restored, step = load_for_inference(run)
    assert (config.model, step) == (MODEL, 0)
    assert_equal_trees(restored, params)
    assert config.data.tokenizer == str(run / "tokenizer.json")
    assert load_config(run / "config.toml") == config
    assert generate_text(run, "a a", 3).startswith("a a")


def test_the_way_back_gives_the_same_model(run, folder, params, tmp_path):
    to_huggingface(run, tmp_path / "back")
    model, again = load(tmp_path / "back")
    assert model == MODEL
    assert_equal_trees(again, params)
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == TOKENIZER
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"eos_token": "b"}'
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("theirs", "exported"), [([5, 2], [5, 2]), (5, [5, 2]), (2, 2), (None, [2]), ("absent", [2])]
)
def test_settings_of_generation_go_along_with_the_end_of_the_tokenizer(
    folder, tmp_path, theirs, exported
):
    ends = {} if theirs == "absent" else {"eos_token_id": theirs}
    shutil.copytree(folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"top_k": 3} | ends))
    from_huggingface(tmp_path / "theirs", tmp_path / "run")
    to_huggingface(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert back == {"top_k": 3, "eos_token_id": exported}


def test_a_tokenizer_of_another_name_takes_along_what_is_beside_it(tmp_path):
    for name in ("own.model", "tokenizer_config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "new").mkdir()
    tools = Path("additional_chat_templates", "tools.jinja")
    (tmp_path / tools).parent.mkdir()
    (tmp_path / tools).write_text("{{ tools }}")
    copy_tokenizer(tmp_path / "own.model", tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.model").read_text() == "own.model"
    assert (tmp_path / "new" / "tokenizer_config.json").read_text() == "tokenizer_config.json"
    assert (tmp_path / "new" / tools).read_text() == "{{ tools }}"
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_a_run_without_an_optimizer_is_neither_resumed_nor_replaced(run, folder):
    with pytest.raises(InputError, match="holds parameters but no optimizer to resume"):
        train(load_config(run / "config.toml"), resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        from_huggingface(folder, run)


def test_parameters_are_saved_one_layer_at_a_time(params, tmp_path):
    asked = []

    def read(path, index):
        asked.append((path, index[0].stop - index[0].start))
        leaf = params
        for name in path.split("/"):
            leaf = leaf[name]
        return leaf[index]

    save_parameters(tmp_path / "checkpoints", CONFIG, read)
    assert {size for path, size in asked if path.startswith("layers/")} == {1}
    assert len(asked) == 2 + 2 * len(jax.tree.leaves(params["layers"]))
    assert_equal_trees(load_for_inference(tmp_path)[1], params)


def test_a_training_starts_from_the_folder_and_its_model_goes_back(folder, params, tmp_path):
    config = Config(
        dataclasses.replace(MODEL, checkpoint=str(folder)),
        DataConfig(sequence_length=32, batch_size=4),
        OptimizerConfig("adamw", warmup_steps=0),
        TrainingConfig(steps=2, evaluation_tokens=100, folder=str(tmp_path / "run")),
    )
    state = place_state(config, None)
    assert_equal_trees(state.params, params)
    random = jax.jit(lambda: init_state(config))()
    assert_equal_trees(state._replace(params=None), random._replace(params=None))

    train(config)
    _, trained, step = load_for_inference(tmp_path / "run")
    assert step == 2
    to_huggingface(tmp_path / "run", tmp_path / "back")
    model, again = load(tmp_path / "back")
    assert model == MODEL
    assert_equal_trees(again, jax.tree.map(np.asarray, trained))
    moved = jax.tree.map(lambda old, new: (old != new).any(), params, trained)
    assert all(jax.tree.leaves(moved))


def test_the_command_line_takes_the_model_and_the_tokenizer_from_the_folder(folder, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        '[model]\nhidden_size = 64\nnum_heads = 8\nremat = true\n[data]\ntokenizer = "t5.model"\n'
        "sequence_length = 16\n"
    )
    config = load_config(file, ["model.dtype=float32", f"model.checkpoint={folder}"])
    assert config.model == dataclasses.replace(
        MODEL, dtype="float32", remat=True, checkpoint=str(folder)
    )
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    other = load_config(file, [f"model.checkpoint={folder}", "data.tokenizer=bytes"])
    assert other.data.tokenizer == "bytes"
    with pytest.raises(InputError, match=r"there is no .*nowhere/config\.json"):
        load_config(file, [f"model.checkpoint={tmp_path}/nowhere"])


def test_a_checkpoint_in_the_file_determines_what_the_file_leaves_out(folder, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        f'[model]\ncheckpoint = "{folder}"\ndtype = "float32"\n[data]\nsequence_length = 16\n'
    )
    config = load_config(file)
    assert config.model == dataclasses.replace(MODEL, dtype="float32", checkpoint=str(folder))
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    # The file of a run is complete and needs the folder no more.
    gone = dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint="gone"))
    file.write_text(to_toml(gone))
    assert load_config(file) == gone


def test_a_folder_without_a_tokenizer_needs_one_by_name(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    file = tmp_path / "own.toml"
    file.write_text('[data]\ntokenizer = "t5.model"\nsequence_length = 16\n')
    with pytest.raises(InputError, match=r"bare has no tokenizer.json or tokenizer.model: give"):
        load_config(file, [f"model.checkpoint={bare}"])
    own = load_config(file, [f"model.checkpoint={bare}", "data.tokenizer=own.json"])
    assert own.data.tokenizer == "own.json"
    # Nothing is known of the tokens of a model that was converted without its tokenizer.
    (bare / "generation_config.json").write_text('{"top_k": 3}')
    with pytest.warns(UserWarning, match=r"bare has no tokenizer.json or tokenizer.model: add one"):
        from_huggingface(bare, tmp_path / "run")
    to_huggingface(tmp_path / "run", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [back[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    assert (tmp_path / "back" / "generation_config.json").exists()


def test_the_end_of_a_text_is_not_exported_as_padding(run, tmp_path):
    to_huggingface(run, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, None)


def test_an_export_refuses_the_folder_of_an_adapter(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"already has the file adapter_config\.json: name"):
        to_huggingface(run, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_settings_of_generation_leave_no_half_export(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "theirs")
    from_huggingface(tmp_path / "theirs", tmp_path / "run")
    (tmp_path / "run" / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is not a JSON file"):
        to_huggingface(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_prompt_begins_as_the_texts_of_the_training_did(folder, tmp_path, monkeypatch):
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
    from_huggingface(with_start, tmp_path / "run")
    prompts = []

    def generate(model, params, start, *others):
        prompts.append(start.tolist())
        return np.array([[2]])

    monkeypatch.setattr("galore_jax.training.sample.generate", generate)
    generate_text(tmp_path / "run", "a b", 1)
    # A training puts nothing before a document.
    loaded = lambda folder: (*load_for_inference(folder)[:2], 3)
    monkeypatch.setattr("galore_jax.training.sample.load_for_inference", loaded)
    generate_text(tmp_path / "run", "a b", 1)
    assert prompts == [[[0, 1, 2]], [[1, 2]]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(params, run, tmp_path, value):
    damaged = jax.tree.map(np.array, params)
    damaged["layers"]["mlp"]["up_proj"]["kernel"][1, 2, 3] = value
    refusal = r"layers/mlp/up_proj/kernel in .*{} has numbers that are not finite: convert"
    save(tmp_path / "theirs", MODEL, damaged)
    shutil.copy(run / "tokenizer.json", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    for _ in range(2):  # Nothing is left that would be taken for a run.
        with pytest.raises(InputError, match=refusal.format("theirs")):
            from_huggingface(tmp_path / "theirs", tmp_path / "run")

    def read(path, index):
        return functools.reduce(dict.__getitem__, path.split("/"), damaged)[index]

    data = dataclasses.replace(CONFIG.data, tokenizer=str(run / "tokenizer.json"))
    config = dataclasses.replace(CONFIG, data=data)
    save_parameters(tmp_path / "diverged" / "checkpoints", config, read)
    with pytest.raises(InputError, match=refusal.format("diverged")):
        to_huggingface(tmp_path / "diverged", tmp_path / "back")


def test_a_model_that_does_not_fit_the_folder_is_refused(folder):
    model = dataclasses.replace(MODEL, checkpoint=str(folder), tie_embeddings=False)
    config = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        place_state(config, None)


@pytest.mark.slow
def test_the_script_converts_both_ways_and_refuses_in_one_line(folder, tmp_path):
    def convert(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    there = convert("from-huggingface", folder, tmp_path / "run")
    assert there.returncode == 0, there.stderr
    back = convert("to-huggingface", tmp_path / "run", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert_equal_trees(load(tmp_path / "back")[1], load(folder)[1])
    refused = convert("to-huggingface", tmp_path / "run", tmp_path / "back")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
