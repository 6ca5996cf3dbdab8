"""Runs from, and to, folders of Hugging Face's transformers."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.data.batches import DataConfig
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError
from galore_jax.files import write_json
from galore_jax.interop.adapters import merged, write_adapter
from galore_jax.interop.config_json import read_config
from galore_jax.interop.generation_config import GENERATION_CONFIG, generation_config
from galore_jax.interop.huggingface import ModelFolder, write_model
from galore_jax.interop.tokenizer_files import (
    complete_tokenizer,
    copy_tokenizer,
    find_tokenizer,
)
from galore_jax.training.checkpoint import open_parameters, save_parameters
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.run_folder import RunFolder, check_same_tokenizer, open_folder
from galore_jax.types import ReadPart


def from_huggingface(folder: str | Path, run_folder: str | Path) -> Config:
    """Makes a run, without a training, of a model of transformers.

    Its checkpoint has the parameters alone. The tokenizer is copied if the folder has one, with its
    settings and its chat template, and so are the settings of generation. A warning says if there
    is no tokenizer: such a run can only go back.

    Args:
      folder: config.json and safetensors files.
      run_folder: the folder of the new run.

    Returns:
      The configuration of the run.

    Raises:
      InputError: the model cannot be read, has a weight that is not finite, or is not supported, or
        the folder of the run holds one.
    """
    folder, run = Path(folder), RunFolder(run_folder)
    model = read_config(folder)
    source = ModelFolder(folder, model)
    data = DataConfig(sequence_length=min(DataConfig.sequence_length, model.max_length))
    tokenizer = find_tokenizer(folder)
    generation = generation_config(folder)
    if tokenizer is None:
        warnings.warn(
            f"{folder} has no tokenizer.json or tokenizer.model: add one to generate text with the "
            "run.",
            stacklevel=2,
        )
    else:
        load_tokenizer(str(tokenizer))
        data = replace(data, tokenizer=str(run.path / tokenizer.name))
    config = Config(
        model, data, OptimizerConfig(name="adamw"), TrainingConfig(folder=str(run_folder))
    )
    with open_folder(config, resume=False):
        if tokenizer is not None:
            copy_tokenizer(folder, run.path)
        if generation is not None:
            write_json(run.path / GENERATION_CONFIG, generation)
        save_parameters(run.checkpoints, config, _finite(source.read, folder))
    return config


def to_huggingface(
    run_folder: str | Path, folder: str | Path, *, adapter_only: bool = False
) -> Config:
    """Writes the model of a run's latest checkpoint, and its tokenizer, for transformers.

    The model's end of a sequence is that of its tokenizer, and after a training on conversations
    that of an answer. Settings of generation that are beside the tokenizer are copied with this end
    added. Adapters and other low-rank factors are merged into plain kernels.

    Args:
      run_folder: the folder of the run.
      folder: the new folder.
      adapter_only: write LoRA's adapter alone, in PEFT's format, for the model of the run's
        `model.checkpoint`.

    Returns:
      The configuration of the run.

    Raises:
      InputError: there is no checkpoint, it is damaged or has a weight that is not finite, the
        tokenizer is missing, the folder holds a model, transformers has no such architecture, or
        the run has no adapter that belongs to a checkpoint.
    """
    folder = Path(folder)
    with open_parameters(run_folder) as (config, stored):
        read = _finite(stored, run_folder)
        adapter = config.optimizer.adapter
        if adapter_only:
            if adapter is None or not config.trains_adapters_only:
                raise InputError(
                    f"{run_folder} trained more than an adapter: leave out --adapter, or train "
                    'with optimizer.name = "lora" and model.checkpoint=FOLDER.'
                )
            write_adapter(folder, config.model, adapter, read, config.model.checkpoint)
            return config
        source = config.data.tokenizer
        check_same_tokenizer(RunFolder(run_folder), source)
        tokenizer = load_tokenizer(source)
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        # A model that came without a tokenizer has "bytes", whose tokens are not its own.
        if source != "bytes" or tokenizer.vocab_size == config.model.vocab_size:
            ids["bos_token_id"] = next(iter(tokenizer.prefix), None)
            ids["eos_token_id"] = tokenizer.eos_id
            # Transformers never trains the embedding of padding, which the end of a text must have.
            ids["pad_token_id"] = None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
        # Transformers refuses an id beyond the embedding, and has its own for one that is left out.
        fits = lambda id: id is not None and id < config.model.vocab_size
        settings = {name: id if fits(id) else None for name, id in ids.items()}
        place = Path(run_folder) if source == "bytes" else Path(source).parent
        generation = generation_config(place, eos_id=settings["eos_token_id"])
        if adapter is not None:
            read = merged(read, adapter)
        write_model(folder, config.model, read, settings=settings)
    if source != "bytes":
        copy_tokenizer(Path(source), folder)
        complete_tokenizer(folder, tokenizer)
    if generation is not None:
        write_json(folder / GENERATION_CONFIG, generation)
    return config


def _finite(read: ReadPart, place: str | Path) -> ReadPart:
    """Reads as `read` does; raises an `InputError` for a part that has NaN or an infinity."""

    def read_finite(path: str, index: tuple[slice, ...]) -> np.ndarray:
        part = read(path, index)
        if not np.isfinite(part).all():
            raise InputError(
                f"{path} in {place} has numbers that are not finite: convert a checkpoint without."
            )
        return part

    return read_finite
