"""Models of runs as folders of Hugging Face's transformers."""

from pathlib import Path

from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.interop.decoders import write_model
from galore_jax.interop.tokenizer_files import complete_tokenizer, copy_tokenizer
from galore_jax.models.adapters import merged
from galore_jax.training.checkpoint import open_parameters
from galore_jax.training.config import Config
from galore_jax.training.run_folder import RunFolder, check_same_tokenizer


def to_huggingface(run_folder: str | Path, folder: str | Path) -> Config:
    """Writes the model of a run's latest checkpoint, and its tokenizer, for transformers.

    The model's end-of-sequence token is that of its tokenizer, which also ends an answer. Low-rank
    factors are merged into plain kernels.

    Args:
      run_folder: the folder of the run.
      folder: the new folder.

    Returns:
      The configuration of the run.

    Raises:
      InputError: there is no checkpoint, it is damaged or has a weight that is not finite, the
        tokenizer is missing, the folder holds a model, or transformers has no such architecture.
    """
    folder = Path(folder)
    with open_parameters(run_folder) as (config, read):
        source, adapter = config.data.tokenizer, config.optimizer.adapter
        check_same_tokenizer(RunFolder(run_folder), source)
        tokenizer = load_tokenizer(source)
        ids = {
            "bos_token_id": next(iter(tokenizer.prefix), None),
            "eos_token_id": tokenizer.eos_id,
            # Transformers never trains the embedding of padding, which the end of a text must have.
            "pad_token_id": None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id,
        }
        # Transformers refuses an id beyond the embedding, and has a default for a missing one.
        fits = lambda id: id is not None and id < config.model.vocab_size
        settings = {name: id if fits(id) else None for name, id in ids.items()}
        if adapter is not None:
            read = merged(read, adapter)
        write_model(folder, config.model, read, settings=settings)
    if source != "bytes":
        copy_tokenizer(Path(source), folder)
        complete_tokenizer(folder, tokenizer)
    return config
