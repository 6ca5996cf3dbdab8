"""Generates text with the model of a training run, or of a folder of Hugging Face's transformers.

    python scripts/generate.py FOLDER --prompt "import os" --tokens 200 --top-k 40

It reads the run's latest checkpoint. The text ends early if the model ends its document. After a
training on conversations the prompt is a question, and the answer is printed.
"""

import argparse

from galore_jax.errors import run_cli


def main() -> None:
    """Prints the prompt and its continuation, or the answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="of a run, or of transformers")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=200, help="how many to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the most likely (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among the k most likely; 0: all (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the sampling (default: %(default)s)"
    )
    arguments = parser.parse_args()

    from galore_jax.training.sample import generate_text

    print(generate_text(**vars(arguments)))


if __name__ == "__main__":
    run_cli(main)
