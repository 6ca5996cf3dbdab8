"""Kept results of comparisons: what compare.py writes as comparison.json, read again as one table.

A difference counts only if it is larger than what another seed would make. The spread σ of one
setting is measured with many seeds; a row's mean of n losses then has the standard error σ / √n,
and z is its distance from that of a baseline, in standard errors of the difference.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.markdown import markdown_table
from galore_jax.errors import InputError
from galore_jax.files import read_json
from galore_jax.training.metrics import format_bytes
from galore_jax.training.plots import COLOURS, new_figure, write_png

# The fewest seeds from which σ is estimated.
MANY = 8
# Losses that are higher than the lowest by more than this share are not drawn, only named.
DRAWN = 0.03
BASELINES = ("adamw", "muon")
BEFORE = ("optimizer", "learning rate", "matrix rate", "seeds", "validation loss")
GIB = 2**30


@dataclass(frozen=True)
class Entry:
    """One optimizer's row of a comparison, of which no run diverged.

    Attributes:
      label: the name of its file, or in a file with several rows that of the optimizer.
      losses: the final validation loss of each seed, in nats.
      matrix_bytes: of its state for the matrices.
      optimizer: the section `[optimizer]` of its runs.
      not_tuned: rates whose best value was at the end of the grid.
    """

    label: str
    losses: Sequence[float]
    matrix_bytes: int
    optimizer: dict[str, Any]
    not_tuned: Sequence[str]

    @property
    def mean(self) -> float:
        """Of the losses."""
        return statistics.mean(self.losses)


@dataclass(frozen=True)
class Cost:
    """What optimizers cost beside the loss.

    Attributes:
      name: of the column of the table and of the axis of the picture.
      values: by the label of an optimizer.
    """

    name: str
    values: Mapping[str, float]


def read_steps(path: Path) -> Cost:
    """The time of a step relative to AdamW's: with its share of the refreshes, or estimated."""
    rows = read_json(path)["rows"]
    ratios = {row["name"]: row.get("with_refreshes", row.get("ms_ratio")) for row in rows}
    return Cost(_spoken(path), {name: ratio for name, ratio in ratios.items() if ratio})


def read_memory(path: Path) -> Cost:
    """The memory of the largest program of a training."""
    largest = {
        label: max(program["total"] for program in row["programs"].values())
        for label, row in read_json(path).items()
    }
    return Cost(f"{_spoken(path)}, GiB", {label: size / GIB for label, size in largest.items()})


def _spoken(path: Path) -> str:
    return path.stem.replace("_", " ")


def read_results(folder: Path) -> list[Entry]:
    """The rows of all files in a folder, from the lowest mean loss to the highest.

    Raises:
      InputError: there is no file, a run diverged, or two rows have the same label.
    """
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.json")):
        rows = read_json(path)["rows"]
        for row in rows:
            label = path.stem if len(rows) == 1 else row["optimizer"]
            if not row["validation_loss"]:
                raise InputError(f"{path}: {label} diverged: a result is kept of finished runs.")
            if label in entries:
                raise InputError(f"{path}: another row is called {label}.")
            entries[label] = Entry(
                *(label, row["validation_loss"], row["matrix_bytes"]),
                *(row["config"]["optimizer"], row["not_tuned"]),
            )
    if not entries:
        raise InputError(
            f"there are no results in {folder}: give a folder of comparison.json files."
        )
    return sorted(entries.values(), key=lambda entry: entry.mean)


def spread(entries: Sequence[Entry]) -> tuple[float, int]:
    """σ of one setting, pooled over those with many seeds, and the number of their runs; NaN, 0."""
    many = [entry.losses for entry in entries if len(entry.losses) >= MANY]
    degrees = sum(len(losses) - 1 for losses in many)
    if not degrees:
        return math.nan, 0
    squares = sum((len(losses) - 1) * statistics.variance(losses) for losses in many)
    return math.sqrt(squares / degrees), sum(map(len, many))


def z_value(entry: Entry, baseline: Entry, sigma: float) -> float:
    """How many standard errors the mean of an entry lies above that of a baseline."""
    error = sigma * math.sqrt(1 / len(entry.losses) + 1 / len(baseline.losses))
    return (entry.mean - baseline.mean) / error


def table(entries: Sequence[Entry]) -> str:
    """A Markdown table with differences from the baselines; below it σ."""
    sigma, runs = spread(entries)
    baselines = [entry for name in BASELINES for entry in entries if entry.label == name]
    against = [f"against {baseline.label}" for baseline in baselines]
    rows = []
    for entry in entries:
        rates = (entry.optimizer[name] for name in ("learning_rate", "matrix_rate"))
        cells = [entry.label, *(f"{rate:g}" for rate in rates)]
        cells += [str(len(entry.losses)), f"{entry.mean:.4f}"]
        for baseline in baselines:
            percent = f"{100 * (entry.mean / baseline.mean - 1):+.2f}%"
            z = "" if math.isnan(sigma) else f", z = {z_value(entry, baseline, sigma):+.1f}"
            cells.append("" if entry is baseline else percent + z)
        rows.append([*cells, format_bytes(entry.matrix_bytes)])
    text = markdown_table([*BEFORE, *against, "of the matrices"], rows)
    if runs:
        text += f"\nσ = {sigma:.4f}, from the {runs} runs of settings with {MANY} seeds or more.\n"
    for entry in entries:
        if entry.not_tuned:
            text += f"\n{entry.label} is not tuned: {' and '.join(entry.not_tuned)}.\n"
    return text


def cost_table(entries: Sequence[Entry], costs: Sequence[Cost]) -> str:
    """A Markdown table of the mean losses and of the costs that are known."""
    rows = []
    for entry in entries:
        values = [cost.values.get(entry.label) for cost in costs]
        known = ["" if value is None else f"{value:.2f}" for value in values]
        rows.append([entry.label, f"{entry.mean:.4f}", *known])
    return markdown_table(["optimizer", "validation loss", *(cost.name for cost in costs)], rows)


def draw(entries: Sequence[Entry], costs: Sequence[Cost], picture: Path) -> None:
    """Draws the mean losses against each of the costs into a PNG, with bars of standard errors."""
    sigma, runs = spread(entries)
    lowest = entries[0].mean
    highest = (1 + DRAWN) * lowest
    above = [f"{entry.label} {entry.mean:.2f}" for entry in entries if entry.mean > highest]
    figure = new_figure((5.6 * len(costs), 4.6))
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        known = [entry for entry in entries if entry.label in cost.values and entry.mean <= highest]
        points = [(cost.values[entry.label], entry.mean) for entry in known]
        width, height = max(cost.values.values()) - min(cost.values.values()), highest - lowest
        for number, (entry, (x, y)) in enumerate(zip(known, points, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            bar = sigma / math.sqrt(len(entry.losses)) if runs else None
            axes.errorbar(x, y, bar, fmt="o", color=colour, capsize=3)
            # The name stands on the right of the point, or where that is taken, on the left.
            right = [0 < a - x < 0.2 * width and abs(b - y) < 0.025 * height for a, b in points]
            side = {"ha": "right", "xytext": (-6, 4)} if any(right) else {"xytext": (6, 4)}
            text = {"color": colour, "textcoords": "offset points", "fontsize": 8}
            axes.annotate(entry.label, (x, y), **text, **side)
        axes.set(xlabel=cost.name, ylabel="validation loss (nats per token)")
        if above:
            axes.set_title(f"not drawn: {', '.join(above)}", fontsize=8, loc="left")
        axes.margins(x=0.2, y=0.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    write_png(figure, picture)
