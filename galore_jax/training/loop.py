"""The training loop, top to bottom."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax

from galore_jax.data.batches import train_batches, validation_batches
from galore_jax.data.tokenizers import Tokenizer, load_tokenizer
from galore_jax.errors import FULL_DISK, InputError
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import Config
from galore_jax.training.evaluate import (
    bigram_loss,
    check_bigram_vocabulary,
    make_evaluate,
    perplexity,
)
from galore_jax.training.metrics import Metrics, Summary, format_bytes, write_summary
from galore_jax.training.plots import plot_curves
from galore_jax.training.progress import Progress
from galore_jax.training.run_folder import (
    RunFolder,
    open_folder,
    refuse_wrong_start,
    resume_command,
)
from galore_jax.training.state import init_state, tree_bytes, tree_size
from galore_jax.training.stepper import Stepper


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; everything is saved, and the message says how to go on."""


def train(config: Config, resume: bool = False) -> Summary:
    """Trains as configured, into `training.folder`; see `folder` for what lies there afterwards.

    A resumed run goes on from its latest checkpoint, or from the start if it had not reached one,
    and repeats an uninterrupted run bit for bit on the same machine.

    Args:
      config: of the whole run.
      resume: go on with the run in the folder, instead of starting one.

    Returns:
      The summary, also written as summary.json.

    Raises:
      InputError: the configuration, its files or the folder cannot be used, or the disk or the
        memory is full.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    refuse_wrong_start(config, resume)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_vocabulary(config, tokenizer)
    if jax.process_count() > 1:
        raise InputError("training on several processes is not built yet: start a single one.")
    processes = jax.process_index(), jax.process_count()
    batches = train_batches(config.data, tokenizer, *processes)
    validation = validation_batches(config.data, tokenizer, *processes)
    training, steps = config.training, config.training.steps

    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_disk_told(config))
        stack.enter_context(_full_memory_told())
        stopped = stack.enter_context(_stop_signals())
        stack.callback(batches.close)
        run = stack.enter_context(open_folder(config, resume))
        checkpoints = Checkpoints(run.checkpoints, training.keep_checkpoints)
        stack.enter_context(checkpoints)
        if checkpoints.latest() is None:
            state = jax.jit(lambda: init_state(config))()
        else:
            state = checkpoints.restore(config, batches)
        start = int(state.step)
        if start == steps and not run.metrics.exists():
            raise InputError(
                f"{run.path} has its last checkpoint but no {run.metrics.name}, which the summary "
                "is made of: put it back, or name another training.folder."
            )
        parameters, optimizer_bytes = tree_size(state.params), tree_bytes(state.opt_state)
        print(
            f"{run.path}: {parameters:,} parameters, {format_bytes(optimizer_bytes)} of optimizer "
            f"state, {'resumed at' if resume else 'from'} step {start:,} of {steps:,}",
            file=sys.stderr,
        )
        stepper = Stepper(config, state)
        evaluate = make_evaluate(config)
        metrics = Metrics(run, start, training.tensorboard)
        stack.callback(metrics.close)
        progress = stack.enter_context(Progress(metrics, start, steps))

        for step in range(start, steps):
            state, measured = stepper(state, next(batches))
            progress.add(step, measured)
            done, stop = step + 1, stopped()
            evaluates = _is_due(done, training.evaluate_every, steps)
            saves = stop or _is_due(done, training.checkpoint_every, steps)
            if evaluates or saves or done % training.log_every == 0 or progress.is_slow:
                progress.report()
            if evaluates:
                with progress.clock_stopped():
                    found = evaluate(state.params, validation)
                progress.report_evaluation(done, found)
            if saves:
                metrics.flush()
                checkpoints.save(state, batches, config)
            if stop and done < steps:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped after {done:,} of {steps:,} steps, all saved. Go on with\n"
                    f"  {resume_command(config)}"
                )
        checkpoints.wait()

        bigram = None
        if training.bigram:
            seen = islice(train_batches(config.data, tokenizer, *processes), steps)
            bigram = bigram_loss(seen, validation, tokenizer.vocab_size, training.evaluation_tokens)
        updates = [line for line in metrics.lines if "loss" in line]
        last = [line for line in metrics.lines if "validation_loss" in line][-1]
        summary = Summary(
            name=run.path.name,
            steps=steps,
            parameters=parameters,
            validation_loss=last["validation_loss"],
            validation_perplexity=perplexity(last["validation_loss"]),
            reference_perplexity=perplexity(last["reference_loss"]),
            bigram_loss=bigram,
            optimizer_bytes=optimizer_bytes,
            seconds=updates[-1]["seconds"],
            compile_seconds=stepper.compile_seconds,
            tokens_per_second=sum(line["targets"] for line in updates) / updates[-1]["seconds"],
        )
        write_summary(run, summary)
        plot_curves([run.path], run.curves)
    print(summary.table())
    return summary


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    if config.training.bigram:
        check_bigram_vocabulary(tokenizer.vocab_size)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size, {config.model.vocab_size}: set model.vocab_size to at least "
            f"{tokenizer.vocab_size}."
        )


def _is_due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGINT or SIGTERM came; a second one acts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        os.write(
            2,
            b"\nfinishing this step, then saving; once more stops at once, and --resume goes on "
            b"from the last checkpoint\n",
        )

    previous: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _full_disk_told(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        started = RunFolder(config.training.folder).holds_run()
        command = resume_command(config) if started else "the same command"
        raise InputError(
            f"the disk is full while writing {error.filename or config.training.folder}; what was "
            f"saved before is intact: free some space, then go on with {command}"
        ) from error


@contextlib.contextmanager
def _full_memory_told() -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "there is too little memory for this training: lower data.batch_size, raise "
            "training.accumulation or set training.layerwise = true; scripts/memory.py tells what "
            "a configuration needs."
        ) from error
