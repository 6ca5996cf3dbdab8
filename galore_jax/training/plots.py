"""Curves of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.errors import InputError
from galore_jax.files import atomic_write
from galore_jax.training.metrics import read_metrics
from galore_jax.training.run_folder import RunFolder

# Okabe and Ito's palette, suitable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# Line styles, for more runs than colours.
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
# Fractions of a curve: the window of its running mean, and the steep start that is cut off.
SMOOTHED_PART = 0.02
STEEP_PART = 0.04


def plot_curves(
    folders: Sequence[str | Path], picture: str | Path, names: Sequence[str] | None = None
) -> None:
    """Draws the runs into one PNG; without matplotlib it only prints a hint.

    The upper plot has each run's training loss (smoothed, with that of single steps in a pale line)
    and its validation losses as points; the steep start is cut off at the top. The lower plot has
    the learning rate.

    Args:
      folders: the folders of the runs.
      picture: the PNG to write.
      names: of the runs in the legend. None: the folders.

    Raises:
      InputError: a folder holds no steps of a run, or the picture has another suffix than .png.
    """
    if Path(picture).suffix != ".png":
        raise InputError(f"the picture is a PNG: name it {Path(picture).with_suffix('.png')}.")
    names = names or [str(folder) for folder in folders]
    runs = {name: RunFolder(folder) for name, folder in zip(names, folders, strict=True)}
    lines = {name: read_metrics(run.metrics) for name, run in runs.items()}
    for name, run in runs.items():
        if not any("loss" in line for line in lines[name]):
            raise InputError(f"there is no run to plot in {run.path}: give the folder of a run.")
    try:
        figure = new_figure((9, 6.2))
    except ModuleNotFoundError:
        print(f'{picture} is not drawn, it needs matplotlib: pip install "galore-jax[plots]"')
        return

    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    lowest, highest = [], []
    for number, name in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        line: Any = LINES[number // len(COLOURS) % len(LINES)]
        step, loss, rate = _columns(lines[name], "step", "loss", "learning_rate")
        points, validation = _columns(lines[name], "step", "validation_loss")
        smooth = _smoothed(loss)
        label = f"{name}, validation {validation[-1]:.3f}" if validation.size else name
        above.plot(step, loss, color=colour, alpha=0.18, linewidth=0.7)
        above.plot(step, smooth, color=colour, linestyle=line, linewidth=1.6, label=label)
        above.plot(points, validation, "o", color=colour, markersize=5.5, markeredgecolor="white")
        below.plot(step, rate, color=colour, linestyle=line, linewidth=1.6)
        lowest += [*smooth, *validation]
        highest.append(smooth[int(STEEP_PART * smooth.size)])

    finite = lambda values: [value for value in values if np.isfinite(value)]
    bottom, top = min(finite(lowest), default=0.0), max(finite(highest), default=0.0)
    if top > bottom:
        above.set_ylim(bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom))
    above.plot([], [], "o", color="#666666", markersize=5.5, label="validation")
    above.set_ylabel("loss per token (nats)")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    below.margins(x=0.01)
    above.legend(frameon=False)
    figure.align_ylabels()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    write_png(figure, picture)


def new_figure(figsize: tuple[float, float]) -> Any:
    """An empty matplotlib figure of a width and height in inches, to be written by `write_png`.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, picture: str | Path) -> None:
    """Writes a figure of `new_figure` to a PNG that appears complete or not at all."""
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(picture) as path:
        figure.canvas.print_png(path)


def _columns(lines: Sequence[dict], *names: str) -> list[np.ndarray]:
    """One array per name, from the lines that have all of them."""
    rows = [[line[name] for name in names] for line in lines if all(name in line for name in names)]
    return list(np.array(rows, np.float64).reshape(-1, len(names)).T)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred running mean, over a shorter window at the ends."""
    window = np.ones(2 * int(SMOOTHED_PART * values.size / 2) + 1)
    weight = np.convolve(np.ones(values.size), window, mode="same")
    return np.convolve(values, window, mode="same") / weight
