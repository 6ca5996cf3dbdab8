"""Writes text with the model of a training run.

    python scripts/generate.py RUN_FOLDER --prompt "import os" --tokens 200 --top-k 40

The run's latest checkpoint is read. The text ends early where the model ends its document.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp

from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import exit_with_one_sentence
from galore_jax.models.generation import generate
from galore_jax.training.checkpoint import load_for_inference


def main() -> None:
    """Prints the prompt and its continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="folder of a training run")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--tokens", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among the k likeliest; 0: all (the default)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sampling (default: %(default)s)"
    )
    arguments = parser.parse_args()

    config, params, _ = load_for_inference(arguments.folder)
    tokenizer = load_tokenizer(config.data.tokenizer)
    # In packed rows an eos stands before each document.
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.eos_id]
    tokens = generate(
        config.model,
        params,
        jnp.asarray([prompt], jnp.int32),
        arguments.tokens,
        jax.random.key(arguments.seed),
        arguments.temperature,
        arguments.top_k,
    )
    document = itertools.takewhile(lambda token: token != tokenizer.eos_id, tokens[0].tolist())
    # A model's vocabulary may be larger than its tokenizer's: such ids have no text.
    written = [token for token in document if token < tokenizer.vocab_size]
    if arguments.prompt:
        written = prompt + written
    print(tokenizer.decode(written))


if __name__ == "__main__":
    exit_with_one_sentence(main)
