import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.errors import InputError
from galore_jax.models.generation import generate
from galore_jax.models.llama import KeyValueCache, Llama, LlamaConfig

TINY = LlamaConfig(
    vocab_size=47,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_length=24,
    initializer_range=0.3,
)
PROMPT = jnp.asarray([[3, 14, 15, 9], [2, 6, 5, 35], [8, 9, 7, 9]])


@pytest.fixture(scope="module")
def params():
    return initial(TINY)


@functools.partial(jax.jit, static_argnums=0)
def initial(config):
    return Llama(config).init(jax.random.key(0), PROMPT)["params"]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
    return Llama(config).apply({"params": params}, tokens)


def greedy_without_cache(config, params, prompt, num_tokens):
    start = prompt.shape[1]
    tokens = jnp.pad(prompt, ((0, 0), (0, num_tokens)))
    for at in range(start, start + num_tokens):
        tokens = tokens.at[:, at].set(jnp.argmax(logits_of(config, params, tokens)[:, at - 1], -1))
    return tokens[:, start:]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": None},
        {"head_dim": 10, "attention_bias": "qkv", "qk_norm": True, "sliding_window": 5},
        {"tie_embeddings": True, "rope_factor": 4.0, "rope_original_length": 8},
    ],
    ids=["grouped", "full heads", "biases, norms, window", "tied, stretched"],
)
def test_cached_generation_equals_the_most_likely_tokens_of_full_forward_passes(changes):
    config = dataclasses.replace(TINY, **changes)
    params = initial(config)
    written = generate(config, params, PROMPT, 15, jax.random.key(0), temperature=0.0)
    assert written.shape == (3, 15)
    assert written.dtype == jnp.int32
    np.testing.assert_array_equal(written, greedy_without_cache(config, params, PROMPT, 15))


def test_extending_a_cache_in_two_pieces_gives_the_logits_of_one_pass(params):
    model = Llama(TINY)
    shape = (TINY.num_layers, 3, 9, TINY.kv_heads, TINY.head_size)
    cache = KeyValueCache(jnp.zeros(shape), jnp.zeros(shape))
    tokens = jax.random.randint(jax.random.key(2), (3, 9), 0, TINY.vocab_size)
    extend = jax.jit(functools.partial(model.apply, method="extend"))
    first, cache = extend({"params": params}, tokens[:, :5], cache, 0)
    second, _ = extend({"params": params}, tokens[:, 5:], cache, 5)
    expected = logits_of(TINY, params, tokens)
    np.testing.assert_allclose(first, expected[:, :5], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(second, expected[:, 5:], atol=1e-5, rtol=1e-5)


def test_top_k_of_one_takes_the_most_likely_token(params):
    sampled = generate(TINY, params, PROMPT, 15, jax.random.key(5), temperature=3.0, top_k=1)
    greedy = generate(TINY, params, PROMPT, 15, jax.random.key(6), temperature=0.0)
    np.testing.assert_array_equal(sampled, greedy)


def test_samples_follow_the_softmax_of_the_logits_at_the_temperature(params):
    draws, temperature, top_k = 20_000, 2.0, 5
    prompt = jnp.broadcast_to(PROMPT[:1], (draws, PROMPT.shape[1]))
    tokens = generate(TINY, params, prompt, 1, jax.random.key(0), temperature, top_k)[:, 0]
    logits = logits_of(TINY, params, PROMPT[:1])[0, -1] / temperature
    kept = jnp.where(logits >= jnp.sort(logits)[-top_k], logits, -jnp.inf)
    frequencies = jnp.bincount(tokens, length=TINY.vocab_size) / draws
    # Four standard deviations of a frequency are at most 4 · 0.5 / √20,000 = 0.0141.
    np.testing.assert_allclose(frequencies, jax.nn.softmax(kept), atol=0.0142)
    assert set(np.unique(tokens)) <= set(np.flatnonzero(np.isfinite(kept)))


@pytest.mark.parametrize(
    ("prompt", "num_tokens", "settings", "named"),
    [
        (PROMPT, 21, {}, "tokens and 21 new ones exceed"),
        (PROMPT[:, :0], 5, {}, "at least one token"),
        (PROMPT, 0, {}, "at least one token"),
        (PROMPT, 5, {"temperature": -1.0}, "temperature must be finite .*, not -1.0"),
        (PROMPT, 5, {"temperature": float("nan")}, "temperature must be finite"),
        (PROMPT, 5, {"top_k": -2}, "top_k must be 0 or more, not -2"),
    ],
)
def test_impossible_requests_are_refused(params, prompt, num_tokens, settings, named):
    with pytest.raises(InputError, match=named):
        generate(TINY, params, prompt, num_tokens, jax.random.key(0), **settings)
