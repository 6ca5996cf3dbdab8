import json
import math
import sys

import numpy as np
import pytest

from galore_jax.errors import InputError
from galore_jax.training.metrics import (
    Metrics,
    format_bytes,
    read_metrics,
)
from galore_jax.training.plots import plot_curves
from galore_jax.training.run_folder import RunFolder


def opened(run, start=0):
    """The metrics of a run of 9 steps, without its bar."""
    metrics = Metrics(run.metrics, start, 9, "tokens")
    metrics.__exit__()
    return metrics


def a_run(folder, steps=30):
    """A folder with metrics as a training leaves them."""
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    metrics = opened(run)
    for step in range(steps):
        metrics.write([{"step": step, "loss": 5 - step / steps, "learning_rate": 0.01}])
    metrics.write([{"step": steps, "validation_loss": 4.1}])
    return run


def test_opening_at_a_step_drops_what_a_killed_run_left_after_it(tmp_path):
    run = a_run(tmp_path / "run")
    with run.metrics.open("a") as file:
        file.write('{"step": 31, "lo')
    metrics = opened(run, 30)
    assert [line["step"] for line in metrics.lines] == list(range(31))
    metrics = opened(run, 10)
    assert [line["step"] for line in metrics.lines] == list(range(10))
    assert read_metrics(run.metrics) == metrics.lines
    assert [path.name for path in run.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("half", [b'{"step": 31, "lo', b"\0" * 100, b"\xc3", b"\0\0\n"])
def test_a_last_line_cut_by_a_power_failure_is_left_out_and_repaired_on_opening(tmp_path, half):
    run = a_run(tmp_path / "run", steps=3)
    complete = run.metrics.read_bytes()
    run.metrics.write_bytes(complete + half)
    assert [line["step"] for line in read_metrics(run.metrics)] == [0, 1, 2, 3]
    opened(run, 3).write([{"step": 3, "loss": 1.0}])
    assert run.metrics.read_bytes() == complete + b'{"step": 3, "loss": 1.0}\n'


@pytest.mark.parametrize(
    "line",
    [b"\0\0\0", b"\xff", b'{"step": 1, "lo{"step": 2}', b"[1]", b'{"loss": 1.0}', b"[" * 100_000],
)
def test_a_damaged_line_in_the_middle_is_refused_by_file_and_number(tmp_path, line):
    run = a_run(tmp_path / "run", steps=3)
    before = run.metrics.read_bytes().splitlines()
    before[1] = line
    run.metrics.write_bytes(b"\n".join(before) + b"\n")
    for read in (lambda: opened(run, 3), lambda: read_metrics(run.metrics)):
        with pytest.raises(
            InputError, match=r"metrics\.jsonl, line 2 is damaged: delete this line"
        ):
            read()
    assert run.metrics.read_bytes() == b"\n".join(before) + b"\n"


def test_an_evaluation_after_the_restored_step_is_kept(tmp_path):
    run = RunFolder(tmp_path)
    lines = [{"step": 9, "loss": 1.0}, {"step": 10, "validation_loss": 1.0}]
    opened(run).write([*lines, {"step": 10, "loss": 0.9}])
    assert opened(run, 10).lines == lines


def test_a_loss_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    run = RunFolder(tmp_path)
    opened(run).write([{"step": 0, "loss": math.nan}])
    assert json.loads(run.metrics.read_text()) == {"step": 0, "loss": None}
    assert math.isnan(read_metrics(run.metrics)[0]["loss"])


def measured(loss=1.0, **others):
    numbers = {"loss": loss, "learning_rate": 0.1, "gradient_norm": 1.0, "targets": 9.0, **others}
    return {name: np.asarray(number) for name, number in numbers.items()}


def test_each_kind_of_bad_step_is_reported_once(tmp_path, capsys):
    run = RunFolder(tmp_path)
    opened(run).write([{"step": 0, "loss": 1.0, "skipped": 3}])
    with Metrics(run.metrics, 1, 9, "tokens") as progress:
        progress.add(1, measured(skipped=3))
        progress.add(2, measured(skipped=5))
        progress.add(3, measured(loss=math.nan, skipped=6))
        progress.add(4, measured(skipped=6))
        progress.report()
        progress.add(5, measured(loss=math.inf, skipped=7, targets=0.0))
        progress.report()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3
    assert "the gradients of some matrices at step 2 are not finite" in warnings[0]
    assert "the loss at step 3 is not finite" in warnings[1]
    assert "the batch of step 5 has no targets, since no two tokens are" in warnings[2]
    assert [line["skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")][1:] == [
        *(3, 5, 6, 6, 7)
    ]


def test_a_gap_in_the_metrics_of_a_resumed_run_is_reported(tmp_path, capsys):
    run = RunFolder(tmp_path)
    metrics = opened(run)
    metrics.write([{"step": step, "loss": 1.0} for step in (0, 1, 4)])
    metrics.write([{"step": 2, "validation_loss": 1.0}])
    for start, sentence in ((5, "metrics.jsonl lacks 2 of the 5 steps before"), (2, "")):
        opened(run, start)
        printed = capsys.readouterr().err
        assert printed.count("warning") == bool(sentence)
        assert sentence in printed


def test_a_line_has_exactly_the_metrics_of_its_step(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", 0, 1, "tokens") as metrics:
        metrics.add(0, measured(skipped=2))
        metrics.report()
    names = ["step", *measured(), "skipped", "tokens_per_second", "seconds"]
    assert list(metrics.lines[0]) == names


def test_bytes_are_formatted_in_powers_of_ten():
    sizes = [999.4, 999.5, 1_500, 2_600_000, 999_499_999, 999_500_000, 24_310_000_000]
    expected = ["999 B", "1 kB", "1.5 kB", "2.6 MB", "999 MB", "1.00 GB", "24.31 GB"]
    assert [format_bytes(size) for size in sizes] == expected


def test_several_runs_are_drawn_into_one_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    folders = [a_run(tmp_path / "a" / "run").path, a_run(tmp_path / "b" / "run", steps=1).path]
    plot_curves(folders, tmp_path / "both.png")
    pixels = image.imread(tmp_path / "both.png")
    assert pixels.shape[:2] == (806, 1170)
    # Each run's colour is there, in lines of some length: blue, then vermilion.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        near = np.abs(pixels[..., :3] - np.array(colour) / 255).max(-1) < 0.02
        assert near.sum() > 50


def test_a_run_without_a_finite_loss_is_drawn_without_a_warning(tmp_path):
    run = a_run(tmp_path / "run")
    opened(run).write([{"step": n, "loss": math.nan, "learning_rate": 0.1} for n in range(3)])
    plot_curves([run.path], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_a_folder_without_a_run_is_not_drawn(tmp_path):
    with pytest.raises(InputError, match="there is no run to plot in"):
        plot_curves([tmp_path], tmp_path / "none.png")
    with pytest.raises(InputError, match=r"name it .*none\.png"):
        plot_curves([tmp_path], tmp_path / "none.pdf")


def test_without_matplotlib_a_line_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_curves([a_run(tmp_path / "run").path], tmp_path / "curves.png")
    assert 'pip install "galore-jax[plots]"' in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
