"""Text written by the model of a run."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp

from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError
from galore_jax.models.generation import generate
from galore_jax.training.checkpoint import load_for_inference


def write_text(
    folder: str | Path,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """Continues a prompt with the latest checkpoint of a run, up to the end of the document.

    Args:
      folder: of the run.
      prompt: text to continue.
      tokens: how many to write at most.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only; 0: among all.
      seed: of the sampling, in 0 … 2³² - 1.

    Returns:
      The prompt and its continuation.

    Raises:
      InputError: there is no checkpoint or no prompt, the prompt is not text, more tokens than the
        model takes, or a seed or temperature out of range.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: it must lie between 0 and {2**32 - 1}.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the prompt {prompt!a} is not UTF-8: convert it, or set the terminal to UTF-8."
        ) from None
    config, params, _ = load_for_inference(folder)
    tokenizer = load_tokenizer(config.data.tokenizer)
    given = tokenizer.encode(prompt)
    if not given:
        raise InputError("there is nothing to continue: give a prompt of a word or more.")
    start = jnp.asarray([given], jnp.int32)
    key = jax.random.key(seed)
    new = generate(config.model, params, start, tokens, key, temperature, top_k)[0].tolist()
    document = itertools.takewhile(lambda token: token != tokenizer.eos_id, new)
    # A model's vocabulary may be larger than its tokenizer's: such ids have no text.
    return tokenizer.decode(given + [token for token in document if token < tokenizer.vocab_size])
