"""What a run tells: metrics.jsonl, TensorBoard, the summary at the end."""

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError
from galore_jax.files import atomic_write
from galore_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
      name: of the run's folder.
      steps: updates.
      parameters: of the model.
      validation_loss: mean per target over the held-out split, in nats.
      validation_perplexity: exp of it.
      reference_perplexity: as the reference's evaluator counts (`Evaluation.reference_loss`).
      bigram_loss: of a bigram model of the same tokens on the same targets, or None.
      optimizer_bytes: the optimizer's state.
      seconds: of training, over all parts of a resumed run, without compilation and evaluation.
      compile_seconds: of the training step, in this process.
      tokens_per_second: training targets over `seconds`.
    """

    name: str
    steps: int
    parameters: int
    validation_loss: float
    validation_perplexity: float
    reference_perplexity: float
    bigram_loss: float | None
    optimizer_bytes: int
    seconds: float
    compile_seconds: float
    tokens_per_second: float

    def table(self) -> str:
        """The summary in words and aligned columns."""
        bigram = self.bigram_loss
        rows = {
            "run": self.name,
            "steps": f"{self.steps:,}",
            "parameters": f"{self.parameters:,}",
            "validation loss": f"{self.validation_loss:.4f}",
            "bigram's loss": None if bigram is None else f"{bigram:.4f}, same tokens, same targets",
            "perplexity": f"{self.validation_perplexity:,.2f}",
            "reference's perplexity": f"{self.reference_perplexity:,.2f}, with its N + 1 batches",
            "optimizer state": format_bytes(self.optimizer_bytes),
            "training time": f"{self.seconds:,.1f} s, and {self.compile_seconds:.1f} s to compile",
            "tokens per second": f"{self.tokens_per_second:,.0f}",
        }
        shown = {name: value for name, value in rows.items() if value is not None}
        width = max(map(len, shown))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


class Metrics:
    """metrics.jsonl and, on request, TensorBoard events.

    Opening a run at `step` drops the lines of later steps, which a killed run may have left: the
    step's own number is below `step`, an evaluation's at most `step` (it counts updates made). So
    it drops a last line of which a power cut left only a part.

    Args:
      run: the run's folder.
      step: updates made so far.
      tensorboard: whether to write events too.

    Raises:
      InputError: a line before the last is damaged, or tensorboardX is wanted and missing.
    """

    def __init__(self, run: RunFolder, step: int, tensorboard: bool):
        self._path = run.metrics
        self.lines = [line for line in read_metrics(self._path) if _is_before(line, step)]
        self._events = _events(run.tensorboard, step) if tensorboard else None
        if self._path.exists():
            with atomic_write(self._path) as path:
                path.write_text(_json_lines(self.lines), encoding="utf-8")
        # The events' purge takes the evaluation at this very step away, too.
        self._add_events([line for line in self.lines if line["step"] == step])

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines, each with its "step"; a number that is not finite becomes null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_json_lines(lines))
        self.lines.extend(lines)
        self._add_events(lines)

    def flush(self) -> None:
        """Returns once the lines are on the disk: before a checkpoint, which counts on them."""
        with self._path.open("a") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Ends the events file."""
        if self._events is not None:
            self._events.close()

    def _add_events(self, lines: Sequence[dict[str, Any]]) -> None:
        if self._events is not None:
            for line in lines:
                for name, value in line.items():
                    if name != "step":
                        self._events.add_scalar(name, value, line["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, null as NaN; none where there is no file.

    The last line is left out where it is not complete: it is being written, or a power cut came.

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
    """A line's values, or None if it is not one that `Metrics` wrote in full."""
    try:
        values = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    if not all(value is None or type(value) in (int, float) for value in values.values()):
        return None
    return {name: math.nan if value is None else value for name, value in values.items()}


def write_summary(run: RunFolder, summary: Summary) -> None:
    """Writes summary.json, the mark of a finished run."""
    text = json.dumps(_finite(dataclasses.asdict(summary)), indent=2)
    with atomic_write(run.summary) as path:
        path.write_text(f"{text}\n", encoding="utf-8")


def read_summary(run: RunFolder) -> Summary:
    """The inverse of `write_summary`.

    Raises:
      InputError: the file is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(run.summary.read_bytes())
        for name, value in values.items():
            if value is None and name != "bigram_loss":
                values[name] = math.nan
        return Summary(**values)
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f"{run.summary} is damaged: delete it and resume the run, which writes it again."
        ) from None


def format_bytes(number: float) -> str:
    """As "12.3 MB", in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _is_before(line: Mapping[str, Any], step: int) -> bool:
    return line["step"] <= step if "validation_loss" in line else line["step"] < step


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(_finite(line))}\n" for line in lines)


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }


def _events(folder: Path, step: int) -> Any:
    try:
        tensorboardx = importlib.import_module("tensorboardX")
    except ModuleNotFoundError:
        raise InputError(
            "training.tensorboard needs tensorboardX: "
            'pip install "galore-jax[tensorboard]", or leave it off.'
        ) from None
    return tensorboardx.SummaryWriter(str(folder), purge_step=step or None)
