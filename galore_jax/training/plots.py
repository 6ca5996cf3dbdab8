"""Plots of runs: curves, and losses against the size of the optimizer's state."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.errors import InputError
from galore_jax.files import atomic_write
from galore_jax.training.metrics import format_bytes, read_metrics
from galore_jax.training.run_folder import RunFolder

# Okabe and Ito's palette, suitable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# Line styles, for more runs than colours.
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
# Fractions of a curve: the window of its running mean, and the steep start that is cut off.
SMOOTHED_PART = 0.02
STEEP_PART = 0.04
# Positions of a label, in points from its point, with its alignment; the best one first.
_OFFSETS = tuple(
    ((side * distance, height), "left" if side > 0 else "right")
    for height in (0, 9, -9, 18, -18, 27, -27)
    for side, distance in ((1, 8), (-1, 8))
)


def plot_curves(
    folders: Sequence[str | Path],
    picture: str | Path,
    names: Sequence[str] | None = None,
) -> None:
    """Draws the runs into one PNG; without matplotlib it only prints a hint.

    The upper plot has each run's training loss (smoothed, with that of single steps in a pale line)
    and its validation losses as points; the steep start is cut off at the top. The lower plot has
    the learning rate.

    Args:
      folders: the folders of the runs.
      picture: the PNG to write.
      names: of the runs in the legend. None: those of the folders.

    Raises:
      InputError: a folder holds no steps of a run, or the picture has another suffix than .png.
    """
    if Path(picture).suffix != ".png":
        raise InputError(f"the picture is a PNG: name it {Path(picture).with_suffix('.png')}.")
    names = names or _names(folders)
    runs = {name: RunFolder(folder) for name, folder in zip(names, folders, strict=True)}
    lines = {name: read_metrics(run.metrics) for name, run in runs.items()}
    for name, run in runs.items():
        if not any("loss" in line for line in lines[name]):
            raise InputError(f"there is no run to plot in {run.path}: give the folder of a run.")
    figure = _figure(picture, figsize=(9, 6.2))
    if figure is None:
        return

    # The curves.
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

    # Limits, labels and style.
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
    _write(figure, picture)


def plot_loss_by_bytes(
    optimizers: Mapping[str, tuple[float, Sequence[float]]], picture: str | Path
) -> None:
    """Draws a labelled point for each optimizer: its loss against the bytes of its state.

    The point is at the mean loss, with a line from the lowest to the highest. Without matplotlib it
    only prints a hint.

    Args:
      optimizers: for each label the bytes and the losses.
      picture: the PNG to write.
    """
    figure = _figure(picture, figsize=(9, 5.4))
    if figure is None:
        return
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.subplots()
    axes.set_xscale("log")
    points = []
    for number, (label, (size, losses)) in enumerate(optimizers.items()):
        mean = statistics.mean(losses)
        if np.isfinite(mean):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([size] * 2, [min(losses), max(losses)], color=colour, linewidth=1.4)
            axes.plot(size, mean, "o", color=colour, markersize=7, markeredgecolor="white")
            points.append((label, size, mean, colour))
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel("bytes of the optimizer's state for the matrices of the blocks, bases included")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("validation loss per token (nats)")
    _add_labels(axes, points)
    _write(figure, picture)


def _add_labels(axes: Any, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes each point's label next to it, inside the axes, where it overlaps nothing."""
    axes.figure.draw_without_rendering()  # It determines where the points are.
    places = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    covered = []
    for (label, x, y, colour), own in zip(points, places, strict=True):
        style = {"xytext": (0, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
        text = axes.annotate(label, (x, y), color=colour, **style)
        others = [place for place in places if place is not own]
        for offset, align in _OFFSETS:
            text.set(position=offset, ha=align)
            box = text.get_window_extent()
            is_inside = all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            covers_label = any(box.overlaps(other) for other in covered)
            covers_point = any(box.padded(6).contains(*place) for place in others)
            if is_inside and not covers_label and not covers_point:
                break
        covered.append(box)


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


def _figure(picture: str | Path, figsize: tuple[float, float]) -> Any:
    """An empty figure, or None without matplotlib."""
    try:
        return new_figure(figsize)
    except ModuleNotFoundError:
        print(f'{picture} is not drawn, it needs matplotlib: pip install "galore-jax[plots]"')
        return None


def _write(figure: Any, picture: str | Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    write_png(figure, picture)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, or their paths if two folders have the same name."""
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _columns(lines: Sequence[dict], *names: str) -> list[np.ndarray]:
    """One array per name, from the lines that have all of them."""
    rows = [[line[name] for name in names] for line in lines if all(name in line for name in names)]
    return list(np.array(rows, np.float64).reshape(-1, len(names)).T)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred running mean, over a shorter window at the ends."""
    window = np.ones(2 * int(SMOOTHED_PART * values.size / 2) + 1)
    weight = np.convolve(np.ones(values.size), window, mode="same")
    return np.convolve(values, window, mode="same") / weight
