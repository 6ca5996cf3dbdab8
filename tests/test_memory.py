"""Bytes of a training: predictions, the figures of compiled programs, and scripts/memory.py."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import eight_devices
import optax
import pytest
from jax.sharding import AbstractMesh

from galore_jax.errors import run_cli
from galore_jax.optim.state import bases_of, galore_states
from galore_jax.training import compile_targets
from galore_jax.training import memory as training_memory
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.config_file import from_dict, load_config, to_toml
from galore_jax.training.memory import PARTS, baselines, predict
from galore_jax.training.state import init_state, tree_bytes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import memory  # noqa: E402

SEVEN_B = ROOT / "configs" / "llama_7b_24gb.toml"
FIGURES = {"arguments", "outputs", "aliased", "temporaries", "total"}
LAYERS, ROWS, LENGTH = 2, 2, 16
# Of 7 bases: six counters and an overlap a layer, a scale and an interval; counts, step and norm.
COUNTERS = 7 * (7 * 4 * LAYERS + 2 * 4) + 64
# To the results of a program: at most 128 arrays.
POINTERS = 8 * 128


def tiny(**optimizer) -> Config:
    """A small model; the moments in 8 bits go with the layer-wise step."""
    layerwise = optimizer.get("name", "").endswith("8bit")
    return from_dict(
        {
            "model": {
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_layers": LAYERS,
                "num_heads": 2,
                "max_length": LENGTH,
                "dtype": "bfloat16",
            },
            "data": {"sequence_length": LENGTH, "batch_size": ROWS},
            "optimizer": {"rank": 8, **optimizer},
            "training": {"layerwise": layerwise},
        }
    )


CHOICES = {
    "galore": {},
    "adamw": {"name": "adamw"},
    "adafactor": {"name": "galore_adafactor"},
    "layerwise": {"name": "galore_adamw8bit", "basis_dtype": "bfloat16"},
    "int8 bases": {"name": "galore_adamw8bit", "basis_dtype": "int8"},
    "8-bit adamw": {"name": "adamw8bit"},
    "lora": {"name": "lora"},
    "lowrank": {"name": "lowrank"},
}
SLOW = pytest.mark.slow
COMPILED = (pytest.param("galore", marks=SLOW), "adamw", "layerwise")


class Run(NamedTuple):
    """A run of the script: what it was given, printed and wrote."""

    choice: str
    predicted: dict
    programs: dict
    printed: str
    errors: str
    folder: Path


def run_script(folder: Path, config: Config, *arguments: str) -> None:
    file = folder / "tiny.toml"
    file.write_text(to_toml(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["memory.py", "--config", str(file), *arguments])
        run_cli(memory.main)


@pytest.fixture(scope="module", params=COMPILED)
def run(request, tmp_path_factory) -> Run:
    folder, config = tmp_path_factory.mktemp("memory"), tiny(**CHOICES[request.param])
    files = "--json", str(folder / "memory.json"), "--picture", str(folder / "memory.png")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run_script(folder, config, *files, f"data.batch_size={ROWS}")
    figures = json.loads((folder / "memory.json").read_text())
    assert set(figures) == {"predicted", "compiled"}
    printed, errors = out.getvalue(), err.getvalue()
    return Run(request.param, figures["predicted"], figures["compiled"], printed, errors, folder)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_parts_of_a_prediction_add_up_to_its_total(choice):
    predicted = predict(tiny(**CHOICES[choice]))
    assert tuple(predicted) == (*PARTS, "total")
    assert all(predicted[part] > 0 for part in ("weights", "gradients", "moments", "activations"))
    has_galore = OptimizerConfig(**CHOICES[choice]).has_galore
    assert (predicted["bases"] > 0) == has_galore
    assert predicted["total"] == sum(predicted[part] for part in PARTS)
    assert predicted["total"] > predicted["weights"] + predicted["bases"] + predicted["moments"]


@pytest.mark.parametrize("choice", ["adafactor", "int8 bases", "lora"])
def test_weights_bases_and_moments_are_predicted_to_the_byte(choice):
    config = tiny(**CHOICES[choice])
    predicted, state = predict(config), init_state(config)
    bases = bases_of(galore_states(state.opt_state, inside_chains=True))
    assert predicted["weights"] == tree_bytes(state.params)
    assert predicted["bases"] == tree_bytes([basis.vectors for basis in bases])
    known = predicted["weights"] + predicted["bases"] + predicted["moments"]
    assert 0 <= tree_bytes(state) - known <= COUNTERS
    if choice != "adafactor":
        moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
        assert predicted["moments"] == tree_bytes(moments)


def test_adapters_cost_weights_and_save_gradients_and_moments_of_frozen_kernels():
    lora, lowrank = predict(tiny(name="lora", dropout=0.0)), predict(tiny(name="lowrank"))
    adamw, with_dropout = predict(tiny(name="adamw")), predict(tiny(name="lora"))
    # In bfloat16, of each layer: four square kernels, and three between 64 and 96.
    kernels = 2 * LAYERS * (4 * 64 * 64 + 3 * 64 * 96)
    factors = 2 * LAYERS * 8 * (4 * (64 + 64) + 3 * (64 + 96))
    assert lora["weights"] == adamw["weights"] + factors
    assert lowrank["weights"] == adamw["weights"] - kernels + factors
    assert lora["gradients"] == lowrank["gradients"] == adamw["gradients"] - kernels + factors
    assert lora["moments"] == lowrank["moments"] == 4 * lora["gradients"]  # float32, two
    # The inputs of seven kernels: of each number a byte that says whether it is dropped, and more.
    inputs = ROWS * LENGTH * LAYERS * (6 * 64 + 96)
    assert with_dropout["activations"] - lora["activations"] >= inputs
    # The inputs are kept for the factors instead of the kernels, and the products with A are new.
    between = 7 * 2 * ROWS * LENGTH * LAYERS * 8
    assert lora["activations"] - adamw["activations"] == between


def test_the_script_predicts_for_several_optimizers(tmp_path, capsys):
    labels, file = ("adamw", "galore_adamw", "lora", "relora", "lowrank"), tmp_path / "all.json"
    run_script(tmp_path, tiny(), "--optimizers", ", ".join(labels), "--json", str(file))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["GiB", "of", "trained", *PARTS, "total"]
    assert [line.split()[0] for line in lines] == list(labels)
    figures = json.loads(file.read_text())
    assert figures["lora"] == figures["relora"] == predict(tiny(name="lora"))
    assert int(lines[2].split()[1].replace(",", "")) == figures["lora"]["gradients"] // 2
    with pytest.raises(SystemExit):
        run_script(tmp_path, tiny(), "--optimizers", "adamw", "mesh.fsdp=2")
    assert "--optimizers is for one device" in capsys.readouterr().err


def test_activations_are_fewer_with_remat_and_micro_batches_which_accumulate_in_float32():
    config = replace(tiny(name="adamw"), data=replace(tiny().data, batch_size=64))
    parts = predict(config)
    remat = predict(replace(config, model=replace(config.model, remat=True)))
    micro = predict(replace(config, training=replace(config.training, accumulation=8)))
    assert remat["activations"] < parts["activations"]
    assert micro["activations"] == pytest.approx(parts["activations"] / 8, rel=0.01)
    assert micro["gradients"] == 2 * parts["gradients"] == 2 * parts["weights"]


def test_activations_are_what_the_backward_pass_reads_of_the_forward_pass():
    config, size = tiny(), 4 * ROWS * LENGTH
    more_layers = replace(config, model=replace(config.model, num_layers=2 * LAYERS))
    wider = replace(config, model=replace(config.model, intermediate_size=2 * 96))
    larger = replace(config, model=replace(config.model, vocab_size=2 * 128))
    base = predict(config)["activations"]
    # The embedding's, the norm's and the logits' are kept once, the blocks' for every layer.
    blocks = predict(more_layers)["activations"] - base
    assert size * 64 * LAYERS < blocks < base
    # Of the logits, their exponentials and the comparison with the target, in float32 and bool.
    assert predict(larger)["activations"] - base in range(size * 128, 3 * size * 128)
    # Of gate, up, and what silu and the product keep, in bfloat16.
    assert predict(wider)["activations"] - base == 6 * ROWS * LENGTH * 2 * 96 * LAYERS


def test_the_arguments_of_the_compiled_steps_are_the_predicted_state_and_the_batch(run):
    known = sum(run.predicted[part] for part in ("weights", "bases", "moments"))
    batch = 4 * 4 * ROWS * LENGTH
    for name in set(run.programs) - {"start"}:
        figures = run.programs[name]
        assert 0 <= figures["arguments"] - known - batch <= COUNTERS
        assert 0 < figures["aliased"] <= figures["arguments"]
        assert figures["temporaries"] > 0
        gained = figures["outputs"] - figures["aliased"]
        assert figures["total"] == figures["arguments"] + gained + figures["temporaries"]


def test_the_start_makes_the_predicted_state_from_nothing(run):
    known = sum(run.predicted[part] for part in ("weights", "bases", "moments"))
    start = run.programs["start"]
    assert start["arguments"] == start["aliased"] == 0
    assert 0 <= start["outputs"] - known <= COUNTERS + POINTERS
    assert start["total"] == start["outputs"] + start["temporaries"]


def test_the_script_writes_the_prediction_and_all_programs(run):
    assert run.predicted == predict(tiny(**CHOICES[run.choice]))
    refreshes = ["refresh_step"] if run.choice != "adamw" else []
    assert [*run.programs] == ["train_step", *refreshes, "start"]
    assert all(set(figures) == FIGURES for figures in run.programs.values())


def test_the_script_prints_all_parts_and_draws_a_png(run):
    assert "compiling for a CPU" in run.errors
    assert all(word in run.printed for word in (*PARTS, *FIGURES, *run.programs, "%"))
    assert "not here" not in run.printed
    assert (run.folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"tiny.toml", "memory.json", "memory.png"}


@pytest.mark.parametrize("devices", [1, 4])
def test_the_figures_are_those_of_each_configured_device_however_many_there_are(tmp_path, devices):
    config = tiny(name="adamw")
    file, figures = tmp_path / "tiny.toml", tmp_path / "memory.json"
    file.write_text(to_toml(config))
    script, overrides = str(ROOT / "scripts" / "memory.py"), [f"data.batch_size={devices}"]
    if devices > 1:
        overrides.append(f"mesh.fsdp={devices}")
    options = ["--config", str(file), "--json", str(figures), *overrides]
    environment = eight_devices.environment() | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"compiling for {'a CPU' if devices == 1 else '4 CPUs'}" in run.stderr
    assert run.stdout.startswith("Of each of 4 devices:") == (devices > 1)
    here, whole = json.loads(figures.read_text()), predict(config)
    # Counters and the layers' norms are small, but for a tiny model they are not nothing.
    for part in ("weights", "moments"):
        mine = whole[part] / devices
        assert mine <= here["predicted"][part] <= 1.01 * mine
    known, batch = here["predicted"]["weights"] + here["predicted"]["moments"], 3 * 4 * LENGTH
    assert known + batch <= here["compiled"]["train_step"]["arguments"] <= known + batch + COUNTERS
    assert known <= here["compiled"]["start"]["outputs"] <= known + COUNTERS + POINTERS


@pytest.mark.parametrize(("rows", "compiled"), [(2, 18.84), (16, 20.10)])
def test_7b_layer_by_layer_is_predicted_within_5_percent_of_what_was_compiled_for_a_card(
    rows, compiled
):
    predicted = predict(load_config(SEVEN_B, [f"data.batch_size={rows}"]))
    assert predicted["total"] / 2**30 == pytest.approx(compiled, rel=0.05)


@pytest.mark.parametrize(("dtype", "saved"), [("bfloat16", 0.785), ("int8", 0.82)])
def test_the_optimizer_state_of_8_bit_galore_at_7b_is_a_fifth_of_bf16_adams(dtype, saved):
    config = load_config(SEVEN_B, [f"optimizer.basis_dtype={dtype}"])
    predicted, adam = predict(config), baselines(config)["BF16 Adam"]
    assert adam["moments"] == 2 * predicted["weights"]
    assert predicted["bases"] + predicted["moments"] <= (1 - saved) * adam["moments"]


def test_the_baselines_keep_all_activations_and_only_adam_all_gradients():
    config = load_config(SEVEN_B)
    others, here = baselines(config), predict(config)
    assert [*others][:2] == ["BF16 Adam", "8-bit Adam"]
    adam, adam8, galore = others.values()
    assert adam["total"] > adam8["total"] > galore["total"] > here["total"]
    assert adam["gradients"] == adam8["gradients"] == adam["weights"] > 20 * galore["gradients"]
    assert galore["moments"] == pytest.approx(here["moments"], rel=1e-3)
    assert galore["bases"] == here["bases"]


def test_the_gradient_of_a_tied_head_waits_for_that_of_the_embedding():
    config = tiny(name="galore_adamw8bit")
    tied = replace(config, model=replace(config.model, tie_embeddings=True))
    # The embedding's is larger than that of a layer, which has coordinates.
    assert predict(config)["gradients"] == 4 * 128 * 64
    assert predict(tied)["gradients"] == 2 * 4 * 128 * 64


def test_a_program_fits_what_jax_can_take_of_a_card_or_misses_some_gib():
    gib, sizes = 2**30, "the 19.0 GiB that JAX can take of the card's 20.0"
    assert memory.fit(14 * gib, 20 * gib) == f"It fits {sizes}: 5.0 are left."
    more = memory.fit(16 * gib, 20 * gib)
    assert more.startswith(f"It fits {sizes}: 3.0 are left.\nBut JAX takes only 75%")
    assert "XLA_CLIENT_MEM_FRACTION=0.95" in more
    assert memory.fit(int(19.5 * gib), 20 * gib) == f"It does not fit {sizes}: 0.5 are missing."


def test_the_largest_program_has_to_fit_the_card(tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def target(name, sizes):
        yield SimpleNamespace(mesh=None)

    card = compile_targets.TARGETS["rtx4090"]
    step, start = dict.fromkeys(FIGURES, 2**30), dict.fromkeys(FIGURES, card.memory)
    programs = {"train_step": step, "start": start}
    monkeypatch.setattr(compile_targets, "target", target)
    monkeypatch.setattr(training_memory, "compiled", lambda config, mesh: programs)
    run_script(tmp_path, tiny(), "--device", "rtx4090")
    assert "of the card's 24.0: 1.2 are missing." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "rtx9999"], "no device rtx9999: take one of cpu, a100, rtx4090, h100."),
        (["data.batchsize=4"], "data.batchsize is unknown; did you mean batch_size?"),
        (
            ["optimizer.implementation=pallas"],
            'optimizer.implementation = "pallas" needs an NVIDIA GPU',
        ),
        (["--json", "missing/memory.json"], "there is no folder missing for --json"),
        (["--picture", "missing/memory.png"], "there is no folder missing for --picture"),
        (["--picture", "memory.png", "mesh.fsdp=2"], "--picture compares optimizers on one device"),
    ],
)
def test_a_wrong_argument_ends_in_one_sentence(tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as end:
        run_script(tmp_path, tiny(), *arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert expected in message


def test_cards_that_cannot_divide_the_heads_end_in_one_sentence(tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def target(name, sizes):
        yield SimpleNamespace(mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)))

    monkeypatch.setattr(compile_targets, "target", target)
    with pytest.raises(SystemExit) as end:
        run_script(tmp_path, tiny(), "--device", "h100", "mesh.tensor=4")
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: mesh.tensor is 4, which does not divide model.num_heads, 2:")
