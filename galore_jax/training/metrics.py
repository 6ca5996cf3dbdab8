"""The lines of metrics.jsonl: one for each step, and one for each evaluation."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError
from galore_jax.files import write_text
from galore_jax.training.run_folder import RunFolder


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
