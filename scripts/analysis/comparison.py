"""Comparison of optimizers on the same model and data: tables and, of pre-training, curves.

Pre-training can be tuned on a grid of two rates: the learning rate, and `matrix_rate`, its factor
for the matrices. Fine-tuning on GLUE is tuned on a grid of learning rates. Each run has a folder,
which is kept, so a finished run is used again and an interrupted comparison continues where it was.
"""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from analysis.markdown import markdown_table
from galore_jax.data.batches import fingerprint
from galore_jax.files import read_json, write_json, write_text
from galore_jax.training.config import Config, FinetuneConfig
from galore_jax.training.config_file import changed
from galore_jax.training.finetune import finetune
from galore_jax.training.loop import Diverged, train
from galore_jax.training.metrics import format_bytes
from galore_jax.training.plots import plot_curves
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.run_folder import (
    RunFolder,
    check_same_run,
    check_same_text,
    recorded_config,
)
from galore_jax.training.state import matrix_state_bytes

# The optimizer with which the others are compared.
BASELINE = "adamw"
# Steps on the grid of learning rate and matrix rate, with which a descent looks for a lower loss.
# The first two change the rate of the matrices alone, those along a diagonal the rate of everything
# else alone.
DIRECTIONS = ((0, 1), (0, -1), (1, -1), (-1, 1))
WITH_ONE_MATRIX_RATE = ((1, 0), (-1, 0))
LOSS_COLUMNS = (
    *("optimizer", "learning rate", "matrix rate", "validation loss", "spread", "against adamw"),
    *("seed by seed", "optimizer state", "of the matrices", "seconds per step"),
)
METRIC_COLUMNS = (
    *("optimizer", "learning rate", "metric", "deviation", "against adamw", "95% interval"),
    *("optimizer state", "seconds"),
)
Point = tuple[int, ...]


class Result(NamedTuple):
    """What a run has reached, and what it took.

    Attributes:
      value: the final validation loss, in nats, or the best value of a task's first metric.
      optimizer_bytes: size of the optimizer's state.
      seconds: of all steps.
    """

    value: float
    optimizer_bytes: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One optimizer of a comparison.

    Attributes:
      label: the name under which it is compared.
      configs: that of its runs at the rates that were chosen; for a mean, that of each task.
      results: one for each seed; empty if a run diverged.
      borders: those of "learning rate" and "matrix rate" whose best value is at the end of a grid.
    """

    label: str
    configs: tuple[Any, ...]
    results: Sequence[Result]
    borders: tuple[str, ...] = ()

    @property
    def values(self) -> list[float]:
        """Of the results."""
        return [result.value for result in self.results]

    @property
    def mean(self) -> float:
        """Of the values; NaN if a run diverged."""
        return statistics.mean(self.values) if self.results else math.nan

    @property
    def rates(self) -> list[str]:
        """The chosen rates as cells of the table; the learning rates of several tasks in one."""
        optimizers = [config.optimizer for config in self.configs]
        cells = [", ".join(f"{optimizer.learning_rate:g}" for optimizer in optimizers)]
        has_matrix_rate = isinstance(self.configs[0], Config)
        return cells + [f"{optimizers[0].matrix_rate:g}"] * has_matrix_rate

    @functools.cached_property
    def matrix_bytes(self) -> int:
        """Of pre-training, bytes of the state for the matrices that GaLore projects."""
        return matrix_state_bytes(Pretraining(self.configs[0]))


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, with differences from the one labelled "adamw".

    Sentences below it name the optimizers that are not tuned, as a best rate is at the end of its
    grid.
    """
    baseline = next((row for row in rows if row.label == BASELINE and row.results), None)
    is_loss = isinstance(rows[0].configs[0], Config)
    columns, figures = (LOSS_COLUMNS, _losses) if is_loss else (METRIC_COLUMNS, _metrics)
    lines = []
    for row in rows:
        cells = [row.label, *row.rates]
        cells += (
            figures(row, None if row is baseline else baseline) if row.results else ["diverged"]
        )
        lines.append([*cells, *[""] * (len(columns) - len(cells))])
    text = markdown_table(columns, lines)
    for row in rows:
        if row.borders:
            text += (
                f"\n{row.label} is not tuned: its best {' and '.join(row.borders)} is at the end "
                "of the grid. Extend the grid and run the command again.\n"
            )
    return text


def _losses(row: Row, baseline: Row | None) -> list[str]:
    """The cells of pre-training: differences in percent, and their mean, least and largest."""
    values, relative, paired = row.values, "", ""
    if baseline is not None:
        differences = np.subtract(values, baseline.values)
        relative = f"{100 * (row.mean / baseline.mean - 1):+.2f}%"
        paired = f"{differences.mean():+.4f}"
        if len(differences) > 1:
            paired += f" ({differences.min():+.4f} to {differences.max():+.4f})"
    steps = row.configs[0].training.steps
    return [
        f"{row.mean:.4f}",
        f"{max(values) - min(values):.4f}" if len(values) > 1 else "",
        relative,
        paired,
        format_bytes(row.results[0].optimizer_bytes),
        format_bytes(row.matrix_bytes),
        f"{statistics.median(result.seconds / steps for result in row.results):.3f}",
    ]


def _metrics(row: Row, baseline: Row | None) -> list[str]:
    """The cells of fine-tuning: the mean difference, with its interval by Student's t."""
    difference, interval = "", ""
    if baseline is not None:
        differences = np.subtract(row.values, baseline.values)
        mean = differences.mean()
        difference = f"{mean:+.4f}"
        if len(differences) > 1:
            half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
            interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
    return [
        f"{row.mean:.4f}",
        f"{statistics.stdev(row.values) if len(row.results) > 1 else 0.0:.4f}",
        difference,
        interval,
        format_bytes(row.results[0].optimizer_bytes),
        f"{statistics.median(result.seconds for result in row.results):.0f}",
    ]


def compare(
    configs: Mapping[str, Config],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    matrix_rates: Sequence[float] = (),
) -> list[Row]:
    """Trains with each optimizer from the same initial parameters on the same text.

    With a grid each is tuned first: `descend`, starting at the configured rates, looks for those
    with the lowest validation loss of the first seed. Then the other seeds run at these rates.

    Args:
      configs: by label, as from `load_comparison`.
      seeds: each determines the initial parameters and the order of the text for all optimizers.
      rates: learning rates of the grid. Empty: the configured one.
      matrix_rates: matrix rates of the grid. Empty: the configured one.

    Returns:
      One row per optimizer. `training.folder` has the folders of the runs, the table in
      comparison.md, the figures of all seeds in comparison.json, and the curves of the first one in
      comparison.png.

    Raises:
      InputError: a rate is not a positive number; and as for `train`.
    """
    grids = {"learning_rate": rates, "matrix_rate": matrix_rates}
    _check_rates(configs, grids)
    rows = [_row(label, config, seeds, grids) for label, config in configs.items()]
    folder = Path(next(iter(configs.values())).training.folder)
    write_text(folder / "comparison.md", table(rows))
    write_json(folder / "comparison.json", record(rows, seeds))
    folders = [_folder(row.label, row.configs[0], seeds[0]) for row in rows]
    plot_curves(folders, folder / "comparison.png", [*configs])
    return rows


def compare_finetuning(
    configs: Mapping[str, FinetuneConfig], rates: Sequence[float], tasks: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """Fine-tunes with each optimizer from the same checkpoint on the same examples.

    Each takes the learning rate with which the first seed reaches the best value of the task's
    first metric, the smaller one of two that are equal. Then all seeds run at this rate.

    Args:
      configs: by label, as from `load_comparison`.
      rates: the grid.
      tasks: names of several tasks, each of which has the folder of its name in `training.folder`.
        Empty: the configured one, in `training.folder` itself.

    Returns:
      For each task one row per optimizer, and of several tasks as "mean" one with the metric
      averaged over them seed by seed, the sum of the times and the largest state. Their `tables`
      are in comparison.md in `training.folder`.

    Raises:
      InputError: an unknown task, a rate that is not a positive number; and as for `finetune`.
    """
    first, grids, compared = next(iter(configs.values())), {"learning_rate": rates}, {}
    folder, seeds = Path(first.training.folder), range(first.training.seeds)
    each = {
        task: {
            label: changed(config, data={"task": task}, training={"folder": str(folder / task)})
            for label, config in configs.items()
        }
        for task in tasks
    } or {first.data.task: configs}
    _check_rates(configs, grids)
    for task, on_task in each.items():
        compared[task] = [_row(label, config, seeds, grids) for label, config in on_task.items()]
    if tasks:
        compared["mean"] = [_mean(rows) for rows in zip(*compared.values(), strict=True)]
    write_text(folder / "comparison.md", tables(compared))
    return compared


def tables(compared: Mapping[str, Sequence[Row]]) -> str:
    """The table of each task, and of the means, below its name; of a single one without."""
    if len(compared) == 1:
        return table(*compared.values())
    return "\n".join(f"{name}\n\n{table(rows)}" for name, rows in compared.items())


def record(rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, Any]:
    """The rows of pre-training and what they came from, to be kept where the runs are not."""
    return {
        "jax": jax.__version__,
        "seeds": [*seeds],
        "rows": [
            {
                "optimizer": row.label,
                "validation_loss": row.values,
                "optimizer_bytes": [result.optimizer_bytes for result in row.results],
                "matrix_bytes": row.matrix_bytes,
                "seconds": [result.seconds for result in row.results],
                "not_tuned": [*row.borders],
                "config": dataclasses.asdict(row.configs[0]),
            }
            for row in rows
        ],
    }


def descend(loss: Callable[[Point], float], size: Point, start: Point) -> Point:
    """Looks for the point of a grid with the lowest loss, evaluating few of them.

    It goes along each of the directions as long as the loss falls, and stops where none of the
    neighbours in these directions has a lower loss. That is the lowest loss of the grid if the loss
    is unimodal in the rate of the matrices and in that of everything else, and the best of the one
    does not depend on the other.

    Args:
      loss: of a point, a pair of indices; infinite where a run diverges.
      size: of the grid along each axis.
      start: the first point.
    """

    @functools.cache
    def at(point: Point) -> float:
        if not all(0 <= index < length for index, length in zip(point, size, strict=True)):
            return math.inf
        return loss(point)

    directions = DIRECTIONS if size[1] > 1 else WITH_ONE_MATRIX_RATE
    best = start
    lowest, improves = at(best), True
    while improves:
        improves = False
        for direction in directions:
            while at(point := (best[0] + direction[0], best[1] + direction[1])) < lowest:
                best, lowest, improves = point, at(point), True
    return best


def _check_rates(configs: Mapping[str, Any], grids: Mapping[str, Sequence[float]]) -> None:
    """Raises an `InputError` unless each rate of the grids can be a setting."""
    for config, (name, grid) in itertools.product(configs.values(), grids.items()):
        for rate in grid:
            changed(config, optimizer={name: rate})


def _row(
    label: str, config: Any, seeds: Sequence[int], grids: Mapping[str, Sequence[float]]
) -> Row:
    """The row of an optimizer at the rates of the grids that are best with the first seed."""
    is_loss = isinstance(config, Config)
    run = _pretrained if is_loss else _finetuned
    names = [name.replace("_", " ") for name in grids]
    axes = [sorted(set(grid)) or [getattr(config.optimizer, name)] for name, grid in grids.items()]

    def rates_of(point: Point) -> list[float]:
        return [axis[index] for axis, index in zip(axes, point, strict=True)]

    def at(point: Point) -> Any:
        return changed(config, optimizer=dict(zip(grids, rates_of(point), strict=True)))

    def loss(point: Point) -> float:
        try:
            found = run(label, at(point), seeds[:1])[0].value
        except Diverged:
            found = math.nan
        rates = zip(names, rates_of(point), strict=True)
        print(f"{label}, {', '.join(f'{name} {rate:g}' for name, rate in rates)}: {found:.4f}")
        return math.inf if math.isnan(found) else found if is_loss else -found

    size, best, borders = tuple(map(len, axes)), (0,) * len(axes), ()
    if any(grids.values()):
        if is_loss:
            usual = [getattr(config.optimizer, name) for name in grids]
            ratios = [
                [abs(math.log(rate / own)) for rate in axis]
                for axis, own in zip(axes, usual, strict=True)
            ]
            best = descend(loss, size, tuple(ratio.index(min(ratio)) for ratio in ratios))
        else:
            best = min(itertools.product(*map(range, size)), key=loss)
        borders = tuple(
            name
            for name, length, index in zip(names, size, best, strict=True)
            if length > 1 and index in (0, length - 1)
        )
    try:
        return Row(label, (at(best),), run(label, at(best), seeds), borders)
    except Diverged:
        return Row(label, (at(best),), [])


def _folder(label: str, config: Config, seed: int) -> Path:
    """The folder of a run, with its rates in the name, so that the grid and the seeds share it."""
    optimizer = config.optimizer
    rates = f"{optimizer.learning_rate:g}-{optimizer.matrix_rate:g}"
    return Path(config.training.folder) / f"{label}-{rates}-seed{seed}"


def _pretrained(label: str, config: Config, seeds: Sequence[int]) -> list[Result]:
    """Trains or resumes these runs, or reads the summaries of those that are finished."""
    results = []
    for seed in seeds:
        folder = _folder(label, config, seed)
        of_seed = changed(
            config, data={"seed": seed}, training={"seed": seed, "folder": str(folder)}
        )
        run = RunFolder(folder)
        if run.summary.exists() or run.diverged.exists():
            check_same_run(recorded_config(run, Config), of_seed, run.path)
            check_same_text(run, fingerprint(config.data), resume=True)
        if run.diverged.exists():
            raise Diverged(run.diverged.read_text().strip())
        if run.summary.exists():
            summary = read_json(run.summary)
        else:
            summary = train(Pretraining(of_seed), resume=run.holds_run())
        names = ("validation_loss", "optimizer_bytes", "seconds")
        results.append(Result(*(summary[name] for name in names)))
    return results


def _finetuned(label: str, config: FinetuneConfig, seeds: Sequence[int]) -> list[Result]:
    """Fine-tunes with the seeds that are missing, the first of all, in a folder with the rate."""
    folder = Path(config.training.folder) / f"{label}-{config.optimizer.learning_rate:g}"
    summary = finetune(changed(config, training={"folder": str(folder), "seeds": len(seeds)}))
    return [
        Result(best, summary["optimizer_bytes"], seconds)
        for best, seconds in zip(summary["best"], summary["seconds"], strict=True)
    ]


def _mean(rows: Sequence[Row]) -> Row:
    """The mean over the tasks of one optimizer's rows."""
    results = [
        Result(
            statistics.mean(result.value for result in of_seed),
            # The heads differ where the numbers of classes do.
            max(result.optimizer_bytes for result in of_seed),
            sum(result.seconds for result in of_seed),
        )
        for of_seed in zip(*(row.results for row in rows), strict=False)  # Empty if one diverged.
    ]
    configs = tuple(config for row in rows for config in row.configs)
    borders = tuple(dict.fromkeys(border for row in rows for border in row.borders))
    return Row(rows[0].label, configs, results, borders)
