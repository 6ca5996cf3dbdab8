"""GaLore and AdamW side by side: the same model, text and steps; a table and a picture.

Every run keeps its folder, so a comparison that was stopped goes on where it was.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from galore_jax.data.batches import documents
from galore_jax.files import atomic_write
from galore_jax.training.config import Config
from galore_jax.training.config_file import load_config
from galore_jax.training.loop import train
from galore_jax.training.metrics import Summary, format_bytes, read_summary
from galore_jax.training.plots import plot_curves
from galore_jax.training.run_folder import RunFolder, refuse_other_run
from galore_jax.training.sample import write_text

SAMPLE_TOKENS = 400
PROMPT_CHARACTERS = 40  # of a held-out document


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer of a comparison.

    Attributes:
      name: `optimizer.name`.
      learning_rate: the peak.
      runs: a summary a seed.
    """

    name: str
    learning_rate: float
    runs: Sequence[Summary]

    @property
    def loss(self) -> float:
        """Mean final validation loss over the seeds, in nats."""
        return statistics.mean(run.validation_loss for run in self.runs)

    @property
    def spread(self) -> float:
        """The largest less the smallest final validation loss over the seeds."""
        losses = [run.validation_loss for run in self.runs]
        return max(losses) - min(losses)


def compare(config: Config, seeds: Sequence[int], rates: Sequence[float] = ()) -> list[Row]:
    """Trains with every optimizer from equal starts, on equal text.

    Writes comparison.md, comparison.png (the runs of the first seed), sample.txt (by GaLore's first
    model) and the runs' folders into `training.folder`.

    Args:
      config: of all runs but for the optimizer's name, its rate and the seeds. AdamW stands beside
        the optimizer that it names, or beside galore_adamw.
      seeds: each sets the parameters' start and the order of the text, for every optimizer alike.
      rates: learning rates to try for a quarter of the steps with the first seed, the same for
        every optimizer; each takes the one of its lowest validation loss. None: the configured.

    Returns:
      A row an optimizer.
    """
    folder = Path(config.training.folder)
    rows = []
    named = config.optimizer.name
    for name in ("galore_adamw" if named == "adamw" else named, "adamw"):
        rate = (
            _best_rate(config, name, seeds[0], rates) if rates else config.optimizer.learning_rate
        )
        runs = [_run(config, f"{name}-seed{seed}", name, rate, seed) for seed in seeds]
        rows.append(Row(name, rate, tuple(runs)))
    pictured = [folder / f"{row.name}-seed{seeds[0]}" for row in rows]
    plot_curves(pictured, folder / "comparison.png")
    with atomic_write(folder / "comparison.md") as path:
        path.write_text(table(rows), encoding="utf-8")
    prompt = documents(config.data, "validation")[0][:PROMPT_CHARACTERS]
    sample = write_text(pictured[0], prompt, min(SAMPLE_TOKENS, config.model.max_length // 2))
    with atomic_write(folder / "sample.txt") as path:
        path.write_text(sample, encoding="utf-8")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, each with its distance from AdamW's loss, and a bigram's loss below."""
    baseline = next(row for row in rows if row.name == "adamw")
    lines = [
        "| optimizer | learning rate | validation loss | spread | against adamw | optimizer state "
        "| seconds | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = statistics.median(run.seconds for run in row.runs)
        speed = statistics.median(run.tokens_per_second for run in row.runs)
        cells = (
            row.name,
            f"{row.learning_rate:g}",
            f"{row.loss:.4f}",
            f"{row.spread:.4f}" if len(row.runs) > 1 else "",
            "" if row is baseline else f"{100 * (row.loss / baseline.loss - 1):+.2f}%",
            format_bytes(row.runs[0].optimizer_bytes),
            f"{seconds:.1f}",
            f"{speed:,.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    bigrams = [run.bigram_loss for run in baseline.runs if run.bigram_loss is not None]
    if bigrams:
        lines.append(
            f"| bigram model of the same text | | {statistics.mean(bigrams):.4f} |" + " |" * 5
        )
    return "\n".join(lines) + "\n"


def _best_rate(config: Config, name: str, seed: int, rates: Sequence[float]) -> float:
    quarter = max(1, config.training.steps // 4)
    short = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer, warmup_steps=config.optimizer.warmup_steps // 4
        ),
        training=dataclasses.replace(config.training, steps=quarter, evaluate_every=0),
    )
    losses = {}
    for rate in rates:
        losses[rate] = _run(short, f"{name}-rate{rate:g}", name, rate, seed).validation_loss
        print(f"{name}, learning rate {rate:g}, {quarter} steps: {losses[rate]:.4f}")
    return min(rates, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))


def _run(config: Config, label: str, name: str, rate: float, seed: int) -> Summary:
    """Trains, goes on with, or only reads the run of this label."""
    folder = Path(config.training.folder) / label
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seed=seed),
        optimizer=dataclasses.replace(config.optimizer, name=name, learning_rate=rate),
        training=dataclasses.replace(config.training, seed=seed, folder=str(folder)),
    )
    run = RunFolder(folder)
    if run.summary.exists():
        refuse_other_run(load_config(run.config), config, folder)
        return read_summary(run)
    return train(config, resume=run.holds_run())
