"""Kept results of comparisons: the table that the pages show."""

import json
import statistics

import pytest
from analysis.results import (
    cost_table,
    draw,
    read_memory,
    read_results,
    read_steps,
    spread,
    table,
    z_value,
)

from galore_jax.errors import InputError

ADAMW = [5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7]


def write(folder, label, losses, not_tuned=()):
    optimizer = {"learning_rate": 0.04, "matrix_rate": 0.25}
    row = {
        "optimizer": "of the configuration",
        "validation_loss": losses,
        "matrix_bytes": 2_510_000,
        "not_tuned": not_tuned,
        "config": {"optimizer": optimizer},
    }
    (folder / f"{label}.json").write_text(json.dumps({"seeds": [0], "rows": [row]}))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_z_against_the_baselines_with_the_spread_of_many_seeds(tmp_path):
    write(tmp_path, "adamw", ADAMW)
    write(tmp_path, "foam", [5.0, 5.0])
    header, _, foam, adamw, *rest = table(read_results(tmp_path)).splitlines()
    assert cells(header)[5] == "against adamw"
    # σ is the deviation of AdamW's eight losses; the error of the difference of means of 2 and 8
    # losses is σ √(1/2 + 1/8).
    sigma = statistics.stdev(ADAMW)
    z = (5.0 - 5.35) / (sigma * (5 / 8) ** 0.5)
    assert cells(foam) == [
        *("foam", "0.04", "0.25", "2", "5.0000"),
        *(f"{100 * (5 / 5.35 - 1):+.2f}%, z = {z:+.1f}", "2.51 MB"),
    ]
    assert cells(adamw)[4:6] == ["5.3500", ""]
    assert rest == ["", f"σ = {sigma:.4f}, from the 8 runs of settings with 8 seeds or more."]


def test_the_spread_is_pooled_over_settings_with_many_seeds(tmp_path):
    write(tmp_path, "adamw", ADAMW)
    write(tmp_path, "muon", [2 * loss for loss in ADAMW])
    write(tmp_path, "foam", [1.0, 9.0])
    sigma, runs = spread(read_results(tmp_path))
    variance = statistics.variance(ADAMW)
    assert (sigma, runs) == (pytest.approx(((variance + 4 * variance) / 2) ** 0.5), 16)


def test_z_of_a_mean_one_error_above_is_one(tmp_path):
    write(tmp_path, "adamw", [1.0] * 4)
    write(tmp_path, "muon", [3.0] * 4)
    adamw, muon = read_results(tmp_path)
    assert z_value(muon, adamw, sigma=2 * 2**0.5) == pytest.approx(1)


def test_without_many_seeds_there_is_no_z(tmp_path):
    write(tmp_path, "adamw", [5.0])
    write(tmp_path, "foam", [4.9], ["matrix rate"])
    text = table(read_results(tmp_path))
    assert "-2.00% |" in text
    assert "σ" not in text
    assert "\nfoam is not tuned: matrix rate" in text


def test_costs_are_columns_of_a_table_and_axes_of_the_picture(tmp_path):
    folder = tmp_path / "losses"
    folder.mkdir()
    for label, losses in {"adamw": ADAMW, "foam": [5.0], "untimed": [5.1]}.items():
        write(folder, label, losses)
    steps, estimates, memory = (
        tmp_path / f"{name}.json" for name in ("step", "step_7b", "memory_1b")
    )
    for path, key in ((steps, "with_refreshes"), (estimates, "ms_ratio")):
        rows = [{"name": "adamw", key: 1.0, "bytes": 8}, {"name": "foam", key: 0.5, "bytes": 1}]
        path.write_text(json.dumps({"rows": [*rows, {"name": "a product", "ms": 3}]}))
    programs = {"train_step": {"total": 2**30}, "start": {"total": 3 * 2**29}}
    memory.write_text(json.dumps({"foam": {"programs": programs}}))
    costs = [read_steps(steps), read_steps(estimates), read_memory(memory)]
    entries = read_results(folder)
    header, _, *lines = map(cells, cost_table(entries, costs).splitlines())
    assert header[2:] == ["step", "step 7b", "memory 1b, GiB"]
    assert {line[0]: line[2:] for line in lines} == {
        "foam": ["0.50", "0.50", "1.50"],
        "adamw": ["1.00", "1.00", ""],
        "untimed": ["", "", ""],
    }
    pytest.importorskip("matplotlib")
    draw(entries, costs, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_are_missing_diverged_or_of_the_same_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="there are no results in"):
        read_results(tmp_path)
    write(tmp_path, "foam", [])
    with pytest.raises(InputError, match="foam diverged"):
        read_results(tmp_path)
    write(tmp_path, "foam", [5.0])
    rows = 2 * json.loads((tmp_path / "foam.json").read_text())["rows"]
    (tmp_path / "more.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(InputError, match="another row is called of the configuration"):
        read_results(tmp_path)
