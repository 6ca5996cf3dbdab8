"""Text generation: sampling from a LLaMA with a key/value cache."""

import functools
import math

import jax
import jax.numpy as jnp

from galore_jax.errors import InputError, require
from galore_jax.models.llama import KeyValueCache, Llama, LlamaConfig


def generate(
    config: LlamaConfig,
    params,
    prompt_tokens: jax.Array,
    num_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """Continues each prompt by `num_tokens` sampled tokens.

    Args:
      config: the model's configuration.
      params: the model's parameters.
      prompt_tokens: int32 (batch, length), at least one token per row, without padding.
      num_tokens: how many tokens to generate.
      key: random key for sampling.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens only; 0: among all.

    Returns:
      The new tokens, int32 (batch, num_tokens).

    Raises:
      InputError: the prompt is empty, the prompt and its continuation are longer than
        config.max_length, the temperature is negative or not finite, or top_k is negative.
    """
    length = prompt_tokens.shape[1]
    if length < 1 or num_tokens < 1:
        raise InputError("generating needs a prompt of at least one token and num_tokens ≥ 1.")
    if length + num_tokens > config.max_length:
        raise InputError(
            f"the prompt of {length} tokens and {num_tokens} new ones exceed model.max_length "
            f"{config.max_length}: shorten the prompt, or ask for fewer tokens."
        )
    require("temperature", temperature, 0 <= temperature < math.inf, "finite and not negative")
    require("top_k", top_k, top_k >= 0, "0 or more")
    top_k = min(top_k, config.vocab_size) or config.vocab_size
    return _generate(config, params, prompt_tokens, num_tokens, key, float(temperature), top_k)


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 6))
def _generate(config, params, prompt_tokens, num_tokens, key, temperature, top_k):
    batch, length = prompt_tokens.shape
    shape = (config.num_layers, batch, length + num_tokens, config.kv_heads, config.head_size)
    empty = jnp.zeros(shape, config.dtype)

    def extend(tokens, cache, start):
        logits, cache = Llama(config).apply(
            {"params": params}, tokens, cache, start, method="extend"
        )
        return logits[:, -1], cache

    def step(carry, at):
        logits, cache = carry
        position, step_key = at
        token = _sample(step_key, logits, temperature, top_k)
        return extend(token[:, None], cache, position), token

    first = extend(prompt_tokens, KeyValueCache(empty, empty), jnp.int32(0))
    positions = length + jnp.arange(num_tokens, dtype=jnp.int32)
    _, tokens = jax.lax.scan(step, first, (positions, jax.random.split(key, num_tokens)))
    return tokens.T


def _sample(key, logits, temperature, top_k):
    """One token per row from logits (batch, vocab): int32 (batch,)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    values, choices = jax.lax.top_k(logits, top_k)
    picked = jax.random.categorical(key, values / temperature)
    return jnp.take_along_axis(choices, picked[:, None], axis=-1)[:, 0]
