"""Fine-tuning on GLUE, once for each seed."""

import contextlib
import functools
import shutil
import statistics
from dataclasses import replace
from typing import Any

from galore_jax.data.glue_tasks import TASKS, encode, load_examples
from galore_jax.data.packing import Rows
from galore_jax.data.text_pairs import PairTokenizer
from galore_jax.errors import InputError
from galore_jax.files import locked, read_json, write_json, write_text
from galore_jax.interop.encoders import encoder_config
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config import FinetuneConfig, TrainingConfig
from galore_jax.training.config_file import changed, to_toml
from galore_jax.training.glue import RESULT, Glue, SeedConfig
from galore_jax.training.loop import Diverged, train
from galore_jax.training.run_folder import RunFolder, check_same_run, recorded_config


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tunes as configured, evaluates after each epoch and keeps the best model.

    The folder of a seed, `seed-N/`, becomes one of Hugging Face, with the model that has the
    largest first metric of the task on the first validation split. Seeds that an earlier call
    completed are not trained again, even if they diverged; one that was interrupted continues.

    Returns:
      The summary, also written as summary.json: `metric`, the first of the task; `best`, its value
      for each seed; their `mean` and standard `deviation` (0 for one seed); `optimizer_bytes`, of
      the state; and the `seconds` of all steps, for each seed.

    Raises:
      Diverged: a seed diverged, now or in an earlier call; those after it are not trained.
      InputError: the folder holds results of other settings, or another process works there; and as
        for `make_task` and `train`.
    """
    folder = RunFolder(config.training.folder)
    _check_folder(folder, config)
    results, task, programs = [], None, {}
    with contextlib.ExitStack() as stack:
        for seed in range(config.training.seeds):
            run = RunFolder(folder.path / f"seed-{seed}")
            if not ((run.path / RESULT).exists() or run.diverged.exists()):
                if task is None:
                    task = make_task(config)
                    folder.path.mkdir(parents=True, exist_ok=True)
                    work = f"fine-tuning in {folder.path}"
                    stack.enter_context(locked(folder.lock, work, "name another training.folder"))
                    _check_folder(folder, config)  # Another process may have written here since.
                    write_text(folder.config, to_toml(config))
                of_seed = changed(task.config, training={"seed": seed, "folder": str(run.path)})
                train(replace(task, config=of_seed), resume=run.holds_run(), programs=programs)
            if run.diverged.exists():
                raise Diverged(run.diverged.read_text().strip())
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # The best one stays.
            results.append(read_json(run.path / RESULT))
    best = [result["best"] for result in results]
    summary = {
        "task": config.data.task,
        "metric": TASKS[config.data.task].metrics[0],
        "best": best,
        "mean": statistics.mean(best),
        "deviation": statistics.stdev(best) if len(best) > 1 else 0.0,
        "optimizer_bytes": results[0]["optimizer_bytes"],
        "seconds": [result["seconds"] for result in results],
    }
    # A summary of more seeds stays.
    if task or not folder.summary.exists() or len(read_json(folder.summary)["best"]) < len(best):
        write_json(folder.summary, summary)
    return summary


def make_task(config: FinetuneConfig) -> Glue:
    """The task of a fine-tuning, with the data read; each seed needs a seed and a folder.

    Raises:
      InputError: the checkpoint, its tokenizer or the data cannot be used, or the warm-up is longer
        than the training.
    """
    checkpoint, data, task = config.model.checkpoint, config.data, TASKS[config.data.task]
    encoder, tokenizer = encoder_config(checkpoint), PairTokenizer(checkpoint)
    _check_fit(config, encoder, tokenizer)
    if encoder.architecture == "bert":
        # Multilingual ones have the vocabulary of another model, and config.json need not say so.
        encoder = replace(encoder, pad_id=tokenizer.pad_id)
    rows = _encoded_splits(checkpoint, data.source, task.name, data.sequence_length)
    epoch = -(-len(rows["train"]["tokens"]) // data.batch_size)
    steps, warmup = config.training.epochs * epoch, config.optimizer.warmup_steps
    if warmup > steps:
        raise InputError(
            f"optimizer.warmup_steps is {warmup}, but there are only {steps} steps: shorten the "
            "warm-up."
        )
    training = TrainingConfig(steps, evaluate_every=epoch, folder=config.training.folder)
    run = SeedConfig(config.model, data, config.optimizer, training, config.mesh)
    return Glue(run, task, Classifier(encoder, task.num_outputs), rows)


def _check_folder(folder: RunFolder, config: FinetuneConfig) -> None:
    if folder.config.exists():
        check_same_run(recorded_config(folder, FinetuneConfig), config, folder.path)


@functools.lru_cache(maxsize=1)
def _encoded_splits(checkpoint: str, source: str, task: str, length: int) -> dict[str, Rows]:
    """The rows of each split; a comparison fine-tunes many times on the same ones."""
    tokenizer = PairTokenizer(checkpoint)
    return {
        split: encode(load_examples(TASKS[task], split, source), tokenizer, length)
        for split in TASKS[task].files
    }


def _check_fit(config: FinetuneConfig, encoder: EncoderConfig, tokenizer: PairTokenizer) -> None:
    """Raises an `InputError` unless tokenizer, rows and model fit together."""
    types = tokenizer.encode([("a", "b")], 16)[1].max() + 1
    # RoBERTa's positions depend on the padding, BERT's do not.
    other_padding = encoder.architecture == "roberta" and tokenizer.pad_id != encoder.pad_id
    has_more = tokenizer.vocab_size > encoder.vocab_size or types > encoder.token_types
    if has_more or other_padding:
        raise InputError(
            f"the tokenizer in {config.model.checkpoint} does not belong to the model: it has "
            f"{tokenizer.vocab_size} tokens, padding {tokenizer.pad_id} and {types} token types, "
            f"and the model {encoder.vocab_size}, padding {encoder.pad_id} and "
            f"{encoder.token_types}."
        )
    if config.data.sequence_length > encoder.max_length:
        raise InputError(
            f"data.sequence_length is {config.data.sequence_length}, but the model in "
            f"{config.model.checkpoint} takes only {encoder.max_length}: shorten the sequences."
        )
