"""Bytes of a training: its state by part, its compiled programs, and scripts/memory.py."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eight_devices
import jax
import memory
import optax
import pytest
from analysis import compile_targets
from analysis.memory import DoesNotFit, compile_fitting, state_parts
from jax.sharding import AbstractMesh

from galore_jax.errors import InputError
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.training.config import Config
from galore_jax.training.config_file import load_config, to_toml
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state, tree_bytes

ROOT = Path(__file__).parent.parent
FIGURES = {"arguments", "outputs", "aliased", "temporaries", "total"}
LAYERS, ROWS, LENGTH = 2, 2, 16
# Of 7 bases: six counters and an overlap a layer, a scale and an interval; counts, step and norm.
COUNTERS = 7 * (7 * 4 * LAYERS + 2 * 4) + 64
# To the results of a program: at most 128 arrays.
POINTERS = 8 * 128


def tiny(**optimizer) -> Config:
    """A small model; the moments in 8 bits go with the layer-wise step."""
    layerwise = optimizer.get("name", "").endswith("8bit")
    return Config(
        **{
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
            "optimizer": {"galore": {"rank": 8}, "lora": {"rank": 8}, **optimizer},
            "training": {"layerwise": layerwise},
        }
    )


def run_script(folder: Path, config: Config, *arguments: str) -> None:
    file = folder / "tiny.toml"
    file.write_text(to_toml(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["memory.py", "--config", str(file), *arguments])
        memory.main()


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"name": "adamw"},
        {"name": "galore_adafactor"},
        {"name": "galore_adamw8bit", "galore": {"rank": 8, "basis_dtype": "int4"}},
    ],
    ids=lambda optimizer: optimizer.get("name", "galore"),
)
def test_weights_bases_and_moments_are_all_of_the_state_but_its_counters(optimizer):
    config = tiny(**optimizer)
    parts, state = state_parts(config), init_state(Pretraining(config))
    bases = bases_of(galore_states(state.opt_state, inside_chains=True))
    assert parts["weights"] == tree_bytes(state.params)
    assert parts["bases"] == tree_bytes([basis.vectors for basis in bases])
    assert 0 <= tree_bytes(state) - sum(parts.values()) <= COUNTERS
    if "adafactor" not in config.optimizer.name:
        moments = [optax.tree.get(state.opt_state, name) for name in ("mu", "nu")]
        assert parts["moments"] == tree_bytes(moments)


@pytest.mark.parametrize(("dtype", "saved"), [("bfloat16", 0.785), ("int8", 0.82), ("int4", 0.84)])
def test_the_optimizer_state_of_8_bit_galore_at_7b_is_a_fifth_of_bf16_adams(dtype, saved):
    file = ROOT / "configs" / "llama_7b_24gb.toml"
    parts = state_parts(load_config(file, [f"optimizer.galore.basis_dtype={dtype}"]))
    assert parts["bases"] + parts["moments"] <= (1 - saved) * 2 * parts["weights"]


@pytest.mark.parametrize(("card", "gib"), [("12gb", 8.76), ("16gb", 9.20)])
def test_weights_and_state_of_7b_leave_a_quarter_of_a_small_card(card, gib):
    parts = state_parts(load_config(ROOT / "configs" / f"llama_7b_{card}.toml"))
    assert parts["weights"] / 2**30 == pytest.approx(6.28, abs=0.005)
    assert sum(parts.values()) / 2**30 == pytest.approx(gib, abs=0.005)


@pytest.mark.slow
def test_the_script_compiles_for_each_optimizer(tmp_path, capsys):
    labels, file = ("adamw", "galore_adamw"), tmp_path / "all.json"
    run_script(tmp_path, tiny(), "--optimizers", ", ".join(labels), "--json", str(file))
    printed = capsys.readouterr()
    header, *lines = printed.out.splitlines()
    columns = "GiB of trained weights bases moments temporaries step refresh start"
    assert header.split() == columns.split()
    assert [line.split()[0] for line in lines[:2]] == list(labels)
    assert lines[0].split()[-2] == "-"  # AdamW has nothing to refresh
    assert "A GPU needs less" in printed.out
    assert "compiling for a CPU" in printed.err

    figures = json.loads(file.read_text())
    assert [*figures["adamw"]["programs"]] == ["train_step", "start"]
    assert [*figures["galore_adamw"]["programs"]] == ["train_step", "refresh_step", "start"]
    for label, row in figures.items():
        state = state_parts(tiny(name=label))
        assert {part: row[part] for part in state} == state
        known, batch = sum(state.values()), 4 * 4 * ROWS * LENGTH
        for name, parts in row["programs"].items():
            assert set(parts) == FIGURES
            gained = parts["outputs"] - parts["aliased"]
            assert parts["total"] == parts["arguments"] + gained + parts["temporaries"]
            if name == "start":
                assert parts["arguments"] == 4  # the seed
                assert parts["aliased"] == 0
                assert 0 <= parts["outputs"] - known <= COUNTERS + POINTERS
            else:
                assert 0 <= parts["arguments"] - known - batch <= COUNTERS
                assert 0 < parts["aliased"] <= parts["arguments"]
                assert parts["temporaries"] > 0


@pytest.mark.slow
def test_on_a_mesh_the_figures_are_those_of_each_device(tmp_path):
    config = tiny(name="adamw")
    file, written = tmp_path / "tiny.toml", tmp_path / "memory.json"
    file.write_text(to_toml(config))
    script = str(ROOT / "scripts" / "memory.py")
    options = ["--config", str(file), "--json", str(written), "data.batch_size=4", "mesh.fsdp=4"]
    environment = eight_devices.environment() | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "those of each device" in run.stdout
    assert "Compiled for 4 CPUs." in run.stdout
    here, whole = json.loads(written.read_text())["adamw"], state_parts(config)
    # Counters and the layers' norms are small, but for a tiny model they are not nothing.
    for part in ("weights", "moments"):
        assert whole[part] / 4 <= here[part] <= 1.01 * whole[part] / 4
    known, batch = here["weights"] + here["moments"], 3 * 4 * LENGTH
    assert known + batch <= here["programs"]["train_step"]["arguments"] <= known + batch + COUNTERS


def test_a_program_fits_what_jax_can_take_of_a_device_or_misses_some_gib():
    gib, sizes = 2**30, "the 19.0 GiB that JAX can take of the device's 20.0"
    card = dataclasses.replace(compile_targets.TARGETS["h100"], memory=20 * gib)
    assert memory.verdict(14 * gib, card) == f"it fits {sizes}: 5.0 are left."
    more = memory.verdict(16 * gib, card)
    assert more.startswith(f"it fits {sizes}: 3.0 are left.\nBut JAX takes only 75%")
    assert "XLA_CLIENT_MEM_FRACTION=0.95" in more
    sentence = f"it needs 19.5 GiB and does not fit {sizes}: 0.5 are missing."
    assert memory.verdict(int(19.5 * gib), card) == sentence
    # A TPU's compiler gives a program all that there is.
    assert memory.verdict(15 * gib, compile_targets.TARGETS["v5e"]).endswith("16.0: 0.8 are left.")


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded hbm capacity",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (22.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_a_program_that_a_compiler_refuses_names_the_bytes_that_it_needs(message):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_fitting(Lowered())
    message = f"RESOURCE_EXHAUSTED: {message}"
    with pytest.raises(DoesNotFit, match=r"needs 22\.5 GiB") as refused:
        compile_fitting(Lowered())
    assert refused.value.needed == 22.5 * 2**30
    row = {"weights": 1, "bases": 2, "moments": 3, "trained": 4}
    row["programs"] = {"train_step": {"total": refused.value.needed}}
    assert memory.table({"adamw": row}).split()[-4:] == ["-", "22.500", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model.vocab_size=2000000", "data.batch_size=2000000000"], "XLA cannot compile"),
        (["--device", "rtx9999"], "--device = 'rtx9999' is unknown; "),
    ],
)
def test_a_wrong_argument_is_said_in_a_sentence(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        run_script(tmp_path, tiny(), *arguments)


def test_cards_that_cannot_divide_the_heads_are_refused(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def target(name, sizes):
        yield SimpleNamespace(mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)))

    monkeypatch.setattr(compile_targets, "target", target)
    sentence = "mesh.tensor is 4, which does not divide the model's num_heads, 2:"
    with pytest.raises(InputError, match=sentence):
        run_script(tmp_path, tiny(), "--device", "h100", "mesh.tensor=4")
