"""Writes the model of a run as a folder of Hugging Face's transformers.

    python scripts/export.py RUN FOLDER

FOLDER gets config.json, safetensors files and the tokenizer. A run's adapters are merged into its
kernels. The way back needs no conversion: scripts/generate.py writes text with the model in FOLDER,
and a training starts from it:

    python scripts/train.py --config configs/llama_1b.toml model.checkpoint=FOLDER
"""

import argparse
import sys

from galore_jax.errors import run_cli


def main() -> None:
    """Writes the model, and prints what was written and the peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("folder", metavar="FOLDER", help="to make")
    arguments = parser.parse_args()

    from galore_jax.training.export import to_huggingface
    from galore_jax.training.progress import peak_process_memory

    config = to_huggingface(arguments.run, arguments.folder)
    print(
        f"{arguments.folder}: {config.model.num_layers} layers, with the tokenizer "
        f"{config.data.tokenizer}; {peak_process_memory()}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_cli(main)
