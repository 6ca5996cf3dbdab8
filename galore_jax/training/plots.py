"""Plots of one or several runs: training loss, validation loss and learning rate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from galore_jax.errors import InputError
from galore_jax.files import atomic_write
from galore_jax.training.metrics import read_metrics, read_summary
from galore_jax.training.run_folder import RunFolder

# Okabe and Ito's palette, suitable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# Fractions of a curve: the window of its running mean, and the steep start that is cut off.
SMOOTHED_PART = 0.02
STEEP_PART = 0.04


def plot_curves(folders: Sequence[str | Path], picture: str | Path) -> None:
    """Draws the runs into one PNG; without matplotlib it prints that it does not.

    The upper plot has each run's training loss (smoothed, and faintly that of single steps), its
    validation losses as points and, if there is one, the bigram model's loss as a dashed line; the
    steep start is cut off at the top. The lower plot has the learning rate.

    Raises:
      InputError: a folder holds no steps of a run.
    """
    runs = {name: RunFolder(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    lines = {name: read_metrics(run.metrics) for name, run in runs.items()}
    for name, run in runs.items():
        if not any("loss" in line for line in lines[name]):
            raise InputError(f"there is no run to plot in {run.path}: give the folder of a run.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f'{picture} is not drawn, it needs matplotlib: pip install "galore-jax[plots]"')
        return

    # The curves.
    figure = Figure(figsize=(9, 6.2), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    lowest, highest, bigrams = [], [], {}
    for number, (name, run) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        step, loss, rate = _columns(lines[name], "step", "loss", "learning_rate")
        points, validation = _columns(lines[name], "step", "validation_loss")
        smooth = _smoothed(loss)
        label = f"{name}, validation {validation[-1]:.3f}" if validation.size else name
        above.plot(step, loss, color=colour, alpha=0.18, linewidth=0.7)
        above.plot(step, smooth, color=colour, linewidth=1.6, label=label)
        above.plot(points, validation, "o", color=colour, markersize=5.5, markeredgecolor="white")
        below.plot(step, rate, color=colour, linewidth=1.6)
        lowest += [np.nanmin(smooth), *validation]
        highest.append(smooth[int(STEEP_PART * smooth.size)])
        if run.summary.exists() and (bigram := read_summary(run).bigram_loss) is not None:
            bigrams[bigram] = colour
    for bigram, colour in bigrams.items():
        above.axhline(
            bigram,
            color=colour if len(bigrams) > 1 else "#444444",
            linestyle=(0, (5, 3)),
            linewidth=1.2,
            label=f"bigram model of the same tokens, {bigram:.3f}",
        )
        lowest.append(bigram)
        highest.append(bigram)

    # Limits, labels and style.
    bottom, top = np.nanmin(lowest), np.nanmax(highest)
    if np.isfinite(top - bottom) and top > bottom:
        above.set_ylim(bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom))
    above.plot([], [], "o", color="#666666", markersize=5.5, label="validation")
    above.set_ylabel("loss per token (nats)")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    below.margins(x=0.01)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    above.legend(frameon=False)
    figure.align_ylabels()
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(picture) as path:
        FigureCanvasAgg(figure).print_png(path)


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
