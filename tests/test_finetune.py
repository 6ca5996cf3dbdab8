"""Fine-tuning on GLUE: a tiny BERT learns a tiny task, and results are kept."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from encoders import BERT, initial
from scipy import stats

from galore_jax.errors import InputError

pytest.importorskip("safetensors", reason="needs safetensors")

from analysis.comparison import compare_finetuning, table, tables

from galore_jax.data.batches import DataConfig
from galore_jax.data.glue_tasks import TASKS, encode, load_examples, predictions_of, scores
from galore_jax.data.text_pairs import PairTokenizer, batches
from galore_jax.files import locked
from galore_jax.interop.encoders import encoder_config, load_encoder, save_encoder
from galore_jax.models.encoder import Classifier, Encoder
from galore_jax.models.llama import LlamaConfig
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.training.config import Config, FinetuneConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.config_file import load_comparison, load_config, to_toml
from galore_jax.training.finetune import finetune, make_task
from galore_jax.training.loop import Diverged, Interrupted
from galore_jax.training.metrics import read_metrics
from galore_jax.training.run_folder import check_start
from galore_jax.training.step import Stepper

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
CONFIG = dataclasses.replace(
    BERT, vocab_size=len(WORDS), num_layers=2, dropout=0.0, attention_dropout=0.0
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer, and RTE: a pair entails if it shares its first word."""
    place = tmp_path_factory.mktemp("finetune")
    save_encoder(place / "model", Encoder(CONFIG), initial(Classifier(CONFIG, 2))["encoder"])
    (place / "model" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (place / "RTE").mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train", 64), ("dev", 24)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(count):
            first, second = draw.choice(list("abcdefgh"), (2, 3))
            entails = draw.random() < 0.5
            second[0] = "a" if entails else "b"
            label = "entailment" if entails else "not_entailment"
            lines.append("\t".join([str(index), " ".join(first), " ".join(second), label]))
        (place / "RTE" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return place


def configured(place, folder, optimizer, **training):
    sections = {
        "model": {"checkpoint": str(place / "model")},
        "data": {"source": str(place), "sequence_length": 12, "batch_size": 16},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0, **optimizer},
        "training": {"epochs": 3, "seeds": 1, "folder": str(folder)} | training,
    }
    return FinetuneConfig(**sections)


GALORE = {
    "name": "galore_adamw",
    "galore": {"rank": 4, "scale": 1.0, "update_proj_gap": 5},
}


LORA = {"name": "lora", "lora": {"rank": 4}}


@pytest.mark.parametrize(
    "optimizer", [GALORE, {"name": "adamw"}, LORA], ids=["galore", "adamw", "lora"]
)
def test_a_tiny_model_learns_and_its_best_checkpoint_has_the_score(place, tmp_path, optimizer):
    folder = tmp_path / "run"
    summary = finetune(configured(place, folder, optimizer))
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "accuracy"
    assert summary["mean"] == summary["best"][0] > 0.9  # half of the examples entail
    lines = read_metrics(folder / "seed-0" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]  # after each epoch
    assert max(line["validation_accuracy"] for line in evaluations) == summary["best"][0]
    assert not (folder / "seed-0" / "checkpoints").exists()

    best, task = folder / "seed-0", TASKS["rte"]
    model = Classifier(encoder_config(best), 2)
    params = load_encoder(best, model, jax.random.key(0))
    rows = encode(load_examples(task, "validation", place), PairTokenizer(best), 12)
    outputs = model.apply({"params": params}, rows["tokens"], rows["token_types"])
    found = scores(task, predictions_of(task, np.asarray(outputs)), rows["labels"])
    assert found == {"accuracy": summary["best"][0]}


def test_lora_trains_its_adapters_and_the_head_and_nothing_else(place, tmp_path):
    finetune(configured(place, tmp_path / "run", LORA, epochs=1))
    model, key = Classifier(CONFIG, 2), jax.random.key(0)
    before = load_encoder(place / "model", model, key)
    after = load_encoder(tmp_path / "run" / "seed-0", model, key)
    for names, leaf in named_leaves(after):
        old = before
        for name in names:
            old = old[name]
        is_adapted = "layers" in names and names[-1] == "kernel"
        assert np.array_equal(leaf, old) != (is_adapted or names[0] == "head"), names
        if is_adapted:
            # What was added to a layer's kernel has the rank of the adapter.
            added = np.asarray(leaf - old)[0]
            assert np.linalg.matrix_rank(added, tol=1e-6 * np.abs(leaf).max() * 32) == 4


def lines_of(folder):
    """Of metrics.jsonl, without the clock's."""
    clock = ("seconds", "examples_per_second")
    read = read_metrics(folder / "metrics.jsonl")
    return [{name: line[name] for name in line if name not in clock} for line in read]


@pytest.mark.slow
def test_seeds_differ_and_a_fine_tuning_continues_with_those_missing(place, tmp_path):
    first, second = (tmp_path / name for name in "ab")
    expected = finetune(configured(place, first, GALORE, epochs=1, seeds=2))
    lines = [lines_of(first / f"seed-{seed}") for seed in (0, 1)]
    assert lines[0] != lines[1]
    np.testing.assert_allclose(expected["deviation"], np.std(expected["best"], ddof=1), atol=1e-12)

    finetune(configured(place, second, GALORE, epochs=1))
    seconds = json.loads((second / "seed-0" / "result.json").read_text())["seconds"]
    two = configured(place, second, GALORE, epochs=1, seeds=2)
    with locked(second / "lock", "fine-tuning", "wait"), pytest.raises(InputError, match="is fine"):
        finetune(two)
    found = finetune(two)
    assert found["best"] == expected["best"]
    assert found["seconds"][0] == seconds
    assert lines_of(second / "seed-1") == lines[1]

    # Asked for fewer seeds, as by a comparison with a larger grid, all of them stay in the files.
    assert finetune(configured(place, second, GALORE, epochs=1))["best"] == expected["best"][:1]
    assert json.loads((second / "summary.json").read_text()) == found
    assert load_config(second / "config.toml", kind=FinetuneConfig).training.seeds == 2


@pytest.mark.slow
def test_a_fine_tuning_that_is_stopped_within_an_epoch_continues_bit_for_bit(
    place, tmp_path, monkeypatch
):
    def stop_after(number):
        stepped = []

        class Stopping(Stepper):
            def __call__(self, state, batch):
                stepped.append(1)
                if len(stepped) == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().__call__(state, batch)

        return Stopping

    expected = finetune(configured(place, tmp_path / "whole", GALORE))
    config = configured(place, tmp_path / "parts", GALORE)
    with monkeypatch.context() as patch:
        patch.setattr("galore_jax.training.loop.Stepper", stop_after(6))
        with pytest.raises(Interrupted, match="stopped after 6 of 12 steps, all saved") as stopped:
            finetune(config)
    assert stopped.value.status == 143
    found = finetune(config)
    whole, parts = (tmp_path / name / "seed-0" for name in ("whole", "parts"))
    assert found["best"] == expected["best"]
    assert lines_of(parts) == lines_of(whole)
    weights = "model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()


def test_the_order_of_the_examples_is_that_of_seed_and_epoch(place, tmp_path):
    task = make_task(configured(place, tmp_path, GALORE))
    data = task.open_data(None, None)
    expected = [
        batch
        for epoch in (1, 2)
        for batch in batches(task.rows["train"], 16, task.model.config.pad_id, (0, epoch))
    ]
    for batch in expected[:6]:
        assert all(np.array_equal(array, batch[name]) for name, array in next(data.batches).items())
    again = task.open_data(None, None).batches
    again.set_state(json.loads(json.dumps(data.batches.get_state())))
    for left in (data.batches, again):
        found = next(left)
        assert all(np.array_equal(array, expected[6][name]) for name, array in found.items())


def test_a_rate_that_diverges_loses_and_the_end_of_the_grid_is_reported(tmp_path, monkeypatch):
    metrics = {1e-5: 0.6, 1e-4: 0.7, 1e-3: None}

    def stub(config):
        metric = metrics.get(config.optimizer.learning_rate)
        if metric is None:
            raise Diverged("the losses are not finite")
        best = config.training.seeds * [metric]
        return {
            "mean": metric,
            "best": best,
            "deviation": 0.0,
            "optimizer_bytes": 8,
            "seconds": config.training.seeds * [1.0],
        }

    monkeypatch.setattr("analysis.comparison.finetune", stub)
    config = configured(tmp_path, tmp_path, {"name": "adamw"})

    def compared(configs, rates):
        return compare_finetuning(configs, rates)["rte"]

    (row,) = compared({"adamw": config}, [1e-5, 1e-4, 1e-3])
    assert (row.rates, row.borders) == (["0.0001"], ())
    assert "not tuned" not in table([row])
    (row,) = compared({"adamw": config}, [1e-5, 1e-4])
    assert (row.rates, row.borders) == (["0.0001"], ("learning rate",))
    assert "adamw is not tuned: its best learning rate is at the end of the grid" in table([row])
    # One whose every rate diverges, first or later, does not end the comparison.
    (tmp_path / "all").mkdir()
    folder = configured(tmp_path, tmp_path / "all", {"name": "adamw"})
    rows = compared({"adamw": folder, "lora": folder}, [1e-3])
    assert [row.values for row in rows] == [[], []]
    written = (tmp_path / "all" / "comparison.md").read_text()
    assert written.count("| 0.001 | diverged |  |  |  |  |  |") == 2
    assert "not tuned" not in table(compared({"adamw": folder}, [1e-3, 2e-3]))
    metrics[1e-3] = 0.8
    rows = [rows[0], *compared({"lora": folder}, [1e-3])]
    assert "| lora | 0.001 | 0.8000 | 0.0000 |  |  |" in table(rows)


def test_means_over_tasks_pair_the_seeds(tmp_path, monkeypatch):
    metrics = {
        ("adamw", "cola"): [0.2, 0.3, 0.4],
        ("adamw", "rte"): [0.6, 0.7, 0.5],
        ("adamw", "mrpc"): [0.8, 0.8, 0.8],
        ("lora", "cola"): [0.1, 0.3, 0.5],
        ("lora", "rte"): [0.5, 0.7, 0.8],
    }

    def stub(config):
        folder, task = Path(config.training.folder), config.data.task
        folder.mkdir(parents=True, exist_ok=True)
        assert folder.parent.name == task
        if task == "mrpc" and config.optimizer.name == "lora":
            raise Diverged("the losses are not finite")
        size = {
            "optimizer_bytes": 8 if task == "rte" else 9,
            "seconds": [1.0, 2.0, 3.0][: config.training.seeds],
        }
        best = metrics[config.optimizer.name, task][: config.training.seeds]
        return {"best": best, "mean": 1.0, "deviation": 2.0, **size}

    monkeypatch.setattr("analysis.comparison.finetune", stub)
    configs = {
        name: configured(tmp_path, tmp_path / "runs", {"name": name}, seeds=3)
        for name in ("adamw", "lora")
    }
    compared = compare_finetuning(configs, [1e-3], ["cola", "rte"])
    assert list(compared) == ["cola", "rte", "mean"]
    assert (tmp_path / "runs" / "comparison.md").read_text() == tables(compared)
    adamw, lora = compared["mean"]
    np.testing.assert_allclose(adamw.values, [0.4, 0.5, 0.45])
    np.testing.assert_allclose(lora.values, [0.3, 0.5, 0.65])
    low, high = stats.ttest_rel(lora.values, adamw.values).confidence_interval()
    line = table(compared["mean"]).splitlines()[3]
    assert line == (
        f"| lora | 0.001, 0.001 | 0.4833 | 0.1756 | +0.0333 | {low:+.4f} to {high:+.4f} | 9 B | 4 |"
    )
    # No mean is compared if one of its tasks is missing.
    last = compare_finetuning(configs, [1e-3], ["cola", "mrpc"])["mean"][1]
    assert table([last]).splitlines()[2] == "| lora | 0.001, 0.001 | diverged |  |  |  |  |  |"
    with pytest.raises(InputError, match=r"data\.task .*mpc"):
        compare_finetuning(configs, [1e-3], ["cola", "mpc"])


def test_outputs_that_are_not_finite_are_refused_although_the_losses_are(
    place, tmp_path, monkeypatch
):
    config = configured(place, tmp_path, {"name": "adamw", "learning_rate": 1e30}, epochs=1)
    data = dataclasses.replace(config.data, batch_size=64)  # one step, whose loss is finite
    config = dataclasses.replace(config, data=data)
    with pytest.raises(Diverged, match=r"the evaluation \(validation_accuracy\) of .* not finite"):
        finetune(config)
    monkeypatch.delattr("galore_jax.training.finetune.load_examples")  # It is not trained again.
    with pytest.raises(Diverged, match=r"the evaluation \(validation_accuracy\) of .* not finite"):
        finetune(config)


def test_what_does_not_fit_is_one_sentence(place, tmp_path):
    config = configured(place, tmp_path, GALORE)
    data = dataclasses.replace(config.data, sequence_length=64)
    with pytest.raises(InputError, match=r"sequence_length is 64, but the model .* only 16"):
        finetune(dataclasses.replace(config, data=data))
    with pytest.raises(InputError, match="warmup_steps is 99, but there are only 12 steps"):
        finetune(configured(place, tmp_path, GALORE | {"warmup_steps": 99}))
    (tmp_path / "config.toml").write_text(to_toml(configured(place, tmp_path, {"name": "adamw"})))
    with pytest.raises(
        InputError, match=r"with another optimizer.name, 'adamw', which is 'galore_adamw' here"
    ):
        finetune(configured(place, tmp_path, GALORE))
    model = tmp_path / "model"
    save_encoder(model, Encoder(CONFIG), initial(Encoder(CONFIG)))
    (model / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    with pytest.raises(InputError, match="does not belong to the model: it has 13 tokens"):
        finetune(configured(tmp_path, tmp_path / "new", GALORE))


@pytest.mark.slow
def test_a_bert_may_have_a_vocabulary_with_other_padding_than_its_config(place, tmp_path):
    shutil.copytree(place, tmp_path / "place")
    path = tmp_path / "place" / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 1}))
    with_other = configured(tmp_path / "place", tmp_path / "run", GALORE, epochs=1)
    as_usual = configured(place, tmp_path / "usual", GALORE, epochs=1)
    assert finetune(with_other)["best"] == finetune(as_usual)["best"]


def test_what_would_fail_later_is_refused_at_the_start(place, tmp_path):
    folder = tmp_path / "run"
    for rate in (float("inf"), 0.0):
        with pytest.raises(InputError, match="learning_rate must be "):
            compare_finetuning({"galore": configured(place, folder, GALORE)}, [1e-3, rate])
    assert not folder.exists()


def test_a_folder_has_one_fine_tuning_at_a_time_and_no_training_beside_it(place, tmp_path):
    config = configured(place, tmp_path, GALORE)
    busy = pytest.raises(InputError, match=r"is training in .*seed-0.*: let it finish or stop it")
    (tmp_path / "seed-0").mkdir()
    with locked(tmp_path / "seed-0" / "lock", "training in seed-0", "wait"), busy:
        finetune(config)
    training = Config(LlamaConfig(), DataConfig(), OptimizerConfig("adamw"))
    training = dataclasses.replace(training, training=TrainingConfig(folder=str(tmp_path)))
    with pytest.raises(InputError, match="already holds a run"):
        check_start(training, resume=False)
    (tmp_path / "config.toml").write_text(to_toml(config))
    with pytest.raises(
        InputError, match=r"config\.toml is not of such a training .*: name another"
    ):
        check_start(training, resume=True)
    (tmp_path / "config.toml").write_text(to_toml(training))
    with pytest.raises(
        InputError, match=r"config\.toml is not of such a training .*: name another"
    ):
        finetune(config)


def test_the_configurations_in_the_repository_are_valid():
    folder = ROOT / "configs" / "glue"
    for task in TASKS:
        path = folder / f"{task}.toml"
        assert load_config(path, kind=FinetuneConfig).data.task == task
    with pytest.raises(InputError, match=r"data.task = 'rtl' is unknown"):
        load_config(path, ["data.task=rtl"], FinetuneConfig)
    compared = load_comparison(folder / "minilm.toml", kind=FinetuneConfig)
    assert [config.optimizer.name for config in compared.values()] == [
        *("adamw", "galore_adamw", "galore_adamw", "galore_adamw"),
        *("galore_muon", "lora", "lora"),
    ]


def test_the_script_ends_in_one_sentence(tmp_path):
    command = [sys.executable, "scripts/finetune.py", "--config", "configs/glue/rte.toml"]
    overrides = [f"model.checkpoint={tmp_path}", f"training.folder={tmp_path / 'run'}"]
    result = subprocess.run(
        [*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: there is no {tmp_path}/config.json: name a folder that has one.\n"
    )
