"""Instruction tuning: the loss on answers, its gradients, and a training from a folder and back."""

import contextlib
import functools
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from chats import CHATML, chat, save_tokenizer
from export import to_huggingface
from generate import generate_text
from model_folder import random_params, save

from galore_jax.data.batches import DataConfig, train_batches
from galore_jax.data.conversations import open_conversations
from galore_jax.data.packing import fit
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.config_file import load_config
from galore_jax.training.loop import train
from galore_jax.training.pretraining import Pretraining, batch_loss
from galore_jax.training.state import init_state

INSTRUCT = Path(__file__).parents[1] / "configs" / "instruct.toml"
LENGTH = 48
MODEL = LlamaConfig(
    vocab_size=304,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,
    max_length=64,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of transformers, with conversations of different lengths next to it."""
    folder = tmp_path_factory.mktemp("theirs")
    params = jax.tree.map(lambda leaf: leaf / 10, random_params(MODEL))
    save(folder, MODEL, params)
    save_tokenizer(folder, CHATML, eos_token="<|im_end|>")
    turns = [[f"{n} " + "a" * (n % 7), f"{n}.", "so?", "yes " * (n % 3)] for n in range(40)]
    rows = [{"messages": chat(*contents[: 2 + n % 3])} for n, contents in enumerate(turns)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    source, tokenizer = str(folder / "chats.jsonl"), str(folder / "tokenizer.json")
    return Config(
        MODEL,
        DataConfig(source, tokenizer, "conversations", sequence_length=LENGTH, batch_size=4),
        OptimizerConfig(
            galore=GaloreConfig(rank=8), warmup_steps=0, learning_rate=1e-3, clip_norm=1.0
        ),
        TrainingConfig(steps=5, evaluation_tokens=100, folder=str(folder / "run")),
    )


@pytest.fixture(scope="module")
def batch(config):
    return next(train_batches(config.data, load_tokenizer(config.data.tokenizer)))


@pytest.fixture(scope="module")
def state(config):
    return jax.jit(lambda: init_state(Pretraining(config)))()


def test_the_loss_is_the_mean_over_the_tokens_of_answers(config, batch, state):
    logits = Llama(MODEL).apply(
        {"params": state.params}, batch["tokens"], batch["segments"], batch["positions"]
    )
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    (end,) = load_tokenizer(config.data.tokenizer).encode("<|im_end|>")
    answers = {
        tuple(each.tokens.tolist()): each.is_answer
        for each in open_conversations(
            config.data.source, "train", 0.05, config.data.tokenizer, LENGTH
        )
    }
    losses, ends = [], 0
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            (columns,) = np.nonzero(segments == segment)
            tokens = batch["tokens"][row, columns]
            is_answer = answers[tuple(tokens.tolist())]
            ends += (tokens[is_answer] == end).sum()
            losses += [
                -np.log(probabilities[row, column - 1, token])
                for column, token in zip(columns[is_answer], tokens[is_answer], strict=True)
            ]
    assert len(losses) < 0.6 * (batch["segments"] > 0).sum()
    assert ends >= batch["segments"].max(1).sum()
    total, count = batch_loss(MODEL, state.params, batch)
    assert count == len(losses)
    np.testing.assert_allclose(total / count, np.mean(losses), rtol=1e-5)


def test_packed_conversations_have_the_sums_of_each_alone(config, state):
    data = config.data
    read = open_conversations(data.source, "train", 0.05, data.tokenizer, LENGTH)
    conversations = [read[index] for index in range(12)]
    gradient = jax.jit(jax.grad(lambda params, rows: batch_loss(MODEL, params, rows)[0]))
    loss = jax.jit(functools.partial(batch_loss, MODEL))
    packed = fit(conversations, LENGTH, 0)
    alone = [fit([each], LENGTH, 0) for each in conversations]
    alone = {name: np.concatenate([rows[name] for rows in alone]) for name in packed}
    assert len(packed["tokens"]) < len(alone["tokens"]) == 12
    for one, other in zip(loss(state.params, packed), loss(state.params, alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    one, other = (jax.tree.leaves(gradient(state.params, rows)) for rows in (packed, alone))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A run that was started with the folder, what it printed, and the folder that it became."""
    run = tmp_path_factory.mktemp("runs") / "run"
    overrides = [
        f"model.checkpoint={folder}",
        f"data.source={folder / 'chats.jsonl'}",
        f"training.folder={run}",
        *("data.sequence_length=48", "data.batch_size=4", "optimizer.galore.rank=8"),
        *("optimizer.learning_rate=0.02", "optimizer.warmup_steps=1"),
        *("training.steps=8", "training.evaluate_every=4", "model.remat=false"),
    ]
    config = load_config(INSTRUCT, overrides)
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        train(Pretraining(config))
    to_huggingface(run, run.parent / "back")
    return run, errors.getvalue(), run.parent / "back"


def test_a_folder_is_tuned_to_its_conversations(tuned):
    run, printed, _ = tuned
    assert "train: 38 conversations of " in printed
    assert "validation: 2 conversations of " in printed
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1


def test_the_tokenizer_and_its_template_go_back(tuned, folder):
    _, _, back = tuned
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((back / "config.json").read_text())
    ends = load_tokenizer(str(folder / "tokenizer.json")).encode("<|im_end|>")
    assert [config["eos_token_id"]] == ends


def test_a_tuned_model_answers_here_as_in_transformers(tuned):
    run, _, back = tuned
    answer = generate_text(run, "2 aa", 8, temperature=0)
    assert "2 aa" not in answer
    pytest.importorskip("torch", reason="transformers needs it")
    transformers = pytest.importorskip("transformers", reason="it is the reference of this test")
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    prompt = tokenizer.apply_chat_template(
        chat("2 aa"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    new = tokens[prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == answer


def test_a_tokenizer_of_another_model_or_none_is_refused(folder):
    overrides = [f"model.checkpoint={folder}", "model.vocab_size=200", "data.sequence_length=48"]
    with pytest.raises(InputError, match=r"has 300 tokens, more than model\.vocab_size, 200"):
        train(Pretraining(load_config(INSTRUCT, overrides)))
    with pytest.raises(
        InputError, match=r"chat template: .* which model\.checkpoint=FOLDER brings"
    ):
        train(Pretraining(load_config(INSTRUCT, [f"data.source={folder / 'chats.jsonl'}"])))


def test_the_configuration_has_the_numbers_that_its_header_cites():
    config = load_config(INSTRUCT)
    optimizer = config.optimizer
    galore = optimizer.galore
    assert (galore.rank, galore.scale, optimizer.learning_rate) == (
        256,
        4.0,
        3e-5,
    )
    assert (galore.update_proj_gap, optimizer.weight_decay) == (200, 1e-4)
    assert optimizer.has_projected_gradients
    tokens = config.data.batch_size * config.data.sequence_length
    assert f"{tokens * config.training.steps / 1e6:.1f}M" in INSTRUCT.read_text()
    assert f"tokens / {tokens:,};" in INSTRUCT.read_text()
