"""What tests of RoBERTa and BERT share: small configurations, parameters and inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from galore_jax.models.encoder import ARCHITECTURES, EncoderConfig

TINY = EncoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    max_length=16,
    token_types=2,
    initializer_range=0.2,
)
BERT = dataclasses.replace(TINY, architecture="bert", pad_id=0, norm_epsilon=1e-12)
CONFIGS = pytest.mark.parametrize("config", [TINY, BERT], ids=ARCHITECTURES)


@functools.partial(jax.jit, static_argnums=0)
def initial(model):
    """Initial parameters with noise, so that no bias is 0 and no scale is 1."""
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
    return tree.unflatten(map(noisy, leaves, keys))


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, tokens, token_types=None, key=None):
    """What a model makes of `tokens`, with dropout if there is a key."""
    rngs = None if key is None else {"dropout": key}
    return model.apply({"params": params}, tokens, token_types, key is None, rngs=rngs)


def random_tokens(*shape: int, seed: int = 1):
    """Tokens without padding."""
    return jax.random.randint(jax.random.key(seed), shape, 2, TINY.vocab_size)


def random_types(*shape: int):
    return jax.random.bernoulli(jax.random.key(2), 0.5, shape).astype(jnp.int32)
