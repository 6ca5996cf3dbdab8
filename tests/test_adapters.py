"""Low-rank adapters in the models: against NumPy, merged, frozen, with dropout."""

import functools

import encoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.models.adapters import Adapter, combine, factors, merge, split
from galore_jax.models.dense import Dense
from galore_jax.models.encoder import Classifier
from galore_jax.models.llama import Llama, LlamaConfig

ROWS, COLUMNS, RANK = 48, 64, 4
LORA = Adapter(RANK, alpha=6.0)
LOWRANK = Adapter(0.25, has_kernel=False)
MODEL = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    attention_bias="qkv",
)
# A sum of up to 64 products in float32 is right to 64 · 2^-24 of the sum of their sizes.
ROUNDING = 64 * 2.0**-24


@functools.cache
def initial(adapter, model=MODEL):
    init = jax.jit(Llama(model, adapter).init)
    return init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def noisy(params):
    """The parameters with noise, so that no factor is 0."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
    return tree.unflatten(map(draw, leaves, keys))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def tokens():
    return jax.random.randint(jax.random.key(2), (3, 9), 0, MODEL.vocab_size)


def test_a_layer_and_its_derivatives_are_those_of_the_formula():
    layer = Dense(COLUMNS, 0.1, jnp.float32, use_bias=True, adapter=LORA)
    draw = np.random.default_rng(0).normal
    x, upstream = draw(size=(2, 5, ROWS)), draw(size=(2, 5, COLUMNS))
    kernel, bias = draw(size=(ROWS, COLUMNS)), draw(size=COLUMNS)
    a, b = draw(size=(ROWS, RANK)), draw(size=(RANK, COLUMNS))
    params = {"kernel": kernel, "bias": bias, "lora_a": a, "lora_b": b}
    params = jax.tree.map(jnp.float32, params)

    scale, inputs, outputs = 6.0 / RANK, x.reshape(-1, ROWS), upstream.reshape(-1, COLUMNS)
    expected = {
        "lora_a": scale * inputs.T @ outputs @ b.T,
        "lora_b": scale * (inputs @ a).T @ outputs,
        "bias": outputs.sum(0),
        "kernel": np.zeros_like(kernel),  # frozen
    }
    result, backward = jax.vjp(
        lambda params, x: layer.apply({"params": params}, x), params, jnp.float32(x)
    )
    by_params, by_x = backward(jnp.float32(upstream))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=64 * ROUNDING)
    close(result, x @ kernel + bias + scale * (x @ a) @ b)
    close(by_x, upstream @ (kernel + scale * a @ b).T)
    jax.tree.map(close, by_params, expected)


def test_initial_adapters_have_the_bounds_of_peft():
    adapted = initial(LORA)
    # Kaiming uniform with a = √5: within ±1 / √in. One of hundreds of numbers is near the bound.
    for name, side in {"gate_proj": 32, "down_proj": 64}.items():
        layer = adapted["layers"]["mlp"][name]
        assert layer["lora_a"].shape == (2, side, RANK)
        assert 0.9 < np.abs(layer["lora_a"]).max() * side**0.5 <= 1
        assert not layer["lora_b"].any()


def test_initial_factors_have_a_product_with_the_variance_of_a_kernel():
    layer = Dense(512, 0.02, jnp.float32, adapter=Adapter(0.125, has_kernel=False))
    params = layer.init(jax.random.key(0), jnp.zeros((1, 512)))["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "lora_a": (512, 64),
        "lora_b": (64, 512),
    }
    # The mean square of 512² products of rank 64 has a relative deviation of about √(2/64²)
    # from A and B each: 5% are twice that.
    product = np.asarray(params["lora_a"]) @ np.asarray(params["lora_b"])
    assert product.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("adapter", [LORA, LOWRANK], ids=["lora", "lowrank"])
def test_a_merged_decoder_computes_the_same_logits(adapter):
    params = noisy(initial(adapter))
    plain = merge(params, adapter)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, initial(None))
    expected = logits(Llama(MODEL, adapter), params, tokens())
    # Seven products in each of two blocks, with logits of size 1.
    bound = 14 * ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(logits(Llama(MODEL), plain, tokens()), expected, atol=bound)


def test_a_merged_encoder_computes_the_same_outputs():
    model, plain = Classifier(encoders.BERT, 2, LORA), Classifier(encoders.BERT, 2)
    params = encoders.initial(model)
    inputs = encoders.random_tokens(3, 9)
    # Six products in each of three blocks, and attention weights and norms of them.
    np.testing.assert_allclose(
        encoders.outputs(plain, merge(params, LORA), inputs),
        encoders.outputs(model, params, inputs),
        atol=18 * 4 * ROUNDING,
    )
    assert set(factors(params)) == {"encoder"}  # not in the head


def test_dropout_needs_a_stream_and_acts_on_the_adapter_alone():
    adapter = Adapter(RANK, alpha=6.0, dropout=0.5)
    layer = Dense(COLUMNS, 0.1, jnp.float32, adapter=adapter)
    x = jax.random.normal(jax.random.key(3), (1, ROWS))
    params = noisy(layer.init(jax.random.key(0), x)["params"])

    def apply(seed=None):
        rngs = {} if seed is None else {"dropout": jax.random.key(seed)}
        return np.asarray(layer.apply({"params": params}, x, rngs=rngs))

    np.testing.assert_array_equal(apply(), layer.clone(adapter=LORA).apply({"params": params}, x))
    np.testing.assert_array_equal(apply(1), apply(1))
    # What is dropped is x's components before A: 2 x or 0, so the mean over draws is unbiased.
    draws = np.stack([apply(seed) for seed in range(400)])
    error = draws.mean(0) - apply()
    assert (np.abs(error) < 5 * draws.std(0) / 20).all()
    assert (draws.std(0) > 0).all()
    by_kernel = x @ params["kernel"]
    assert np.linalg.matrix_rank(draws[:, 0] - by_kernel, tol=1e-3) == RANK


def test_what_is_frozen_is_told_by_the_tree():
    model = initial(LORA)
    trained, frozen = split(model)
    assert jax.tree.structure(combine(trained, frozen)) == jax.tree.structure(model)
    leaves = jax.tree.leaves(frozen)
    assert len(leaves) == 7
    assert all(leaf.ndim == 3 for leaf in leaves)
    only, _ = split(model, adapters_only=True)
    assert jax.tree.structure(only) == jax.tree.structure(factors(model))
    assert jax.tree.leaves(split(initial(None))[1]) == []
    assert split(initial(LOWRANK))[1] == {}
    classifier = Classifier(encoders.TINY, 2).init(jax.random.key(0), tokens())["params"]
    assert set(split(classifier, adapters_only=True)[0]) == {"head"}
    assert "embed_tokens" in trained
