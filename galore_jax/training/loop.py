"""The training loop, top to bottom."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from galore_jax.data.batches import fingerprint, train_batches, validation_batches
from galore_jax.data.tokenizers import Tokenizer, load_tokenizer
from galore_jax.errors import InputError, names_full_disk
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import Config
from galore_jax.training.config_file import to_dict
from galore_jax.training.evaluate import make_evaluate, perplexity
from galore_jax.training.layout import put_batch, training_mesh
from galore_jax.training.metrics import (
    Metrics,
    Summary,
    format_bytes,
    read_summary,
    write_summary,
)
from galore_jax.training.plots import plot_curves
from galore_jax.training.processes import check_same, ending_together, is_first, stopping_together
from galore_jax.training.progress import Progress
from galore_jax.training.run_folder import (
    RunFolder,
    check_same_text,
    check_start,
    open_folder,
    resume_command,
)
from galore_jax.training.state import place_state, trained, tree_bytes, tree_size
from galore_jax.training.stepper import Stepper, check_gpu, raise_on_full_memory

# How to resume several processes: those that a cluster starts have no such arguments.
_EVERY_PROCESS = " every process (adding its --coordinator, --processes and --process, if given)"

_LESS_MEMORY = (
    "lower data.batch_size, raise training.accumulation or set training.layerwise = true; "
    "scripts/memory.py shows how much a configuration needs"
)


class Interrupted(KeyboardInterrupt):
    """Stopped by SIGINT or SIGTERM; the message says what is saved, and how to resume."""


def train(config: Config, resume: bool = False) -> Summary:
    """Trains as configured, into `training.folder`; `run_folder` lists the files there.

    A resumed run continues from its latest checkpoint, or from the start if there is none, and
    repeats an uninterrupted run bit for bit on the same machine. Several processes that were joined
    (see processes.py) train together; process 0 writes the files.

    Args:
      config: the configuration of the run.
      resume: continue the run in the folder instead of starting a new one.

    Returns:
      The summary, also written as summary.json.

    Raises:
      InputError: the configuration, a file that it names or the folder cannot be used, there is no
        GPU for the kernels, the disk is full, or there is too little memory.
      Interrupted: on SIGINT or SIGTERM, after saving the state, unless it is not finite.
    """
    check_same(to_dict(config) | {"arguments": {"resume": resume}})
    with ending_together():
        if is_first():
            check_start(config, resume)
        check_gpu(config.optimizer)
        tokenizer = load_tokenizer(config.data.tokenizer)
        _check_vocabulary(config, tokenizer)
        mesh = training_mesh(config)
        report = partial(print, file=sys.stderr) if is_first() else None
        batches = train_batches(config.data, tokenizer, report)
        validation = validation_batches(config.data, tokenizer, report)
    training, steps = config.training, config.training.steps

    with contextlib.ExitStack() as stack:
        # The folder, and the state to start from.
        stack.enter_context(_raise_on_full_disk(config))
        stack.enter_context(raise_on_full_memory(_LESS_MEMORY))
        stops = stopping_together(stack.enter_context(_stop_signals()))
        stack.callback(batches.close)
        run = RunFolder(training.folder)
        with ending_together():
            if is_first():
                stack.enter_context(open_folder(config, resume))
                check_same_text(run, fingerprint(config.data), resume)
        checkpoints = Checkpoints(run.checkpoints, training.keep_checkpoints)
        stack.enter_context(checkpoints)
        if checkpoints.latest() is None:
            state = place_state(config, mesh)
        else:
            state = checkpoints.restore(config, batches, mesh)
        start = int(state.step)
        parameters, optimizer_bytes = tree_size(state.params), tree_bytes(state.opt_state)
        metrics = None
        with ending_together():
            if is_first():
                metrics = Metrics(run, start, training.tensorboard)
                stack.callback(metrics.close)
                if start == steps:
                    _check_metrics(run, metrics)
                updated = tree_size(trained(config, state.params)[0])
                share = f", {updated:,} of them trained" if updated < parameters else ""
                print(
                    f"{run.path}: {parameters:,} parameters{share}, "
                    f"{format_bytes(optimizer_bytes)} of optimizer state, "
                    f"{'resumed at' if resume else 'from'} step {start:,} of {steps:,}",
                    file=sys.stderr,
                )
        stepper = Stepper(config, state, mesh)
        evaluate = make_evaluate(config, mesh)
        progress = stack.enter_context(Progress(metrics, start, steps))

        if start == steps:  # The last evaluation of a finished run may be missing.
            progress.report_evaluation(steps, evaluate(state.params, validation))

        # The steps, with evaluations and checkpoints between them.
        for step in range(start, steps):
            state, measured = stepper(state, put_batch(next(batches), mesh))
            progress.add(step, measured)
            done, stop = step + 1, stops()
            evaluates = _is_due(done, training.evaluate_every, steps)
            saves = stop or _is_due(done, training.checkpoint_every, steps)
            if evaluates or saves or done % training.log_every == 0 or progress.is_slow:
                progress.report()
            if evaluates:
                with progress.clock_stopped():
                    evaluation = evaluate(state.params, validation)
                progress.report_evaluation(done, evaluation)
            if saves:
                progress.flush()
                if not checkpoints.save(state, batches, config):
                    progress.report_unsaved(done, checkpoints.latest())
            if stop and done < steps:
                checkpoints.wait()
                raise Interrupted(_how_to_resume(config, done, checkpoints.latest()))
        checkpoints.wait()

        # The summary and the curves.
        with ending_together():
            if metrics is not None:
                updates = [line for line in metrics.lines if "loss" in line]
                last = [line for line in metrics.lines if "validation_loss" in line][-1]
                seconds = updates[-1]["seconds"]
                summary = Summary(
                    name=run.path.name,
                    steps=steps,
                    parameters=parameters,
                    validation_loss=last["validation_loss"],
                    validation_perplexity=perplexity(last["validation_loss"]),
                    reference_perplexity=perplexity(last["reference_loss"]),
                    optimizer_bytes=optimizer_bytes,
                    seconds=seconds,
                    compile_seconds=stepper.compile_seconds,
                    tokens_per_second=sum(line["targets"] for line in updates) / seconds,
                )
                plot_curves([run.path], run.curves)
                write_summary(run, summary)  # Last, as it marks a run as finished.
                print(summary.table())
    return read_summary(run)


def _how_to_resume(config: Config, done: int, latest: int | None) -> str:
    """What a run that is stopped says; it resumes from the latest checkpoint."""
    stopped = f"stopped after {done:,} of {config.training.steps:,} steps"
    every = _EVERY_PROCESS if jax.process_count() > 1 else ""
    if latest == done:
        return f"{stopped}, all saved. Resume{every} with\n  {resume_command(config)}"
    place = "the start" if latest is None else f"the checkpoint at step {latest:,}"
    return (
        f"{stopped}. The state is not finite and was not saved. Start another run with a lower "
        f"optimizer.learning_rate: this one would continue from {place} and diverge again."
    )


def _check_metrics(run: RunFolder, metrics: Metrics) -> None:
    if not any("loss" in line for line in metrics.lines):
        raise InputError(
            f"{run.path} has its last checkpoint but no steps in {run.metrics.name}, which the "
            "summary needs: restore the file, or name another training.folder."
        )


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        remedy = f"set model.vocab_size to at least {tokenizer.vocab_size}"
        if config.model.checkpoint:
            remedy = (
                "remove the added ones, or enlarge the checkpoint's embedding by transformers' "
                f"resize_token_embeddings({tokenizer.vocab_size})"
            )
        raise InputError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size, {config.model.vocab_size}: {remedy}."
        )


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM was received.

    A second signal has its usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = []

    def record(number: int, frame: Any) -> None:
        received.append(number)
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
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _raise_on_full_disk(config: Config) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not names_full_disk(error):
            raise
        path = getattr(error, "filename", None)
        has_run = RunFolder(config.training.folder).holds_run()
        command = resume_command(config) if has_run else "the same command"
        raise InputError(
            f"the disk is full while writing {path or config.training.folder}; what was saved "
            f"before is intact: free some space, then resume with {command}"
        ) from error
