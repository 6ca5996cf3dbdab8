"""Metrics of a running training: metrics.jsonl, the clock and the progress bar.

A line of metrics.jsonl has the metrics of a step, or of an evaluation after this number of updates.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from tqdm import tqdm

from galore_jax.errors import InputError
from galore_jax.files import write_text
from galore_jax.training.task import Line

# The metrics of a step, in the order in which a line has them.
MEASURED = (
    *("loss", "learning_rate", "gradient_norm", "coordinates_norm", "targets"),
    *("subspace_overlap", "refreshes_saved", "skipped"),
)
SLOW_STEP = 1.0
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Metrics:
    """Collects the metrics of steps, without waiting for the device until `report` is called.

    Opening metrics.jsonl at `start` drops the lines of later steps, which a killed run may have
    left, and an incomplete last line, left by a power cut. Lines of steps before `start` stay, and
    those of evaluations after at most `start` updates.

    Args:
      path: of metrics.jsonl; None: this process does not report, and `report` only waits.
      start: number of updates made before.
      steps: number of updates of the run.
      targets: what the losses are of, in the plural.

    Attributes:
      lines: of the file.
      is_slow: whether steps take so long that each should be reported; True for the first one.

    Raises:
      InputError: a line before the last one is damaged.
    """

    def __init__(self, path: Path | None, start: int, steps: int, targets: str):
        self._path, self._targets = path, targets
        lines = [] if path is None else read_metrics(path)
        self.lines: list[Line] = [
            line for line in lines if line["step"] < start + ("loss" not in line)
        ]
        if path is not None and path.exists():
            write_text(path, _json_lines(self.lines))
        self.is_slow = True
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._seconds = max((line.get("seconds", 0.0) for line in self.lines), default=0.0)
        self._skipped = max((line.get("skipped", 0) for line in self.lines), default=0)
        self._warned: set[str] = set()
        # Files and pipes receive an occasional line instead of a moving bar.
        pause = 0.2 if sys.stderr.isatty() else 15
        self._bar = tqdm(
            total=steps, initial=start, bar_format=BAR, mininterval=pause, disable=path is None
        )
        if lacking := start - len({line["step"] for line in self.lines if "loss" in line}):
            self.say(
                f"warning: metrics.jsonl lacks {lacking:,} of the {start:,} steps before this one, "
                "so the curves and the summary leave them out"
            )

    def __enter__(self) -> Self:
        self._mark = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def add(self, step: int, measured: dict[str, jax.Array]) -> None:
        """Adds the scalars of a step, which may not be computed yet."""
        self._pending.append((step, measured))

    def report(self) -> None:
        """Waits for the added steps, writes their lines and updates the bar."""
        values = jax.device_get([measured for _, measured in self._pending])
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self._seconds += elapsed
        rate = float(sum(value["targets"] for value in values)) / elapsed
        seconds = round(self._seconds, 3)
        timing = {f"{self._targets}_per_second": round(rate, 1), "seconds": seconds}
        lines = []
        for (step, _), value in zip(self._pending, values, strict=True):
            scalars = {name: value[name].item() for name in MEASURED if name in value}
            lines.append({"step": step, **scalars, **timing})
        self.write(lines)
        self._pending.clear()
        self.is_slow = elapsed / len(lines) > SLOW_STEP

        for line in lines:
            self._warn_of_bad_values(line)
        last = lines[-1]
        self._bar.set_postfix_str(
            f"loss {last['loss']:.3f}, {rate:,.0f} {self._targets}/s, "
            f"lr {last['learning_rate']:.2e}, {_peak_memory()}",
            refresh=False,
        )
        self._bar.update(len(lines))

    def report_evaluation(self, updates: int, evaluation: Line, sentence: str) -> None:
        """Writes the line of an evaluation after this number of updates."""
        self.write([{"step": updates, **evaluation}])
        self.say(f"step {updates:,}: {sentence}")

    def write(self, lines: Sequence[Line]) -> None:
        """Appends lines, each with its "step"; a number that is not finite becomes null."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_json_lines(lines))
            self.lines.extend(lines)

    def evaluations(self) -> list[Line]:
        """The lines of evaluations."""
        return [line for line in self.lines if "loss" not in line]

    def flush(self) -> None:
        """Waits until the lines are on disk, as a checkpoint requires."""
        if self._path is not None:
            with self._path.open("a") as file:
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Shows that a program is being compiled, and excludes the time from the training time."""
        if self._pending:
            self.report()
        self._bar.set_postfix_str("compiling")
        with self.clock_stopped():
            yield
        self._bar.set_postfix_str("", refresh=False)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Excludes the time within the block from the training time; call `report` before it."""
        start = time.perf_counter()
        yield
        self._mark = time.perf_counter()
        if not self._bar.disable:
            self._bar.start_t += self._mark - start
            self._bar.last_print_t += self._mark - start

    def say(self, sentence: str) -> None:
        """Prints a line above the bar."""
        if self._path is not None:
            self._bar.write(sentence, file=sys.stderr)

    def _warn_of_bad_values(self, line: Line) -> None:
        """Prints a warning for each kind of bad values, the first time that there are any."""
        at = f"step {line['step']:,}"
        warnings = {
            f"the loss at {at} is not finite; a lower optimizer.learning_rate or an "
            "optimizer.clip_norm may help": not math.isfinite(line["loss"]),
            f"the batch of {at} has no targets, since no two tokens are of one document; are many "
            "documents of data.source empty?": not line["targets"],
            f"the gradients of some matrices at {at} are not finite; their updates are skipped, "
            "and counted as skipped in metrics.jsonl": line.get("skipped", 0) > self._skipped,
        }
        for sentence, is_bad in warnings.items():
            kind = sentence.partition(at)[0]
            if is_bad and kind not in self._warned:
                self._warned.add(kind)
                self.say(f"warning: {sentence}")


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


def _json_lines(lines: Sequence[Line]) -> str:
    is_bad = lambda value: isinstance(value, float) and not math.isfinite(value)
    finite = (
        {name: None if is_bad(value) else value for name, value in line.items()} for line in lines
    )
    return "".join(f"{json.dumps(line)}\n" for line in finite)


def format_bytes(number: float) -> str:
    """A size in decimal units, as in "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:  # That would round to 1000.
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _peak_memory() -> str:
    """The peak memory of the first device, or of the process if that is unknown."""
    if statistics := jax.local_devices()[0].memory_stats():
        return f"{format_bytes(statistics['peak_bytes_in_use'])} device memory"
    return peak_process_memory()


def peak_process_memory() -> str:
    """The peak memory of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{format_bytes(peak if sys.platform == 'darwin' else peak * 1024)} process memory"
