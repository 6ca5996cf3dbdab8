"""Fine-tuning on GLUE, once for each seed."""

import functools
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from galore_jax.data.glue import TASKS, encode, load_examples
from galore_jax.data.packing import Rows
from galore_jax.data.text_pairs import PairTokenizer, load_pair_tokenizer
from galore_jax.errors import InputError
from galore_jax.files import read_json, write_json, write_text
from galore_jax.interop.encoders import encoder_config
from galore_jax.lock import locked
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config import TrainingConfig
from galore_jax.training.config_file import changed, to_toml
from galore_jax.training.finetune_config import FinetuneConfig
from galore_jax.training.glue import RESULT, Glue, SeedConfig
from galore_jax.training.loop import Diverged, train
from galore_jax.training.run_folder import RunFolder, check_same_run, recorded_config
from galore_jax.training.stepper import check_gpu

# The key of the result of a run that diverged, in runs of earlier versions.
DIVERGED = "diverged"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tunes as configured, evaluates after each epoch and keeps the best checkpoint.

    The best checkpoint of a seed has the largest first metric of the task on the first validation
    split; it is a Hugging Face folder, `seed-N/`, with the tokenizer of the model. Seeds that an
    earlier call completed in the same folder, with the same settings, are not trained again, even
    if they diverged; one that was interrupted continues.

    Returns:
      The summary, also written as summary.json: `metric`, the first of the task; `best`, its value
      for each seed; their `mean` and standard `deviation` (0 for one seed); `optimizer_bytes`, of
      the state; and the `seconds` of all steps, for each seed.

    Raises:
      Diverged: a seed diverged, now or in an earlier call; those after it are not trained.
      InputError: the folder holds results of other settings, another process works there, there is
        too little memory, the devices do not fit the mesh, or the checkpoint, its tokenizer or the
        data cannot be used.
    """
    check_start(config)
    folder, missing = RunFolder(config.training.folder), missing_seeds(config)
    results = [
        _read_result(config, seed) for seed in range(config.training.seeds) if seed not in missing
    ]
    if missing:
        results = _finetune_seeds(config)
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
    written = folder.summary
    if missing or not written.exists() or len(read_json(written)["best"]) < len(best):
        write_json(written, summary)
    return summary


def check_start(config: FinetuneConfig) -> None:
    """Raises what `finetune` raises before it reads the checkpoint and the data.

    Raises:
      InputError: the folder holds results of other settings, or there is no GPU for the kernels.
    """
    _check_folder(config)
    if missing_seeds(config):
        check_gpu(config.optimizer)


def missing_seeds(config: FinetuneConfig) -> list[int]:
    """The seeds without a result in the folder."""
    folders = {seed: _seed_folder(config, seed) for seed in range(config.training.seeds)}
    return [
        seed
        for seed, run in folders.items()
        if not ((run.path / RESULT).is_file() or run.diverged.exists())
    ]


def glue_task(config: FinetuneConfig) -> Glue:
    """The task of the first seed, in its folder, with the data read.

    Raises:
      InputError: the checkpoint, its tokenizer or the data cannot be used, or the warm-up is longer
        than the training.
    """
    checkpoint, data, task = config.model.checkpoint, config.data, TASKS[config.data.task]
    encoder, tokenizer = encoder_config(checkpoint), load_pair_tokenizer(checkpoint)
    _check_fit(config, encoder, tokenizer)
    if encoder.architecture == "bert":
        # Multilingual ones have the vocabulary of another model, and config.json need not say so.
        encoder = replace(encoder, pad_id=tokenizer.pad_id)
    with_test = config.training.predict
    rows = _encoded_splits(checkpoint, data.source, task.name, data.sequence_length, with_test)
    epoch = -(-len(rows["train"]["tokens"]) // data.batch_size)
    training = TrainingConfig(
        steps=config.training.epochs * epoch,
        evaluate_every=epoch,
        keep_checkpoints=1,
        folder=str(_seed_folder(config, 0).path),
    )
    if config.optimizer.warmup_steps > training.steps:
        raise InputError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, but there are only "
            f"{training.steps} steps: shorten the warm-up."
        )
    run = SeedConfig(config.model, data, config.optimizer, training, config.mesh)
    return Glue(run, task, Classifier(encoder, task.num_outputs), rows, with_test)


def _finetune_seeds(config: FinetuneConfig) -> list[dict[str, Any]]:
    """Fine-tunes with the seeds that are missing; the results of all."""
    folder, programs = RunFolder(config.training.folder), {}
    task = glue_task(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.lock, f"fine-tuning in {folder.path}", "name another training.folder"):
        # Another process may have written here since the first check.
        _check_folder(config)
        write_text(folder.config, to_toml(config))
        results, missing = [], missing_seeds(config)
        for seed in range(config.training.seeds):
            if seed in missing:
                run = _seed_folder(config, seed)
                if not run.config.exists():
                    run.metrics.unlink(missing_ok=True)  # Earlier versions could not resume.
                training = {"seed": seed, "folder": str(run.path)}
                of_seed = changed(task.config, training=training)
                train(replace(task, config=of_seed), resume=run.holds_run(), programs=programs)
                shutil.rmtree(run.checkpoints)  # The best one stays.
            results.append(_read_result(config, seed))
        return results


def _seed_folder(config: FinetuneConfig, seed: int) -> RunFolder:
    return RunFolder(Path(config.training.folder) / f"seed-{seed}")


def _read_result(config: FinetuneConfig, seed: int) -> dict[str, Any]:
    """The recorded result of a seed; raises `Diverged` if it diverged."""
    run = _seed_folder(config, seed)
    result = {DIVERGED: run.diverged.read_text()} if run.diverged.exists() else None
    result = result or read_json(run.path / RESULT)
    if DIVERGED in result:
        raise Diverged(result[DIVERGED].strip())
    return result


@functools.lru_cache(maxsize=1)
def _encoded_splits(
    checkpoint: str, source: str, task: str, length: int, with_test: bool
) -> dict[str, Rows]:
    """The rows of each split; a comparison fine-tunes many times on the same ones."""
    tokenizer, splits = load_pair_tokenizer(checkpoint), TASKS[task].files
    return {
        split: encode(load_examples(TASKS[task], split, source), tokenizer, length)
        for split in splits
        if with_test or not split.startswith("test")
    }


def _check_folder(config: FinetuneConfig) -> None:
    """Raises an `InputError` if the folder holds a training, or results of other settings."""
    folder = RunFolder(config.training.folder)
    if folder.config.exists():
        recorded = recorded_config(folder, FinetuneConfig)
        check_same_run(recorded, config, folder.path)


def _check_fit(config: FinetuneConfig, encoder: EncoderConfig, tokenizer: PairTokenizer) -> None:
    """Raises an `InputError` unless tokenizer, rows and model fit together."""
    # RoBERTa's positions depend on the padding, BERT's do not.
    other_padding = encoder.architecture == "roberta" and tokenizer.pad_id != encoder.pad_id
    if tokenizer.vocab_size > encoder.vocab_size or other_padding:
        raise InputError(
            f"the tokenizer in {config.model.checkpoint} does not belong to the model: it has "
            f"{tokenizer.vocab_size} tokens with padding {tokenizer.pad_id}, and the model "
            f"{encoder.vocab_size} with padding {encoder.pad_id}."
        )
    _, types = tokenizer.encode([("a", "b")], 16)
    if types.max() >= encoder.token_types:
        raise InputError(
            f"the tokenizer in {config.model.checkpoint} does not belong to the model: it marks "
            f"the second text with token type {types.max()}, and the model has "
            f"{encoder.token_types} types."
        )
    if config.data.sequence_length > encoder.max_length:
        raise InputError(
            f"data.sequence_length is {config.data.sequence_length}, but the model in "
            f"{config.model.checkpoint} takes only {encoder.max_length}: shorten the sequences."
        )
