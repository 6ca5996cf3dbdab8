"""Optimizers side by side, and text from the winner."""

import pytest

from galore_jax.errors import InputError
from galore_jax.training.compare import compare, table
from galore_jax.training.config_file import from_dict
from galore_jax.training.sample import write_text

RATES = (0.01, 0.0001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "comparison"


@pytest.fixture(scope="module")
def config(folder):
    return from_dict(
        {
            "model": {
                "vocab_size": 258,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_layers": 1,
                "num_heads": 2,
            },
            "data": {"batch_size": 2, "sequence_length": 32},
            "optimizer": {"rank": 4, "warmup_steps": 0},
            "training": {
                "steps": 8,
                "evaluate_every": 0,
                "evaluation_tokens": 500,
                "bigram": True,
                "folder": str(folder),
            },
        }
    )


@pytest.fixture(scope="module")
def rows(config):
    return compare(config, seeds=(0, 1), rates=RATES)


def test_each_optimizer_takes_the_rate_of_its_lowest_loss_and_runs_with_every_seed(rows):
    galore, adamw = rows
    assert (galore.name, adamw.name) == ("galore_adamw", "adamw")
    # In two updates from a random start a rate of 1e-4 learns next to nothing.
    assert galore.learning_rate == adamw.learning_rate == 0.01
    for row in rows:
        losses = [run.validation_loss for run in row.runs]
        assert row.loss == pytest.approx(sum(losses) / 2)
        assert row.spread == pytest.approx(abs(losses[0] - losses[1]))
        assert [run.steps for run in row.runs] == [8, 8]
    assert galore.runs[0].optimizer_bytes < adamw.runs[0].optimizer_bytes


def test_it_leaves_a_table_a_picture_and_a_sample(rows, folder):
    assert (folder / "comparison.md").read_text() == table(rows)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").exists()


def test_the_table_shows_the_distance_from_adamw_and_the_bigram(rows):
    galore, adamw = rows
    lines = table(rows).splitlines()
    assert f"{100 * (galore.loss / adamw.loss - 1):+.2f}%" in lines[2]
    assert f"{adamw.loss:.4f}" in lines[3]
    assert lines[4].startswith("| bigram model of the same text")


def test_finished_runs_are_read_not_trained_again(config, rows, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("trained again")

    monkeypatch.setattr("galore_jax.training.compare.train", refuse)
    assert compare(config, seeds=(0, 1), rates=RATES) == rows


def test_a_run_continues_a_prompt_and_repeats_itself_by_seed(rows, folder):
    run = folder / "galore_adamw-seed0"
    texts = [write_text(run, "import", tokens=20, seed=seed) for seed in (3, 3, 4)]
    assert texts[0].startswith("import")
    assert texts[0] == texts[1] != texts[2]


def test_more_text_than_the_model_takes_is_refused(rows, folder):
    with pytest.raises(InputError, match="at most 1018 tokens"):
        write_text(folder / "galore_adamw-seed0", "import", tokens=2000)
