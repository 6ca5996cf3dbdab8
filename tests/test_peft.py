"""Adapters of runs for transformers: merged into the model, or alone in PEFT's format."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the files are safetensors")

from model_folder import load, random_params, save
from safetensors.numpy import load_file
from test_export import TOKENIZER

from galore_jax.data.batches import DataConfig
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.training.checkpoint import load_for_inference
from galore_jax.training.config import Config, LoraConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.export import to_huggingface
from galore_jax.training.loop import train
from galore_jax.training.pretraining import Pretraining

SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
MODEL = LlamaConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=32,
)
# A fraction: 4 for kernels of 16 rows and columns, 2 for those of keys and values.
LORA = OptimizerConfig(
    "lora", lora=LoraConfig(rank=0.25, alpha=8.0), warmup_steps=0, learning_rate=0.05
)
RELORA = dataclasses.replace(
    LORA, name="relora", lora=dataclasses.replace(LORA.lora, restart_gap=2)
)
LOWRANK = dataclasses.replace(LORA, name="lowrank")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of transformers, to start from."""
    folder = tmp_path_factory.mktemp("theirs")
    save(folder, MODEL, jax.tree.map(lambda leaf: leaf / 4, random_params(MODEL)))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="module")
def run_of(folder, tmp_path_factory):
    """Trains with an optimizer, from the folder or from random parameters, and names the run."""
    runs = {}

    def run(optimizer, checkpoint=True):
        if (optimizer, checkpoint) not in runs:
            place = tmp_path_factory.mktemp("run")
            model = dataclasses.replace(MODEL, checkpoint=str(folder) if checkpoint else "")
            data = DataConfig(tokenizer=str(folder / "tokenizer.json"), sequence_length=32)
            training = TrainingConfig(steps=3, evaluation_tokens=100, folder=str(place))
            config = Config(model, dataclasses.replace(data, batch_size=4), optimizer, training)
            train(Pretraining(config))
            runs[optimizer, checkpoint] = place
        return runs[optimizer, checkpoint]

    return run


def logits(params, tokens):
    return np.asarray(jax.jit(Llama(MODEL).apply)({"params": params}, tokens))


def tokens():
    return np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 20))


@pytest.mark.parametrize(
    ("optimizer", "checkpoint"),
    [
        (LORA, True),
        pytest.param(RELORA, True, marks=pytest.mark.slow),
        pytest.param(LOWRANK, False, marks=pytest.mark.slow),
    ],
    ids=["lora", "relora", "lowrank"],
)
def test_a_run_is_written_with_its_adapters_merged(run_of, optimizer, checkpoint, tmp_path):
    run = run_of(optimizer, checkpoint)
    to_huggingface(run, tmp_path / "merged")
    model, params = load(tmp_path / "merged")
    assert model == dataclasses.replace(MODEL, checkpoint="")
    _, expected = load_for_inference(run)
    # A layer is merged by itself or in the stack, in products of rank 4.
    for one, other in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=4 * 2.0**-24 * np.abs(other).max())


def test_an_adapter_has_the_names_shapes_and_ranks_of_peft(run_of, folder, tmp_path):
    to_huggingface(run_of(LORA), tmp_path / "adapter", adapter_only=True)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.05)
    assert config["rank_pattern"] == {"k_proj": 2, "v_proj": 2}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * MODEL.num_layers
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (4, 24)
    assert tensors[name.format("B")].shape == (16, 4)
    assert all(tensor.any() for tensor in tensors.values())


# PEFT 0.21 asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_and_transformers_compute_the_same_logits(run_of, folder, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference of this test")
    peft = pytest.importorskip("peft", reason="PEFT is the reference of this test")
    transformers = pytest.importorskip("transformers", reason="it is the reference of this test")
    run = run_of(LORA)
    _, params = load_for_inference(run)
    ours, start = logits(params, tokens()), logits(load(folder)[1], tokens())
    to_huggingface(run, tmp_path / "merged")
    to_huggingface(run, tmp_path / "adapter", adapter_only=True)
    auto = transformers.AutoModelForCausalLM
    adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "adapter")
    # Both normalise and take cosines by themselves: 1e-4, as of models without adapters.
    bound = 1e-4 * max(1, np.abs(ours).max())
    assert np.abs(ours - start).max() > 100 * bound
    for model in (adapted, auto.from_pretrained(tmp_path / "merged")):
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(tokens())).logits.float().numpy()
        np.testing.assert_allclose(theirs, ours, atol=bound)


@pytest.mark.slow
def test_the_script_writes_an_adapter_once_and_refuses_runs_without_one(run_of, tmp_path):
    def run_script(run, target):
        command = [sys.executable, SCRIPT, "--adapter", run, tmp_path / target]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run_script(run_of(LORA), "adapter").returncode == 0
    again = run_script(run_of(LORA), "adapter")
    assert again.returncode == 2
    assert "already has the file adapter_config.json" in again.stderr
    refused = run_script(run_of(RELORA), "other")
    assert refused.returncode == 2
    assert "trained more than an adapter: leave out --adapter" in refused.stderr
    assert not (tmp_path / "other").exists()
