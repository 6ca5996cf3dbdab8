"""Comparison of optimizers on tasks of GLUE, each at the best learning rate of one grid."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from galore_jax.data.glue import TASKS, load_examples
from galore_jax.files import write_text
from galore_jax.training.config import check_grid
from galore_jax.training.finetune import (
    NotFiniteError,
    check_start,
    finetune,
    missing_seeds,
    over_seeds,
)
from galore_jax.training.finetune_config import FinetuneConfig
from galore_jax.training.markdown import table_lines
from galore_jax.training.metrics import format_bytes

COLUMNS = (
    *("optimizer", "learning rate", "metric", "deviation", "against adamw", "95% interval"),
    *("optimizer state", "seconds"),
)


class Row(NamedTuple):
    """One optimizer of a comparison.

    Attributes:
      label: its label.
      rates: the chosen learning rate; for a mean over tasks, that of each task.
      is_tuned: False if a best rate is the end of a grid of several.
      summary: that of `finetune` at this rate; None if the training diverges with one of the seeds.
    """

    label: str
    rates: tuple[float, ...]
    is_tuned: bool
    summary: dict[str, Any] | None


def compare_finetuning(configs: Mapping[str, FinetuneConfig], rates: Sequence[float]) -> list[Row]:
    """Fine-tunes with each optimizer from the same checkpoint on the same examples.

    Each optimizer takes the learning rate with which the first seed reaches the best value of the
    task's first metric, the smaller one of two that are equal. Then all seeds run at this rate, the
    first one included. Runs are kept, each in a folder of its own, so an interrupted comparison
    continues.

    Args:
      configs: by label, as from `load_comparison`.
      rates: the grid.

    Returns:
      One row per optimizer. `table` of them is also written to `comparison.md` in
      `training.folder`.

    Raises:
      InputError: a rate is not a positive number; and as for `finetune`.
    """
    _check(configs, rates)
    return _compare(configs, rates)


def compare_tasks(
    configs: Mapping[str, FinetuneConfig], tasks: Sequence[str], rates: Sequence[float]
) -> dict[str, list[Row]]:
    """Compares optimizers on each of several tasks, as `compare_finetuning`, and on average.

    Args:
      configs: by label, as from `load_comparison`. A task has the folder of its name in
        `training.folder`.
      tasks: their names in TFDS.
      rates: the grid.

    Returns:
      For each task one row per optimizer, and as "mean" one with the metric averaged over the
      tasks seed by seed, the sum of the times and the largest state. `tables` of them is also
      written to `comparison.md` in `training.folder`.

    Raises:
      InputError: an unknown task; and as for `compare_finetuning`.
    """
    each = {task: {label: _on(task, config) for label, config in configs.items()} for task in tasks}
    for on_task in each.values():
        _check(on_task, rates)
    compared = {task: _compare(on_task, rates) for task, on_task in each.items()}
    compared["mean"] = [_mean(rows) for rows in zip(*compared.values(), strict=True)]
    _write(configs, tables(compared))
    return compared


def tables(compared: Mapping[str, Sequence[Row]]) -> str:
    """The table of each task, and of the means, below its name."""
    return "\n".join(f"{name}\n\n{table(rows)}" for name, rows in compared.items())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, with paired differences from the row with the label "adamw".

    The interval is that of Student's t for the mean of the differences of runs with equal seeds. A
    last sentence names the optimizers whose best rate is at the end of the grid.
    """
    cells = []
    baseline = next((row.summary for row in rows if row.label == "adamw"), None)
    for row in rows:
        rates = ", ".join(f"{rate:g}" for rate in row.rates)
        if row.summary is None:
            cells.append((row.label, rates, "diverged"))
            continue
        difference, interval = "", ""
        if baseline is not None and row.summary is not baseline:
            pairs = np.subtract(row.summary["best"], baseline["best"])
            difference = f"{pairs.mean():+.4f}"
            if len(pairs) > 1:
                half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
                interval = f"{pairs.mean() - half:+.4f} to {pairs.mean() + half:+.4f}"
        figures = (
            row.label,
            rates,
            f"{row.summary['mean']:.4f}",
            f"{row.summary['deviation']:.4f}",
            difference,
            interval,
            format_bytes(row.summary["optimizer_bytes"]),
            f"{statistics.median(row.summary['seconds']):.0f}",
        )
        cells.append(figures)
    lines = table_lines(COLUMNS, cells)
    if ends := [row.label for row in rows if not row.is_tuned]:
        lines += [
            "",
            f"Not tuned, as the best rate is at the end of the grid: {', '.join(ends)}. Extend the "
            "grid and run the command again.",
        ]
    return "\n".join(lines) + "\n"


def _check(configs: Mapping[str, FinetuneConfig], rates: Sequence[float]) -> None:
    """Raises what can be known before the first run: grids, GPU, metrics, folders, and the data."""
    check_grid("learning_rate", rates)
    runs = [_at(label, config, rate, 1) for label, config in configs.items() for rate in rates]
    for run in runs:
        check_start(run)
    if any(missing_seeds(run) for run in runs):
        task = TASKS[runs[0].data.task]
        split = next(split for split in task.files if split.startswith("validation"))
        load_examples(task, split, runs[0].data.source)


def _compare(configs: Mapping[str, FinetuneConfig], rates: Sequence[float]) -> list[Row]:
    """What `compare_finetuning` does after its check."""
    rows, grid = [], sorted(set(rates))
    for label, config in configs.items():
        seeds = config.training.seeds
        first = [_metric(_at(label, config, rate, 1)) for rate in grid]
        best = int(np.argmax(first))
        is_end = len(grid) > 1 and best in (0, len(grid) - 1)
        is_tuned = not is_end or max(first) == -np.inf
        try:
            summary = finetune(_at(label, config, grid[best], seeds))
        except NotFiniteError:
            summary = None
        rows.append(Row(label, (grid[best],), is_tuned, summary))
    _write(configs, table(rows))
    return rows


def _metric(config: FinetuneConfig) -> float:
    """The task's first metric with the first seed; -inf if the training diverges."""
    try:
        return finetune(config)["best"][0]
    except NotFiniteError:
        return -np.inf


def _mean(rows: Sequence[Row]) -> Row:
    """The mean over the tasks of one optimizer's rows."""
    summaries = [row.summary for row in rows if row.summary is not None]
    summary: dict[str, Any] | None = None
    if len(summaries) == len(rows):
        summary = {
            **over_seeds(np.mean([summary["best"] for summary in summaries], axis=0).tolist()),
            # The heads differ where the numbers of classes do.
            "optimizer_bytes": max(summary["optimizer_bytes"] for summary in summaries),
            "seconds": np.sum([summary["seconds"] for summary in summaries], axis=0).tolist(),
        }
    rates = tuple(rate for row in rows for rate in row.rates)
    return Row(rows[0].label, rates, all(row.is_tuned for row in rows), summary)


def _on(task: str, config: FinetuneConfig) -> FinetuneConfig:
    """The configuration for a task, in the folder of its name."""
    folder = Path(config.training.folder) / task
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, task=task),
        training=dataclasses.replace(config.training, folder=str(folder)),
    )


def _write(configs: Mapping[str, FinetuneConfig], text: str) -> None:
    folder = Path(next(iter(configs.values())).training.folder)
    write_text(folder / "comparison.md", text)


def _at(label: str, config: FinetuneConfig, rate: float, seeds: int) -> FinetuneConfig:
    """The configuration at a learning rate, in a folder with the rate in its name."""
    folder = Path(config.training.folder) / f"{label}-{rate:g}"
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        training=dataclasses.replace(config.training, folder=str(folder), seeds=seeds),
    )
