"""Progress of a running training: the bar, the clock and the lines of metrics.jsonl."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

import jax
from tqdm import tqdm

from galore_jax.training.metrics import Metrics, format_bytes
from galore_jax.training.task import Line

# The metrics of a step, in the order in which a line has them.
MEASURED = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "coordinates_norm",
    "targets",
    "subspace_overlap",
    "refreshes_saved",
    "skipped",
)
SLOW_STEP = 1.0
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Collects the metrics of steps, without waiting for the device until `report` is called.

    Args:
      metrics: writes the lines; None: this process does not report, and `report` only waits.
      start: number of updates made before.
      steps: number of updates of the run.
      targets: what the losses are of, in the plural.

    Attributes:
      is_slow: whether steps take so long that each should be reported; True for the first one.
    """

    def __init__(self, metrics: Metrics | None, start: int, steps: int, targets: str):
        self.is_slow = True
        self._targets = targets
        self._metrics = metrics
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        lines = [] if metrics is None else metrics.lines
        self._seconds = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self._skipped = max((line.get("skipped", 0) for line in lines), default=0)
        self._warned: set[str] = set()
        # Files and pipes receive an occasional line instead of a moving bar.
        pause = 0.2 if sys.stderr.isatty() else 15
        self._bar = tqdm(
            total=steps,
            initial=start,
            bar_format=BAR,
            mininterval=pause,
            disable=metrics is None,
        )
        lacking = start - len({line["step"] for line in lines if "loss" in line})
        if lacking:
            self._say(
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
        lines = []
        for (step, _), value in zip(self._pending, values, strict=True):
            scalars = {name: value[name].item() for name in MEASURED if name in value}
            timing = {
                f"{self._targets}_per_second": round(rate, 1),
                "seconds": round(self._seconds, 3),
            }
            lines.append({"step": step, **scalars, **timing})
        self._write(lines)
        self._pending.clear()
        self.is_slow = elapsed / len(lines) > SLOW_STEP

        for line in lines:
            self._warn_of_bad_values(line)
        last = lines[-1]
        self._bar.set_postfix_str(
            f"loss {last['loss']:.3f}, {rate:,.0f} {self._targets}/s, "
            f"lr {last['learning_rate']:.2e}, {peak_memory()}",
            refresh=False,
        )
        self._bar.update(len(lines))

    def report_evaluation(self, updates: int, evaluation: Line, sentence: str) -> None:
        """Writes the line of an evaluation after this number of updates."""
        self._write([{"step": updates, **evaluation}])
        self._say(f"step {updates:,}: {sentence}")

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

    def flush(self) -> None:
        """Waits until the lines are on disk, as a checkpoint requires."""
        if self._metrics is not None:
            self._metrics.flush()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._metrics is not None:
            self._metrics.write(lines)

    def _warn_of_bad_values(self, line: dict[str, Any]) -> None:
        if not math.isfinite(line["loss"]):
            self._warn_once(
                "loss",
                f"the loss at step {line['step']:,} is not finite; a lower "
                "optimizer.learning_rate or an optimizer.clip_norm may help",
            )
        if not line["targets"]:
            self._warn_once(
                "targets",
                f"the batch of step {line['step']:,} has no targets, since no two tokens are "
                "of one document; are many documents of data.source empty?",
            )
        if line.get("skipped", 0) > self._skipped:
            self._warn_once(
                "skipped",
                f"the gradients of some matrices at step {line['step']:,} are not finite; their "
                "updates are skipped, and counted as skipped in metrics.jsonl",
            )

    def _warn_once(self, metric: str, sentence: str) -> None:
        if metric not in self._warned:
            self._warned.add(metric)
            self._say(f"warning: {sentence}")

    def _say(self, sentence: str) -> None:
        if self._metrics is not None:
            self._bar.write(sentence, file=sys.stderr)


def peak_memory() -> str:
    """The peak memory of the first device, or of the process if that is unknown."""
    if statistics := jax.local_devices()[0].memory_stats():
        return f"{format_bytes(statistics['peak_bytes_in_use'])} device memory"
    return peak_process_memory()


def peak_process_memory() -> str:
    """The peak memory of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{format_bytes(peak if sys.platform == 'darwin' else peak * 1024)} process memory"
