"""Writes the model of a run as a folder of Hugging Face's transformers.

    python scripts/export.py RUN FOLDER

FOLDER gets config.json, safetensors files and the tokenizer. A run's adapters are merged into its
kernels. The way back needs no conversion: scripts/generate.py writes text with the model in FOLDER,
and a training starts from it:

    python scripts/train.py --config configs/llama_1b.toml model.checkpoint=FOLDER
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from galore_jax.errors import run_cli


def main() -> None:
    """Writes the model, and prints what was written and the peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("folder", metavar="FOLDER", help="to make")
    arguments = parser.parse_args()

    from galore_jax.training.metrics import peak_process_memory

    config = to_huggingface(arguments.run, arguments.folder)
    print(
        f"{arguments.folder}: {config.model.num_layers} layers, with the tokenizer "
        f"{config.data.tokenizer}; {peak_process_memory()}",
        file=sys.stderr,
    )


def to_huggingface(run_folder: str | Path, folder: str | Path) -> Any:
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
    from galore_jax.data.tokenizers import load_tokenizer
    from galore_jax.interop.decoders import write_model
    from galore_jax.interop.tensors import make_folder
    from galore_jax.interop.tokenizer_files import complete_tokenizer, copy_tokenizer
    from galore_jax.training.checkpoint import open_parameters
    from galore_jax.training.run_folder import RunFolder, check_same_tokenizer

    folder = Path(folder)
    with open_parameters(run_folder) as (config, read):
        source = config.data.tokenizer
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
        make_folder(folder)
        # The folder gets all files or none.
        with TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
            place = Path(unfinished)
            write_model(place, config.model, read, settings=settings)
            if source != "bytes":
                copy_tokenizer(Path(source), place)
                complete_tokenizer(place, tokenizer)
            for file in place.iterdir():
                os.replace(file, folder / file.name)
    return config


if __name__ == "__main__":
    run_cli(main)
