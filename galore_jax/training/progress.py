"""What one sees of a running training: the bar, the clock, and the lines for metrics.jsonl."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

import jax
from tqdm import tqdm

from galore_jax.training.evaluate import Evaluation
from galore_jax.training.metrics import Metrics, format_bytes

# What a step may have measured, in the order of a line.
MEASURED = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "coordinates_norm",
    "targets",
    "subspace_overlap",
    "refreshes_saved",
    "skipped",
    "captured_energy",
    "update_ratio",
)
SLOW_STEP = 1.0
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Collects what steps measured, without waiting for the device until `report` is called.

    Args:
      metrics: where the lines go.
      start: updates made before.
      steps: updates in all.

    Attributes:
      is_slow: whether steps last so long that each deserves a report; so does the very first.
    """

    def __init__(self, metrics: Metrics, start: int, steps: int):
        self.is_slow = True
        self._metrics = metrics
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._seconds = max((line.get("seconds", 0.0) for line in metrics.lines), default=0.0)
        self._skipped = max((line.get("skipped", 0) for line in metrics.lines), default=0)
        self._warned: set[str] = set()
        # Files and pipes get a line now and then instead of a moving bar.
        pause = 0.2 if sys.stderr.isatty() else 15
        self._bar = tqdm(total=steps, initial=start, bar_format=BAR, mininterval=pause)

    def __enter__(self) -> Self:
        self._mark = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def add(self, step: int, measured: dict[str, jax.Array]) -> None:
        """Takes the step's scalars, which may not be computed yet."""
        self._pending.append((step, measured))

    def report(self) -> None:
        """Waits for the steps added, writes their lines and moves the bar."""
        values = jax.device_get([measured for _, measured in self._pending])
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self._seconds += elapsed
        rate = float(sum(value["targets"] for value in values)) / elapsed
        lines = []
        for (step, _), value in zip(self._pending, values, strict=True):
            scalars = {name: value[name].item() for name in MEASURED if name in value}
            timing = {"tokens_per_second": round(rate, 1), "seconds": round(self._seconds, 3)}
            lines.append({"step": step, **scalars, **timing})
        self._metrics.write(lines)
        self._pending.clear()
        self.is_slow = elapsed / len(lines) > SLOW_STEP

        for line in lines:
            self._warn_of_numbers(line)
        last = lines[-1]
        self._bar.set_postfix_str(
            f"loss {last['loss']:.3f}, {rate:,.0f} tokens/s, lr {last['learning_rate']:.2e}, "
            f"{memory()}",
            refresh=False,
        )
        self._bar.update(len(lines))

    def report_evaluation(self, updates: int, found: Evaluation) -> None:
        """Writes the line of an evaluation after so many updates."""
        self._metrics.write(
            [
                {
                    "step": updates,
                    "validation_loss": found.loss,
                    "reference_loss": found.reference_loss,
                    "validation_targets": found.targets,
                }
            ]
        )
        self._say(
            f"step {updates:,}: validation loss {found.loss:.4f}, perplexity "
            f"{found.perplexity:,.2f} ({found.reference_perplexity:,.2f} as the reference counts)"
        )

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside does not count as training time; report before it."""
        yield
        self._mark = time.perf_counter()

    def _warn_of_numbers(self, line: dict[str, Any]) -> None:
        if not math.isfinite(line["loss"]):
            self._warn_once(
                "loss",
                f"the loss at step {line['step']:,} is not finite; a lower "
                "optimizer.learning_rate or an optimizer.clip_norm may help",
            )
        if not line["targets"]:
            self._warn_once(
                "targets",
                f"the batch of step {line['step']:,} has no two tokens of one document, so there "
                "was nothing to learn; are many documents of data.source empty?",
            )
        if line.get("skipped", 0) > self._skipped:
            self._warn_once(
                "skipped",
                f"the gradients of some matrices at step {line['step']:,} are not finite; these "
                "matrices are left as they are, and skipped in metrics.jsonl counts them",
            )

    def _warn_once(self, number: str, sentence: str) -> None:
        if number not in self._warned:
            self._warned.add(number)
            self._say(f"warning: {sentence}")

    def _say(self, sentence: str) -> None:
        self._bar.write(sentence, file=sys.stderr)


def memory() -> str:
    """The most memory used so far: the first device's, or the process' where that is unknown."""
    if statistics := jax.local_devices()[0].memory_stats():
        return f"{format_bytes(statistics['peak_bytes_in_use'])} device memory"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{format_bytes(peak if sys.platform == 'darwin' else peak * 1024)} process memory"
