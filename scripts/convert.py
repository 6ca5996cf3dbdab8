"""Converts models between runs and folders of Hugging Face's transformers.

    python scripts/convert.py from-huggingface FOLDER RUN
    python scripts/convert.py to-huggingface RUN FOLDER
    python scripts/convert.py to-huggingface --adapter RUN FOLDER

FOLDER has config.json and safetensors files, of a LLaMA, Mistral, Qwen2 or Qwen3. RUN is the folder
of a run: scripts/generate.py writes text with it. A run's adapters are merged into its kernels;
with --adapter FOLDER gets the adapter alone, in PEFT's format. To continue training from FOLDER, no
conversion is needed:

    python scripts/train.py --config configs/llama_1b.toml model.checkpoint=FOLDER
"""

import argparse
import sys

from galore_jax.command_line import check_folder
from galore_jax.errors import run_cli

DIRECTIONS = {"from-huggingface": ("FOLDER", "RUN"), "to-huggingface": ("RUN", "FOLDER")}


def main() -> None:
    """Converts, and prints what was written and the peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    for direction, names in DIRECTIONS.items():
        one = directions.add_parser(direction)
        one.add_argument("source", metavar=names[0])
        one.add_argument("target", metavar=names[1])
        if direction == "to-huggingface":
            one.add_argument("--adapter", action="store_true", help="LoRA's adapter alone")
    arguments = parser.parse_args()
    check_folder(f"the target {DIRECTIONS[arguments.direction][1]}", arguments.target)

    from galore_jax.training.convert import from_huggingface, to_huggingface
    from galore_jax.training.progress import peak_process_memory

    adapter_only = arguments.direction == "to-huggingface" and arguments.adapter
    if arguments.direction == "from-huggingface":
        config = from_huggingface(arguments.source, arguments.target)
    else:
        config = to_huggingface(arguments.source, arguments.target, adapter_only=adapter_only)
    tokenizer = "" if adapter_only else f", with the tokenizer {config.data.tokenizer}"
    print(
        f"{arguments.target}: {config.model.num_layers} layers{tokenizer}; {peak_process_memory()}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run_cli(main)
