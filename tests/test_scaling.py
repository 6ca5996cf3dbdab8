"""scripts/scaling.py: what it prints, and the claims about communication and memory."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scaling
from analysis import step_cost
from analysis.memory import DoesNotFit

from galore_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "scaling.py"

LAYERS, HIDDEN, FFN, VOCABULARY, RANK = 2, 64, 128, 256, 16
TINY = [
    *(f"model.{name}={value}" for name, value in {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_heads": 2,
        "vocab_size": VOCABULARY, "max_length": 16,
    }.items()),
    "data.sequence_length=16", "data.batch_size=32", f"optimizer.galore.rank={RANK}",
]  # fmt: skip
NORMS = (2 * LAYERS + 1) * HIDDEN
UNPROJECTED = 2 * VOCABULARY * HIDDEN + NORMS
PROJECTED = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
COORDINATES = LAYERS * RANK * (4 * HIDDEN + 3 * FFN)
BASES = LAYERS * RANK * 7 * HIDDEN
# Of losses, targets and norms.
SCALARS = 64


def run(folder: Path, *arguments: str) -> tuple[str, list[dict]]:
    """What the script prints, and the figures it writes."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    figures = folder / "figures.json"
    command = [sys.executable, "-W", "error", str(SCRIPT), "--json", str(figures), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(figures.read_text())


def report(folder: Path, *arguments: str) -> tuple[str, dict]:
    """The report of a tiny model: its text, and its figures by layout, optimizer and devices."""
    printed, rows = run(folder, "--models", "350m", "--rows", "4", *arguments, *TINY)
    return printed, {(row["layout"], row["optimizer"], row["devices"]): row for row in rows}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The report of all optimizers and layouts, and its folder."""
    folder = tmp_path_factory.mktemp("scaling")
    picture = ["--picture", str(folder / "scaling.png")]
    return *report(folder, "--devices", "4", *picture), folder


@pytest.mark.slow
def test_each_case_has_a_line_and_the_picture_is_drawn(complete):
    printed, costs, folder = complete
    names = ("adamw", "contrib", "full", "projected")
    cases = {(layout, name) for layout in ("data", "fsdp") for name in names} | {("data", "over")}
    assert {(layout, name) for layout, name, devices in costs if devices == 4} == cases
    lines = [line.split() for line in printed.splitlines()]
    assert sum(line[:1] == ["projected"] and len(line) == 13 for line in lines) == 2
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_data_parallel_reduces_float32_gradients_or_coordinates_once(complete):
    _, costs, _ = complete
    full = 4 * (UNPROJECTED + PROJECTED)
    assert full <= costs["data", "adamw", 4]["payload"]["all-reduce"] <= full + SCALARS
    low_rank = 4 * (UNPROJECTED + COORDINATES)
    sent = costs["data", "projected", 4]
    assert low_rank <= sent["payload"]["all-reduce"] <= low_rank + SCALARS
    # A device sends 3/4 of it twice, and nothing leaves the node.
    assert 2 * 3 * low_rank <= 4 * sent["inside"] <= 2 * 3 * (low_rank + SCALARS)
    assert sent["between"] == 0


@pytest.mark.slow
def test_a_refresh_moves_coordinates_and_columns_more(complete):
    _, costs, _ = complete
    more = costs["data", "projected", 4]["refresh"]
    assert 4 * (COORDINATES + BASES) <= more["all-reduce"] <= 1.01 * 4 * (COORDINATES + BASES)
    assert costs["data", "adamw", 4]["refresh"] == dict.fromkeys(more, 0)


@pytest.mark.slow
def test_moments_over_data_are_divided(complete):
    _, costs, _ = complete
    whole, cut = costs["data", "projected", 4]["moments"], costs["data", "over", 4]["moments"]
    assert cut <= 1.01 * whole / 4


@pytest.mark.slow
def test_data_parallel_over_8_devices_reduces_less_than_a_third_of_adamws_bytes_at_7b(tmp_path):
    options = ["--layouts", "data", "--devices", "8", "--optimizers", "adamw,projected"]
    _, rows = run(tmp_path, "--models", "7b", *options)
    reduced = {row["optimizer"]: row["payload"]["all-reduce"] for row in rows}
    assert reduced["projected"] <= 0.30 * reduced["adamw"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "3"], "--devices 3 is not a power of two"),
        (["--optimizers", "adamv"], "--optimizers = 'adamv' is unknown; did you mean adamw"),
        (["optimizer.name=adamw"], "optimizer.name=adamw: the options choose this, see --help"),
        (["--tflops", "nan"], "--tflops = nan is not above 0"),
    ],
)
def test_a_wrong_argument_is_said_in_a_sentence(monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    with pytest.raises(InputError, match=sentence):
        scaling.main()


def test_what_does_not_fit_a_device_is_said_in_a_sentence(monkeypatch, capsys):
    def refused(*arguments):
        raise DoesNotFit(int(22.5 * 2**30))

    monkeypatch.setattr(step_cost, "step_cost", refused)
    monkeypatch.setattr(scaling, "mesh_for", lambda case, device: contextlib.nullcontext())
    options = ["--models", "350m", "--layouts", "data", "--devices", "1", "--optimizers", "adamw"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options, "--device", "v5e", *TINY])
    scaling.main()
    printed = capsys.readouterr().out
    assert printed.strip() == "350m data 1 adamw: it does not fit the device: it needs 22.5 GiB."
