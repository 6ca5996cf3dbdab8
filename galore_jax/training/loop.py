"""The training loop: what to start from, the steps, and what a run leaves."""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.files import read_json, write_json, write_text
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.mesh import check_training_mesh, make_mesh, put_batch
from galore_jax.training.metrics import Metrics, format_bytes
from galore_jax.training.processes import (
    check_same,
    ending_together,
    is_first,
    largest,
    stopping_together,
)
from galore_jax.training.run_folder import RunFolder, check_same_text, check_start, open_folder
from galore_jax.training.state import TrainState, place_state, trained, tree_bytes, tree_size
from galore_jax.training.step import Stepper
from galore_jax.training.task import Data, Task


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal, after saving; the message says what was.

    Attributes:
      status: the exit status that the signal asks for, as in a shell.
      is_finished: whether the run was finished all the same.
    """

    def __init__(self, message: str, number: int, is_finished: bool):
        super().__init__(message)
        self.status, self.is_finished = 128 + number, is_finished


class Diverged(InputError):
    """The state of a training, or its evaluation, is not finite."""


class _Run(NamedTuple):
    """What the stages of a run share."""

    task: Task
    folder: RunFolder
    mesh: Mesh | None
    data: Data
    checkpoints: Checkpoints
    metrics: Metrics
    stepper: Stepper


def train(task: Task, resume: bool = False, programs: dict[Any, Any] | None = None) -> Any:
    """Trains a task as configured, into `training.folder`; `run_folder` lists the files there.

    A resumed run continues from its latest checkpoint, or from the start if there is none, and
    repeats an uninterrupted run bit for bit on the same machine. Processes that were `joined` train
    together.

    Args:
      task: the task, with the configuration of the run.
      resume: continue the run in the folder instead of starting a new one.
      programs: as for `Stepper`.

    Returns:
      The result of the task, also in its `result_file`.

    Raises:
      InputError: the configuration, a file that it names or the folder cannot be used, there is no
        GPU for the kernels, or there is too little memory.
      Diverged: parameters, optimizer state or an evaluation are not finite. The folder keeps what
        was saved before, and is not marked as finished.
      Interrupted: on SIGINT or SIGTERM, after saving the state, or finishing the run if the signal
        came after its last step had begun.
    """
    config = task.config
    check_same(f"{config} {resume}")
    with ending_together():
        if is_first():
            check_start(config, resume)
        mesh = make_mesh(config.mesh)
        check_training_mesh(task, mesh)
        data = task.open_data(mesh, partial(print, file=sys.stderr) if is_first() else None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_memory_errors(task.less_memory))
        signalled = stack.enter_context(_stop_signals())
        stack.callback(data.batches.close)
        run, state = _start(task, resume, mesh, data, programs, stack)
        try:
            state = _make_steps(run, state, stopping_together(signalled))
        except Diverged as error:
            with ending_together():
                if is_first():
                    write_text(run.folder.diverged, f"{error}\n")
                raise
        _finish(run, state)
    if number := largest(signalled()):  # It came after the last step began.
        message = f"stopped after the run in {run.folder.path} was finished."
        raise Interrupted(message, number, is_finished=True)
    return read_json(run.folder.path / task.result_file)


def _start(
    task: Task,
    resume: bool,
    mesh: Mesh | None,
    data: Data,
    programs: dict[Any, Any] | None,
    stack: contextlib.ExitStack,
) -> tuple[_Run, TrainState]:
    """Opens the folder, and restores or makes the state to start from."""
    config, training = task.config, task.config.training
    folder = RunFolder(training.folder)
    with ending_together():
        if is_first():
            stack.enter_context(open_folder(config, resume))
            check_same_text(folder, data.fingerprint(), resume)
    checkpoints = stack.enter_context(Checkpoints(folder.checkpoints))
    if checkpoints.latest() is None:
        state = place_state(task, mesh)
    else:
        state = checkpoints.restore(task, data.batches, mesh)
    start = int(state.step)
    with ending_together():
        if is_first():
            parameters = tree_size(state.params)
            updated = tree_size(trained(task, state.params)[0])
            share = f", {updated:,} of them trained" if updated < parameters else ""
            print(
                f"{folder.path}: {parameters:,} parameters{share}, "
                f"{format_bytes(tree_bytes(state.opt_state))} of optimizer state, "
                f"{'resumed at' if resume else 'from'} step {start:,} of {training.steps:,}",
                file=sys.stderr,
            )
        path = folder.metrics if is_first() else None
        metrics = stack.enter_context(Metrics(path, start, training.steps, task.targets))
    stepper = Stepper(task, mesh, programs, metrics.compiling, metrics.say)
    return _Run(task, folder, mesh, data, checkpoints, metrics, stepper), state


def _make_steps(run: _Run, state: TrainState, stops: Callable[[], int]) -> TrainState:
    """Makes the steps that are left, with evaluations and checkpoints between them."""
    training, metrics, batches = run.task.config.training, run.metrics, run.data.batches
    start, steps = int(state.step), training.steps
    is_evaluated = any(line["step"] == steps for line in metrics.evaluations())
    if start == steps and not largest(is_evaluated):
        _evaluate(run, state, steps)
    for step in range(start, steps):
        state, measured = run.stepper(state, put_batch(next(batches), run.mesh))
        metrics.add(step, measured)
        done, signalled = step + 1, stops()
        evaluates = _is_due(done, training.evaluate_every, steps)
        saves = signalled or _is_due(done, training.checkpoint_every, steps)
        if evaluates or saves or done % training.log_every == 0 or metrics.is_slow:
            metrics.report()
        if evaluates:
            _evaluate(run, state, done)
        if saves:
            metrics.flush()
            if not run.checkpoints.save(state, batches, run.task.config):
                raise _diverged(run, "the parameters or the optimizer's state", done)
        if signalled and done < steps:
            run.checkpoints.wait()
            message = f"stopped after {done:,} of {steps:,} steps, all saved."
            raise Interrupted(message, signalled, is_finished=False)
    run.checkpoints.wait()
    return state


def _evaluate(run: _Run, state: TrainState, done: int) -> None:
    """Evaluates, and keeps the parameters if the task wants to."""
    with run.metrics.clock_stopped():
        evaluation = run.data.evaluate(state.params)
        run.metrics.report_evaluation(done, evaluation, run.task.describe(evaluation))
        if not math.isfinite(evaluation[run.task.metric]):
            raise _diverged(run, f"the evaluation ({run.task.metric})", done)
        with ending_together():
            if is_first():
                run.task.keep(run.folder, state.params, run.metrics.evaluations())


def _finish(run: _Run, state: TrainState) -> None:
    """Writes the result of a complete run."""
    with ending_together():
        if not is_first():
            return
        updates = [line for line in run.metrics.lines if "loss" in line]
        if not updates:
            raise InputError(
                f"{run.folder.path} has its last checkpoint but no steps in metrics.jsonl, which "
                "the summary needs: restore the file, or name another training.folder."
            )
        seconds = updates[-1]["seconds"]
        costs = {
            "parameters": tree_size(state.params),
            "optimizer_bytes": tree_bytes(state.opt_state),
            "seconds": seconds,
            "compile_seconds": run.stepper.compile_seconds,
            f"{run.task.targets}_per_second": sum(line["targets"] for line in updates) / seconds,
        }
        result = run.task.finish(run.folder, run.metrics.evaluations(), costs)
        write_json(run.folder.path / run.task.result_file, result)


def _diverged(run: _Run, what: str, done: int) -> Diverged:
    run.checkpoints.wait()
    latest = run.checkpoints.latest()
    kept = "there is no checkpoint" if latest is None else f"the latest checkpoint is of {latest:,}"
    return Diverged(
        f"{what} of {run.folder.path} after {done:,} of {run.task.config.training.steps:,} steps "
        f"are not finite, so the run ends ({kept}): lower optimizer.learning_rate, or set "
        "optimizer.clip_norm, and name another training.folder."
    )


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def _memory_errors(remedy: str) -> Iterator[None]:
    """Turns Python's and JAX's errors for it into an `InputError` that ends in a remedy."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"there is too little memory for this training: {remedy}.") from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns which of SIGINT and SIGTERM was received, or 0.

    A second signal has its usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received = 0

    def record(number: int, frame: Any) -> None:
        nonlocal received
        received = number
        signal.signal(number, previous[number])
        os.write(
            2,
            b"\nstopping after this step, then saving; a second signal stops at once, and --resume "
            b"continues from the last checkpoint\n",
        )

    previous: dict[int, Any] = {
        number: signal.signal(number, record) or signal.SIG_DFL
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
