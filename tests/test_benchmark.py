"""The benchmarks of scripts/benchmark.py at tiny sizes: their rows, not their times."""

import dataclasses
import functools
import json
import re
import sys

import benchmark
import jax
import jax.numpy as jnp
import pytest
from benchmarks import (
    CONFIGS,
    SIZES,
    finetuning,
    kernels,
    optimizers,
    refresh,
    sketch,
    state,
    step,
    tokens,
    training,
)
from benchmarks import all as everything
from benchmarks.baselines import rank_of
from benchmarks.models import blocks_loss, init_llama, with_dense

from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import FinetuneConfig
from galore_jax.training.config_file import load_comparison, load_config

NAMES = (
    "adamw",
    "optax.contrib.galore",
    "galore_full",
    "galore_projected",
)
TINY = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
RANK = 4


@pytest.fixture(scope="module")
def refresh_rows():
    size = refresh.Size(hidden=32, ffn=48, rank=8)
    return refresh.measure_size(size, refresh.Settings(tokens=256, repeats=1))


@pytest.mark.slow
def test_a_refresh_captures_at_most_what_the_exact_one_does(refresh_rows):
    rows = {row["name"]: row for row in refresh_rows}
    assert list(rows) == ["subspace_iteration", "eigh", "svd", "random"]
    assert all(row["size"] == "32x48" and row["rank"] == 8 for row in refresh_rows)
    assert all(row["seconds"] > 0 for row in refresh_rows)
    # Energies are sums of 32 * 48 float32 squares.
    assert all(0 < row["energy"] <= 1 + 1e-5 for row in refresh_rows)
    assert rows["eigh"]["relative_energy"] == pytest.approx(1, abs=1e-4)
    assert 0.9 < rows["subspace_iteration"]["relative_energy"] < 1 + 1e-5
    assert rows["random"]["relative_energy"] < 0.9


@pytest.mark.slow
def test_a_step_has_a_row_of_every_baseline():
    rows = step.measure_model(TINY, step.Settings(repeats=1), (2, 8), RANK)
    assert tuple(row["name"] for row in rows) == NAMES
    assert all(row["of_adamw"] == row["seconds"] / rows[0]["seconds"] > 0 for row in rows)
    assert all(row["with_refreshes"] >= row["of_adamw"] for row in rows)
    assert rows[0]["with_refreshes"] == 1  # adamw has nothing to refresh


@pytest.mark.parametrize("size", SIZES)
def test_the_rank_of_every_configuration_is_a_whole_number_below_its_width(size):
    config = load_config(CONFIGS / f"llama_{size}.toml")
    rank = rank_of(config)
    assert isinstance(rank, int)
    assert 0 < rank < config.model.hidden_size


@pytest.mark.slow
def test_each_optimizer_of_a_comparison_has_the_time_of_a_step_and_the_bytes_of_its_state(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        """
        [model]
        hidden_size = 8
        num_heads = 2
        [optimizer]
        galore.rank = 0.25
        [compare.adamw]
        [compare.muon]
        [compare.galore_adamw]
        [compare.galore_muon]
        [compare."apollo mini"]
        name = "apollo"
        galore.rank = 1
        """
    )
    settings = step.Settings(repeats=1)
    rows = optimizers.measure_model(TINY, load_comparison(path), (2, 8), settings)
    assert [row["name"] for row in rows] == list(load_comparison(path))
    assert all(row["of_adamw"] == row["seconds"] / rows[0]["seconds"] > 0 for row in rows)
    (adamw, muon, galore, galore_muon, mini) = (row["bytes_of_adamw"] for row in rows)
    assert adamw == 1
    assert mini < galore_muon < galore < 1
    assert muon == pytest.approx(0.5, abs=0.1)
    chosen = step.Settings(repeats=1, optimizers="muon")
    rows = optimizers.measure_model(TINY, load_comparison(path), (2, 8), chosen)
    assert [row["name"] for row in rows] == ["adamw", "muon"]


@pytest.mark.slow
def test_each_optimizer_of_a_fine_tuning_has_the_time_of_a_step_and_the_bytes_of_its_state():
    path = CONFIGS / "glue" / "minilm.toml"
    overrides = ["data.batch_size=2", "data.sequence_length=8"]
    configs = load_comparison(path, overrides, kind=FinetuneConfig)
    encoder = dataclasses.replace(
        finetuning.MINILM,
        **{"vocab_size": 32, "hidden_size": 48, "intermediate_size": 64, "num_layers": 1},
    )
    rows = finetuning.measure_encoder(encoder, configs, repeats=1)
    assert [row["name"] for row in rows] == list(configs)
    assert all(row["of_adamw"] == row["seconds"] / rows[0]["seconds"] > 0 for row in rows)
    size = {row["name"]: row["bytes"] for row in rows}
    assert size["lora rank 4"] < size["lora rank 8"] < size["galore rank 4"]
    assert size["galore rank 4"] < size["galore rank 8"] < size["galore rank 96"] < size["adamw"]


def test_layers_as_in_flax_have_the_derivative_that_jax_makes():
    model = LlamaConfig(16, 8, 12, num_layers=1, num_heads=2)
    params, batch = init_llama(model), 2 * (jnp.ones((2, 4, 8)),)
    transposed = {}
    for kind in ("flax", "galore_jax"):
        loss = with_dense(kind, functools.partial(blocks_loss, model))
        transposed[kind] = str(jax.make_jaxpr(jax.grad(loss))(params, batch)).count(" transpose[")
    # One for each of the seven kernels of a block.
    assert transposed["flax"] == transposed["galore_jax"] + 7


def test_the_bytes_of_a_state_are_those_of_its_bases_moments_and_counters():
    layers = 2
    model = dataclasses.replace(TINY, num_layers=layers)
    rows = {row["name"]: row for row in state.measure_size("tiny", model, RANK)}
    assert tuple(rows) == NAMES
    hidden, ffn = TINY.hidden_size, TINY.intermediate_size
    unprojected = (
        2 * TINY.vocab_size * hidden + hidden + layers * 2 * hidden
    )  # embedding, head, norms
    matrices = 4 * hidden**2 + 3 * hidden * ffn
    # The smaller side of a matrix is projected, and the larger one by optax.contrib.galore.
    smaller, larger = RANK * layers * 7 * hidden, RANK * layers * (4 * hidden + 3 * ffn)
    for name, bases, coordinates in (
        ("adamw", 0, layers * matrices),
        ("galore_full", smaller, larger),
        ("optax.contrib.galore", larger, smaller),
    ):
        row = rows[name]
        assert row["parameters"] == unprojected + layers * matrices
        assert row["bases"] == 4 * bases
        assert row["moments"] == 2 * 4 * (unprojected + coordinates)
        assert row["bytes"] == row["bases"] + row["moments"] + row["rest"]
        assert row["rest"] < 100 * layers * 7


def test_accumulators_of_projected_gradients_are_as_small_as_the_rank():
    rows = {row["name"]: row for row in state.measure_size("tiny", TINY, RANK)}
    full, projected = rows["galore_full"], rows["galore_projected"]
    hidden, ffn = TINY.hidden_size, TINY.intermediate_size
    assert full["accumulated"] == 4 * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden)
    assert projected["accumulated"] == 4 * (RANK * (4 * hidden + 3 * ffn) + 2 * hidden)
    assert projected["of_full"] == projected["accumulated"] / full["accumulated"]


@pytest.mark.slow
def test_ratios_over_tokens_are_measured_and_drawn(tmp_path):
    settings = tokens.Settings(repeats=1)
    rows = tokens.measure_size("tiny", TINY, RANK, (2, 8), settings)
    assert [row["name"] for row in rows] == ["adamw", "galore_full", "galore_projected"]
    assert {row["tokens"] for row in rows} == {16}
    assert rows[0]["of_adamw"] == 1
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    tokens.draw(rows, tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_sketch_along_a_run_captures_what_an_exact_basis_does(tmp_path):
    config = load_config(
        CONFIGS / "demo.toml",
        [
            "training.steps=12",
            "optimizer.warmup_steps=2",
            "optimizer.galore.update_proj_gap=5",
            "model.num_layers=1",
        ],
    )
    rows = sketch.measure_run(config)
    assert [row["step"] for row in rows] == [0, 5, 10]
    for row in rows:
        assert 0.9 < row["lowest"] <= row["relative_energy"] <= 1 + 1e-5
        assert row["energy"] <= row["exact"] <= 1


def test_rows_go_to_a_table_and_to_json(tmp_path, monkeypatch, capsys):
    rows = [
        {"name": "adamw", "seconds": 0.5, "bytes": 1234},
        {"name": "galore_full", "seconds": 0.25, "energy": 1.5},
    ]
    monkeypatch.setattr(state, "measure", lambda settings: rows)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "state", "--json", str(tmp_path / "a.json")])
    benchmark.main()
    assert json.loads((tmp_path / "a.json").read_text()) == {"bench": "state", "rows": rows}
    assert capsys.readouterr().out.splitlines() == [
        "name         seconds  bytes  energy",
        "adamw            0.5  1,234       -",
        "galore_full     0.25      -     1.5",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stap"], "bench = 'stap' is unknown; did you mean step or state?"),
        (["step", "modle=llama"], "the setting modle is unknown; did you mean model?"),
        (["step", "repeats"], "'repeats' is not a setting: write key=value, as in repeats=5."),
        (["step", "repeats=0"], "repeats must be a whole number above 0, not '0'."),
        (["step", "dense=torch"], "dense = 'torch' is unknown; there are flax, galore_jax."),
        (["refresh", "tokens=300"], "tokens must be a multiple of 256, not 300."),
        (["step", "tokens=300"], "tokens must be a multiple of 256, not 300."),
        (["step", "size=350"], "size = '350' is unknown; did you mean 350m"),
        (["step", "optimizers=adamx"], "optimizers = 'adamx' is unknown; did you mean adamw?"),
        (["optimizers", "optimizers=moun"], "optimizers = 'moun' is unknown; did you mean muon?"),
        (["step", "device=v7e"], "the target = 'v7e' is unknown; did you mean"),
        (["training", "steps=2"], "steps must be 3 or more: two are compiled for, not 2."),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(InputError, match="^" + re.escape(sentence)):
        benchmark.main()


def test_every_setting_is_in_the_help():
    measured = (step, tokens, optimizers, finetuning, state, refresh, kernels, training, sketch)
    for bench in (*measured, everything):
        defaults = vars(bench.Settings())
        assert all(f"    {key}={value} " in benchmark.__doc__ for key, value in defaults.items())


def test_a_kernel_is_timed_if_it_computes_what_plain_jax_does(monkeypatch):
    (name, case), *_ = kernels.cases(8, 256, 4).items()
    plain = kernels.program

    def program(case, implementation):
        one = plain(case, "xla")
        if implementation == "wrong":
            return jax.jit(lambda *arguments: jax.tree.map(lambda x: x + 1, one(*arguments)))
        return one

    monkeypatch.setattr(kernels, "program", program)
    rows = kernels.timed(name, case, ("xla", "pallas", "wrong"), kernels.Settings(repeats=1))
    right, kernel, wrong = rows
    assert right["difference"] == kernel["difference"] == 0
    assert kernel["of_xla"] == kernel["seconds"] / right["seconds"]
    assert wrong["difference"] > kernels.TOLERANCE
    assert wrong["seconds"] is None


def test_what_fails_or_has_no_time_left_is_on_the_page(tmp_path, monkeypatch):
    machine = {"device": "a card", "platform": "gpu", "devices": 1, "python": "3", "system": "s"}
    monkeypatch.setattr(everything, "probe", lambda: machine | {"versions": {"jax": "1"}})
    results = {
        "step": {"rows": [{"name": "adamw", "seconds": 0.5}]},
        "refresh": {"problem": "RESOURCE_EXHAUSTED: 1 GiB"},
    }
    monkeypatch.setattr(everything, "BENCHMARKS", {"device": list(results)})
    monkeypatch.setattr(
        everything,
        "run",
        lambda command, left: {"command": command, "seconds": 1.0} | results[command],
    )
    rows = everything.measure(everything.Settings(folder=str(tmp_path / "new")))
    assert [row["result"] for row in rows] == ["ok", "RESOURCE_EXHAUSTED: 1 GiB"]
    text = (tmp_path / "new" / "results.md").read_text()
    assert text.startswith("# galore_jax on a card")
    assert "python scripts/benchmark.py step" in text
    assert "| adamw | 0.5 |" in text
    assert "No result: RESOURCE_EXHAUSTED: 1 GiB" in text
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["results"][0]["rows"] == results["step"]["rows"]


def test_a_benchmark_that_ends_with_an_error_is_a_problem_of_its_last_line():
    assert everything.run("stap", 60)["problem"].endswith("did you mean step or state?")
    assert everything.run("step", 0)["problem"] == "no time was left"
    text = "Traceback\nE RESOURCE_EXHAUSTED: 2 GiB\nmore\n"
    assert everything.last_line(text) == "E RESOURCE_EXHAUSTED: 2 GiB"


@pytest.mark.slow
def test_all_benchmarks_run_in_their_small_form(tmp_path):
    rows = everything.measure(everything.Settings(folder=str(tmp_path), form="small"))
    assert [row["result"] for row in rows] == ["ok"] * len(everything.BENCHMARKS["small"])
    text = (tmp_path / "results.md").read_text()
    assert re.findall(r"python scripts/benchmark.py (.*)", text) == everything.BENCHMARKS["small"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["jax"] == jax.__version__
    *_, trained = results["results"]
    assert trained["rows"][0]["last_loss"] < trained["rows"][0]["first_loss"]


def test_the_state_of_a_model_in_8_bits_is_that_of_a_plain_one():
    plain = dataclasses.replace(TINY, hidden_size=32, num_heads=2, intermediate_size=48)
    in_8_bits = dataclasses.replace(plain, weights="int8")
    assert state.measure_size("tiny", in_8_bits, RANK) == state.measure_size("tiny", plain, RANK)
