"""Metrics of a run: metrics.jsonl, and the summary at the end."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError
from galore_jax.files import write_json, write_text
from galore_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
      name: name of the run's folder.
      steps: number of updates.
      parameters: number of the model's parameters.
      validation_loss: mean loss per target of the validation split, in nats.
      validation_perplexity: exp(validation_loss).
      optimizer_bytes: size of the optimizer's state.
      seconds: training time over all parts of a resumed run, without compilation and evaluation.
      compile_seconds: time to compile the training step, in this process.
      tokens_per_second: training targets divided by `seconds`.
    """

    name: str
    steps: int
    parameters: int
    validation_loss: float
    validation_perplexity: float
    optimizer_bytes: int
    seconds: float
    compile_seconds: float
    tokens_per_second: float

    def table(self) -> str:
        """The summary as text in aligned columns."""
        rows = {
            "run": self.name,
            "steps": f"{self.steps:,}",
            "parameters": f"{self.parameters:,}",
            "validation loss": f"{self.validation_loss:.4f}",
            "perplexity": f"{self.validation_perplexity:,.2f}",
            "optimizer state": format_bytes(self.optimizer_bytes),
            "training time": f"{self.seconds:,.1f} s, and {self.compile_seconds:.1f} s to compile",
            "tokens per second": f"{self.tokens_per_second:,.0f}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


class Metrics:
    """metrics.jsonl.

    Opening a run at `step` drops the lines of later steps, which a killed run may have left, and an
    incomplete last line, left by a power cut. Lines of steps before `step` stay, and those of
    evaluations after at most `step` updates.

    Args:
      run: the run's folder.
      step: number of updates so far.

    Raises:
      InputError: a line before the last one is damaged.
    """

    def __init__(self, run: RunFolder, step: int):
        self._path = run.metrics
        self.lines = [line for line in read_metrics(self._path) if _is_before(line, step)]
        if self._path.exists():
            write_text(self._path, _json_lines(self.lines))

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines, each with its "step"; a number that is not finite becomes null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_json_lines(lines))
        self.lines.extend(lines)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [line for line in self.lines if "loss" not in line]

    def flush(self) -> None:
        """Waits until the lines are on disk, as a checkpoint requires."""
        with self._path.open("a") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with null as NaN; empty if there is no file.

    An incomplete last line is left out: it is still being written, or was cut off by a power cut.

    Raises:
      InputError: another line is damaged.
    """
    if not path.exists():
        return []
    texts = path.read_bytes().splitlines(keepends=True)
    lines = []
    for number, text in enumerate(texts, 1):
        line = _parsed(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            raise InputError(
                f"{path}, line {number} is damaged: delete this line, and the curves lack its step."
            )
    return lines


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The values of a line, or None if it is not a complete line of `Metrics`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return {name: math.nan if value is None else value for name, value in values.items()}


def write_summary(run: RunFolder, summary: Summary) -> None:
    """Writes summary.json, which marks the run as finished."""
    write_json(run.summary, _finite(dataclasses.asdict(summary)))


def read_summary(run: RunFolder) -> Summary:
    """The inverse of `write_summary`.

    Raises:
      InputError: the file is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(run.summary.read_bytes())
        names = [field.name for field in dataclasses.fields(Summary)]
        found: dict[str, Any] = {
            name: math.nan if values[name] is None else values[name] for name in names
        }
        return Summary(**found)
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{run.summary} is damaged: delete it and resume the run to write it again."
        ) from None


def format_bytes(number: float) -> str:
    """A size in decimal units, as in "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:  # That would round to 1000.
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _is_before(line: Mapping[str, Any], step: int) -> bool:
    return line["step"] <= step if "loss" not in line else line["step"] < step


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(_finite(line))}\n" for line in lines)


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
