import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from next_tokens import next_tokens

from galore_jax.errors import InputError
from galore_jax.models import layers
from galore_jax.models.layers import cudnn_takes
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss

TINY = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_length=32,
    initializer_range=0.2,
)

OTHER_MODEL = dataclasses.replace(
    TINY,
    head_dim=10,
    attention_bias="qkvo",
    qk_norm=True,
    sliding_window=5,
    tie_embeddings=True,
    rope_factor=8.0,
    rope_original_length=16,
)


@pytest.fixture(scope="module")
def params():
    return initial(TINY)


@functools.partial(jax.jit, static_argnums=0)
def initial(config: LlamaConfig):
    """Initial parameters, with norm scales that are not all 1 and biases that are not 0."""
    params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def scaled(path, leaf):
        if path[-1].key == "bias":
            return jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
        if path[-1].key != "scale":
            return leaf
        return (leaf * jnp.linspace(0.5, 1.5, leaf.size).reshape(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(scaled, params)


@functools.partial(jax.jit, static_argnames="config")
def logits_of(params, tokens, segments=None, positions=None, config=TINY):
    return Llama(config).apply({"params": params}, tokens, segments, positions)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(params, tokens, segments, config=TINY):
    """The mean loss and its gradient."""

    def mean_loss(params):
        logits = logits_of(params, tokens, segments, config=config)
        total, count = next_token_loss(logits, next_tokens(tokens, segments))
        return total / count

    return jax.value_and_grad(mean_loss)(params)


def random_tokens(*shape: int, seed: int = 1):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def numpy_llama(config: LlamaConfig, params, tokens: np.ndarray) -> np.ndarray:
    """Logits (length, vocab) of one document (length,), token by token, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def basis_updates(head, position):
        half = config.head_size // 2
        frequencies = config.rope_theta ** (-np.arange(half) / half)
        for i, frequency in enumerate(frequencies):
            wavelength = 2 * np.pi / frequency
            if wavelength > config.rope_original_length / config.rope_low_freq_factor:
                frequencies[i] = frequency / config.rope_factor
            elif wavelength > config.rope_original_length / config.rope_high_freq_factor:
                low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
                share = (config.rope_original_length / wavelength - low) / (high - low)
                frequencies[i] *= (1 - share) / config.rope_factor + share
        angle = position * frequencies
        pairs = (head[:half] + 1j * head[half:]) * np.exp(1j * angle)
        return np.concatenate((pairs.real, pairs.imag))

    group = config.num_heads // config.kv_heads
    x = params["embed_tokens"]["embedding"][tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        attention = block["attention"]
        project = lambda x, leaf: x @ leaf["kernel"] + leaf.get("bias", 0)
        h = norm(x, block["input_norm"]["scale"])
        q, k, v = (
            project(h, attention[name]).reshape(len(tokens), -1, config.head_size)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if config.qk_norm:
            q = norm(q, attention["q_norm"]["scale"])
            k = norm(k, attention["k_norm"]["scale"])
        mixed = np.zeros_like(q)
        for t in range(len(tokens)):
            first = max(0, t + 1 - (config.sliding_window or len(tokens)))
            for head in range(config.num_heads):
                query = basis_updates(q[t, head], t)
                scores = np.array(
                    [query @ basis_updates(k[s, head // group], s) for s in range(first, t + 1)]
                )
                weights = np.exp(scores / np.sqrt(config.head_size))
                mixed[t, head] = weights @ v[first : t + 1, head // group] / weights.sum()
        x = x + project(mixed.reshape(len(tokens), -1), attention["o_proj"])
        kernels = {name: leaf["kernel"] for name, leaf in block["mlp"].items()}
        h = norm(x, block["post_attention_norm"]["scale"])
        gate = h @ kernels["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ kernels["up_proj"])) @ kernels["down_proj"]
    if config.tie_embeddings:
        head = params["embed_tokens"]["embedding"].T
    else:
        head = params["lm_head"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ head


@pytest.mark.parametrize("config", [TINY, OTHER_MODEL], ids=["llama", "other model"])
def test_logits_equal_those_of_a_plain_numpy_forward_pass(config):
    params, tokens = initial(config), random_tokens(2, 12)
    logits = logits_of(params, tokens, config=config)
    assert logits.dtype == jnp.float32
    for row in range(2):
        expected = numpy_llama(config, params, np.asarray(tokens[row]))
        np.testing.assert_allclose(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_a_packed_row_gives_the_logits_of_its_documents_alone(params):
    lengths, length = (5, 9, 3), 21
    documents = [random_tokens(1, size, seed=size) for size in lengths]
    padding = length - sum(lengths)
    tokens = jnp.pad(jnp.concatenate(documents, axis=1), ((0, 0), (0, padding)))
    segments = np.repeat((1, 2, 3, 0), (*lengths, padding))[None]
    positions = np.concatenate([np.arange(size) for size in (*lengths, padding)])[None]
    packed = logits_of(params, tokens, segments, positions)
    assert np.isfinite(packed).all()
    start = 0
    for document, size in zip(documents, lengths, strict=True):
        # What follows a document cannot reach it; equal shapes compile once.
        alone = logits_of(params, jnp.pad(document, ((0, 0), (0, length - size))))[:, :size]
        np.testing.assert_allclose(packed[:, start : start + size], alone, atol=1e-5, rtol=1e-5)
        start += size


def test_attention_by_the_kernel_for_cards_is_asked_for_what_blocks_compute(monkeypatch):
    plain = jax.nn.dot_product_attention
    asked = []

    def kernel(*arguments, implementation, **options):
        asked.append(implementation)
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    params, tokens = initial(OTHER_MODEL), random_tokens(2, 32)
    segments = jnp.repeat(jnp.array([[1, 2, 0], [1, 1, 2]]), jnp.array([9, 20, 3]), axis=1)

    def gradients(implementation):
        own = dataclasses.replace(OTHER_MODEL, attention=implementation)
        return loss_and_gradient(params, tokens, segments, config=own)

    assert_trees_close(gradients("cudnn"), gradients("blocks"), 1e-5)
    assert set(asked) == {"cudnn"}


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "shape", "takes"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", (2, 64, 4, 128), True),
        ("NVIDIA GeForce RTX 2080 Ti", "7.5", "bfloat16", (2, 64, 4, 128), False),
        ("cpu", None, "bfloat16", (2, 64, 4, 128), False),
        ("NVIDIA H100 80GB HBM3", "9.0", "float32", (2, 64, 4, 128), False),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", (2, 63, 4, 128), False),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", (2, 64, 4, 100), False),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", (2, 64, 4, 256), False),
    ],
)
def test_the_kernel_is_taken_where_card_dtype_and_shape_allow(
    monkeypatch, kind, capability, dtype, shape, takes
):
    card = SimpleNamespace(device_kind=kind)
    if capability is not None:
        card.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert cudnn_takes(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))) == takes


def test_positions_rotate_on_tpus_to_the_same_values_and_gradients(monkeypatch):
    heads = jax.random.normal(jax.random.key(0), (2, 24, 4, 10))
    rotation = OTHER_MODEL.rotation_at(jnp.arange(24)[None])

    def weighted(heads):
        rotated = layers.rotate(heads, rotation)
        return jnp.sum(jnp.sin(rotated)), rotated

    gradients = jax.grad(weighted, has_aux=True)
    expected = gradients(heads)
    on_tpu = lambda *operands, tpu, default: tpu(*operands)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    assert_trees_close(gradients(heads), expected, 1e-6)


def test_rematerialisation_gives_the_same_gradients_in_half_the_memory():
    deep = dataclasses.replace(TINY, num_layers=12, initializer_range=0.1)
    params = initial(deep)
    tokens, segments = random_tokens(8, 32), jnp.ones((8, 32), jnp.int32)

    def compiled(config):
        return loss_and_gradient.lower(params, tokens, segments, config=config).compile()

    keeping, recomputing = compiled(deep), compiled(dataclasses.replace(deep, remat=True))
    (_, kept), (_, recomputed) = (f(params, tokens, segments) for f in (keeping, recomputing))
    assert_trees_close(kept, recomputed, 1e-5)
    small, large = (f.memory_analysis().temp_size_in_bytes for f in (recomputing, keeping))
    assert small < 0.5 * large


def test_gradients_are_those_of_finite_differences(params):
    tokens, segments = random_tokens(2, 6), jnp.ones((2, 6), jnp.int32)
    _, gradient = loss_and_gradient(params, tokens, segments)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    step = 3e-3
    for at, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        direction = jax.random.normal(key, leaf.shape) / leaf.size**0.5

        def loss_moved_by(length, at=at, leaf=leaf, direction=direction):
            moved = structure.unflatten(
                [*leaves[:at], leaf + length * direction, *leaves[at + 1 :]]
            )
            return loss_and_gradient(moved, tokens, segments)[0]

        measured = (loss_moved_by(step) - loss_moved_by(-step)) / (2 * step)
        predicted = jnp.vdot(jax.tree.leaves(gradient)[at], direction)
        # The loss is near 5 and rounded to 5e-7: a central difference is off by about 5e-7 / step.
        np.testing.assert_allclose(measured, predicted, atol=5e-4, rtol=5e-3)


def test_bfloat16_keeps_parameters_and_gradients_in_bfloat16_and_stays_near_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", initializer_range=0.05)
    params = initial(config)
    tokens, segments = random_tokens(2, 12), jnp.ones((2, 12), jnp.int32)
    assert jax.eval_shape(lambda: logits_of(params, tokens, config=config)).dtype == jnp.float32
    loss, gradient = loss_and_gradient(params, tokens, segments, config=config)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {jnp.dtype("bfloat16")}
    exact, exact_gradient = loss_and_gradient(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
        tokens,
        segments,
    )
    np.testing.assert_allclose(loss, exact, rtol=2**-8)
    for rounded, precise in zip(*map(jax.tree.leaves, (gradient, exact_gradient)), strict=True):
        error = np.linalg.norm(np.asarray(rounded, np.float32) - np.asarray(precise))
        assert error < 0.05 * np.linalg.norm(precise)


def test_the_embedding_gradient_sums_many_occurrences_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", initializer_range=0.05)
    params, model = initial(config), Llama(config)
    tokens = jnp.full((1, 1000), 7, jnp.int32)

    def total(params):
        return jnp.sum(model.bind({"params": params}).embed_tokens(tokens).astype(jnp.bfloat16))

    gradient = jax.jit(jax.grad(total))(params)["embed_tokens"]["embedding"]
    # A running sum of ones in bfloat16 would stop at 256.
    np.testing.assert_array_equal(gradient[7].astype(jnp.float32), 1000.0)


def test_parameters_have_the_agreed_names_and_stacked_shapes(params):
    actual = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert actual == {
        "embed_tokens/embedding": (61, 32),
        "layers/input_norm/scale": (3, 32),
        "layers/attention/q_proj/kernel": (3, 32, 32),
        "layers/attention/k_proj/kernel": (3, 32, 16),
        "layers/attention/v_proj/kernel": (3, 32, 16),
        "layers/attention/o_proj/kernel": (3, 32, 32),
        "layers/post_attention_norm/scale": (3, 32),
        "layers/mlp/gate_proj/kernel": (3, 32, 40),
        "layers/mlp/up_proj/kernel": (3, 32, 40),
        "layers/mlp/down_proj/kernel": (3, 40, 32),
        "norm/scale": (32,),
        "lm_head/kernel": (32, 61),
    }


def test_loss_counts_targets_inside_a_segment_only():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 5))
    tokens = jnp.asarray([[1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 1]])
    segments = jnp.asarray([[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1]])
    targets = next_tokens(tokens, segments)
    total, count = next_token_loss(logits, targets)
    targets_at = [(0, 0, 2), (0, 2, 4), *((1, t, int(tokens[1, t + 1])) for t in range(5))]
    expected = -sum(jax.nn.log_softmax(logits)[at] for at in targets_at)
    assert count == len(targets_at)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    gradient = jax.grad(lambda x: next_token_loss(x, targets)[0])(logits)
    probabilities = jax.nn.softmax(logits)
    for row in range(2):
        for t in range(6):
            target = next((v for r, s, v in targets_at if (r, s) == (row, t)), None)
            slope = 0 if target is None else probabilities[row, t] - jax.nn.one_hot(target, 5)
            np.testing.assert_allclose(gradient[row, t], slope, atol=1e-6)


def test_huge_logits_give_a_finite_loss_and_gradient():
    logits = jnp.asarray([[[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]])
    targets = jnp.asarray([[1, -1]])
    total, gradient = jax.value_and_grad(lambda x: next_token_loss(x, targets)[0])(logits)
    assert total == 2e4
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 5}, "model.num_heads 5"),
        ({"num_kv_heads": 3}, "model.num_kv_heads 3"),
        ({"num_heads": 32, "num_kv_heads": None}, "heads of 1"),
        ({"head_dim": 5}, "heads of 5"),
        ({"attention_bias": "q"}, "model.attention_bias must be '', 'qkv' or 'qkvo'"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict, named: str):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(TINY, **change)


def test_a_row_longer_than_the_model_is_refused(params):
    with pytest.raises(InputError, match=r"33 tokens .* model.max_length 32"):
        logits_of(params, random_tokens(1, 33))


def assert_trees_close(actual, expected, tolerance: float):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
