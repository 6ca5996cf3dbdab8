"""Fine-tuning an encoder on a task of GLUE, once for each seed."""

import functools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from galore_jax.data.glue import TASKS, Task, encode, load_examples, write_predictions
from galore_jax.data.glue_metrics import predictions_of, scores
from galore_jax.data.packing import Rows
from galore_jax.data.text_pairs import PairTokenizer, batches, load_pair_tokenizer
from galore_jax.errors import InputError
from galore_jax.files import read_json, write_json, write_text
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.interop.encoders import encoder_config, load_encoder, save_encoder
from galore_jax.interop.tokenizer_files import copy_tokenizer
from galore_jax.lock import locked
from galore_jax.models import adapters
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config_file import differences, load_config, to_dict, to_toml
from galore_jax.training.countdown import Countdown
from galore_jax.training.finetune_config import FinetuneConfig
from galore_jax.training.finetune_steps import Steps, finetuning_mesh, make_steps
from galore_jax.training.state import tree_bytes
from galore_jax.training.stepper import check_gpu, raise_on_full_memory
from galore_jax.types import PyTree

CONFIG = "config.toml"
# The key of a result that holds the message of a `NotFiniteError`.
DIVERGED = "diverged"


class NotFiniteError(InputError):
    """The loss or the outputs of a fine-tuning are not finite."""


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tunes as configured, evaluates after each epoch and keeps the best checkpoint.

    The best checkpoint of a seed has the largest first metric of the task on the first validation
    split; it is a Hugging Face folder, `seed-N/`, with the tokenizer of the model. Seeds that an
    earlier call completed in the same folder, with the same settings, are not trained again, even
    if they diverged.

    Returns:
      The summary, also written as summary.json: `metric`, the first of the task; `best`, its value
      for each seed; their `mean` and standard `deviation` (0 for one seed); `optimizer_bytes`, of
      the state; and `seconds` of training, evaluation and compilation included, for each seed.

    Raises:
      NotFiniteError: a seed diverged, now or in an earlier call; those after it are not trained.
      InputError: the folder holds results of other settings, another process works there, there is
        too little memory, the devices do not fit the mesh, or the checkpoint, its tokenizer or the
        data cannot be used.
    """
    check_start(config)
    folder, task = Path(config.training.folder), TASKS[config.data.task]
    seeds, missing = range(config.training.seeds), missing_seeds(config)
    results = {seed: _read_result(folder, seed) for seed in seeds if seed not in missing}
    if missing:
        with raise_on_full_memory("lower data.batch_size or data.sequence_length"):
            results |= _finetune_seeds(config, task, missing)
    best = [results[seed]["best"] for seed in seeds]
    summary = {
        "task": task.name,
        "metric": task.metrics[0],
        **over_seeds(best),
        "optimizer_bytes": results[0]["optimizer_bytes"],
        "seconds": [results[seed]["seconds"] for seed in seeds],
    }
    # A summary of more seeds stays.
    written = folder / "summary.json"
    if missing or not written.exists() or len(read_json(written)["best"]) < len(best):
        write_json(written, summary)
    return summary


def over_seeds(best: list[float]) -> dict[str, Any]:
    """The part of a summary about the metric: its value for each seed, mean and deviation."""
    deviation = statistics.stdev(best) if len(best) > 1 else 0.0
    return {"best": best, "mean": statistics.mean(best), "deviation": deviation}


def check_start(config: FinetuneConfig) -> None:
    """Raises what `finetune` raises before it reads the checkpoint and the data.

    Raises:
      InputError: the folder holds results of other settings, or there is no GPU for the kernels.
    """
    _check_folder(Path(config.training.folder), config)
    if missing_seeds(config):
        check_gpu(config.optimizer)


def missing_seeds(config: FinetuneConfig) -> list[int]:
    """The seeds without a result in the folder."""
    folder = Path(config.training.folder)
    return [seed for seed in range(config.training.seeds) if not _result(folder, seed).is_file()]


def _finetune_seeds(
    config: FinetuneConfig, task: Task, seeds: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Fine-tunes with these seeds, and records and returns the result of each."""
    folder = Path(config.training.folder)
    encoder = encoder_config(config.model.checkpoint)
    tokenizer = load_pair_tokenizer(config.model.checkpoint)
    _check_fit(config, encoder, tokenizer)
    if encoder.architecture == "bert":
        # Multilingual ones have the vocabulary of another model, and config.json need not say so.
        encoder = replace(encoder, pad_id=tokenizer.pad_id)
    rows = _encoded_splits(
        config.model.checkpoint,
        *(config.data.source, config.data.task, config.data.sequence_length),
        with_test=config.training.predict,
    )
    model = Classifier(encoder, task.num_outputs)
    steps = config.training.epochs * -(-len(rows["train"]["tokens"]) // config.data.batch_size)
    if config.optimizer.warmup_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, but there are only "
            f"{steps} steps: shorten the warm-up."
        )
    compiled = make_steps(config, model, steps, finetuning_mesh(config, encoder))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"fine-tuning in {folder}", "name another training.folder"):
        # Another process may have written here since the first check.
        _check_folder(folder, config)
        write_text(folder / CONFIG, to_toml(config))
        results = {}
        for seed in seeds:
            if _result(folder, seed).is_file():
                results[seed] = _read_result(folder, seed)
                continue
            try:
                results[seed] = _finetune_once(config, task, model, compiled, rows, seed)
            except NotFiniteError as error:
                write_json(_result(folder, seed), {DIVERGED: str(error)})
                raise
            write_json(_result(folder, seed), results[seed])
        return results


def _result(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}" / "result.json"


def _read_result(folder: Path, seed: int) -> dict[str, Any]:
    """The recorded result of a seed; raises a `NotFiniteError` if it diverged."""
    result = read_json(_result(folder, seed))
    if DIVERGED in result:
        raise NotFiniteError(result[DIVERGED])
    return result


def _finetune_once(
    config: FinetuneConfig,
    task: Task,
    model: Classifier,
    steps: Steps,
    rows: dict[str, Rows],
    seed: int,
) -> dict[str, Any]:
    """Fine-tunes with one seed; returns the best value of the task's first metric, and the cost."""
    start = time.perf_counter()
    place = Path(config.training.folder) / f"seed-{seed}"
    place.mkdir(exist_ok=True)
    (place / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was interrupted
    head_key, dropout_key = jax.random.split(jax.random.key(seed))
    adapter_key = jax.random.fold_in(head_key, 1)
    loaded = load_encoder(config.model.checkpoint, model, head_key, task.labels)
    if seed == 0:
        _report(loaded.initialized, "initialised at random:")
        _report(loaded.unused, "in the checkpoint, but not used:")
    params = steps.adapt(loaded.params, adapter_key)
    state = steps.init(params)
    size, pad_id = config.data.batch_size, model.config.pad_id

    def predict(params: PyTree, rows: Rows) -> np.ndarray:
        """Predictions for all rows, in order."""
        inputs = {name: rows[name] for name in ("tokens", "token_types")}
        outputs = [
            np.asarray(steps.outputs(params, steps.put(batch)))[batch["weights"] == 1]
            for batch in batches(inputs, size, pad_id)
        ]
        found = np.concatenate(outputs)
        check_finite(found, "the outputs")
        return predictions_of(task, found)

    def check_finite(values: Any, what: str) -> None:
        if not np.isfinite(values).all():
            raise NotFiniteError(
                f"{what} of epoch {epoch} of seed {seed} are not finite: lower "
                "optimizer.learning_rate, or set optimizer.clip_norm, and name another "
                "training.folder."
            )

    validation = [split for split in rows if split.startswith("validation")]
    best, count = -np.inf, 0
    new_bases = Countdown(lambda state: int(updates_until_refresh(state)))
    for epoch in range(1, config.training.epochs + 1):
        # Updates, with new bases where they are due.
        losses = []
        for batch in batches(rows["train"], size, pad_id, (seed, epoch)):
            batch, key = steps.put(batch), jax.random.fold_in(dropout_key, count)
            if steps.refresh is not None and new_bases.is_over(state):
                state = steps.refresh(params, state, batch, key)
            params, state, loss = steps.update(params, state, batch, key)
            losses.append(loss)
            count += 1
        mean_loss = float(np.mean(jax.device_get(losses)))
        check_finite(mean_loss, "the losses")
        # Evaluation; the best checkpoint is kept.
        metrics = {
            split: scores(task, predict(params, rows[split]), rows[split]["labels"])
            for split in validation
        }
        with (place / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "loss": mean_loss, **metrics}) + "\n")
        first = metrics[validation[0]]
        print(f"seed {seed}, epoch {epoch}: loss {mean_loss:.4f}, {_text(first)}")
        if first[task.metrics[0]] > best:
            best = first[task.metrics[0]]
            best_params = adapters.merge(params, config.optimizer.adapter)
            save_encoder(place, model, best_params, task.labels)
            copy_tokenizer(Path(config.model.checkpoint), place)
    # Predictions of the best checkpoint.
    if config.training.predict:
        params = steps.adapt(load_encoder(place, model, head_key).params, adapter_key)
        for split in (split for split in rows if split.startswith("test")):
            write_predictions(task, split, predict(params, rows[split]), place)
    seconds = time.perf_counter() - start
    return {"best": best, "optimizer_bytes": tree_bytes(state), "seconds": seconds}


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


def _check_folder(folder: Path, config: FinetuneConfig) -> None:
    """Raises an `InputError` if the folder holds a training, or results of other settings."""
    if not (folder / CONFIG).exists():
        return
    try:
        recorded = to_dict(load_config(folder / CONFIG, kind=FinetuneConfig))
    except InputError as error:
        raise InputError(
            f"{folder / CONFIG} is not of a fine-tuning ({error}): name another training.folder."
        ) from None
    for key, (old, new) in differences(recorded, to_dict(config)).items():
        if not key.startswith(("training.seeds", "training.folder", "mesh.")):
            raise InputError(
                f"{folder} holds results with {key} = {old!r}, which is {new!r} here: name another "
                "training.folder."
            )


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


def _report(names: tuple[str, ...], what: str) -> None:
    if names:
        print(f"{what} {', '.join(names)}")


def _text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
