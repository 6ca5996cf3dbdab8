"""Projected gradients in complex numbers, narrow floats and products of a given precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax.optim.factored_rms import scale_by_factored_rms

X = jax.random.normal(jax.random.key(0), (8, 6))
W = jax.random.normal(jax.random.key(1), (6, 8))


def start(params, **options):
    tx = galore_jax.chain(galore_jax.galore(2, refresh="random", **options), optax.sgd(1.0))
    return tx, jax.jit(tx.init)(params)


def test_micro_batches_keep_the_imaginary_part_of_gradients():
    params = {"w": W, "z": jnp.exp(1j * jnp.arange(8.0))}
    _, state = start(params)
    loss = lambda params, x: jnp.mean(jnp.abs(x @ params["w"] * params["z"] + 1j) ** 2)
    _, expected = jax.jit(galore_jax.value_and_grad(loss))(params, state, X)
    _, found = jax.jit(galore_jax.value_and_grad(loss, micro_batches=2))(params, state, X)
    assert found["z"].dtype == jnp.complex64
    # Sums of 8 products, in another order.
    np.testing.assert_allclose(found["z"], expected["z"], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_relies_on_implicit_promotion(dtype):
    params, x = {"w": W.astype(dtype), "b": jnp.zeros(8, dtype)}, X.astype(dtype)
    tx = galore_jax.lion(1e-3, rank=2, moments="rotate")
    loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"]).astype("float32") ** 2)

    def steps(params, x):
        state = galore_jax.refresh(loss, micro_batches=2)(params, galore_jax.init(tx, params), x)
        _, grads = galore_jax.value_and_grad(loss, micro_batches=2)(params, state, x)
        new, _ = galore_jax.apply_gradients(tx, grads, state, params)
        return new, galore_jax.apply_gradients(tx, jax.grad(loss)(params, x), state, params)[0]

    with jax.numpy_dtype_promotion("strict"):
        both = jax.eval_shape(steps, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(both)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tx",
    [
        galore_jax.chain(
            galore_jax.clip_by_finite_norm(1.0), galore_jax.lion(1e-3, rank=2, weight_decay=0.1)
        ),
        galore_jax.adafactor(1e-3, rank=2),
        galore_jax.chain(galore_jax.galore(2), optax.sgd(1e-3)),
        galore_jax.chain(optax.sgd(1e-3), galore_jax.add_decayed_full_weights(1e-3, 0.1)),
        optax.masked(galore_jax.scale_by_muon(), {"w": True, "b": False}),
        scale_by_factored_rms(),
    ],
    ids=["lion", "adafactor", "sgd", "decay", "muon", "factored"],
)
def test_no_optimizer_relies_on_implicit_promotion(tx, dtype):
    # Those with Adam are missing: that of optax relies on it.
    params = {"w": W.astype(dtype), "b": jnp.zeros(8, dtype)}

    def step(params):
        state = galore_jax.init(tx, params)
        updates, _ = tx.update(params, state, params)
        return updates, galore_jax.apply_gradients(tx, params, state, params)[0]

    with jax.numpy_dtype_promotion("strict"):
        updates, new = jax.eval_shape(step, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_float8_parameters_are_updated_in_float32():
    wide = {"w": jnp.round(W * 8) / 8, "b": jnp.ones(8)}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float8_e4m3fn), wide)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    tx = galore_jax.chain(galore_jax.galore(4, refresh="random"), optax.sgd(0.5))
    gradients = jax.tree.map(jnp.ones_like, wide)

    @jax.jit
    def step(params):
        return galore_jax.apply_gradients(tx, gradients, galore_jax.init(tx, params), params)[0]

    found, expected = step(narrow), step(wide)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float8_e4m3fn
        np.testing.assert_array_equal(one, other.astype(jnp.float8_e4m3fn))


def test_coordinates_have_the_precision_of_the_product():
    _, state = start({"w": W})
    loss = lambda params, x: jnp.mean(jnp.sin(jnp.matmul(x, params["w"], precision="highest")))
    jaxpr = jax.make_jaxpr(galore_jax.value_and_grad(loss))({"w": W}, state, X)
    products = re.findall(r"dot_general\[.*?\n *\]", str(jaxpr), re.DOTALL)
    assert len(products) >= 3
    assert all(product.count("Precision.HIGHEST") == 2 for product in products)


def test_small_float16_cotangents_do_not_vanish():
    params = {"w": W.astype(jnp.float16)}
    _, state = start(params)

    def loss(params, x):
        wide = {"preferred_element_type": jnp.float32}
        return 1e-6 * jnp.mean(jnp.sin(jnp.matmul(x.astype(jnp.float16), params["w"], **wide)))

    _, found = galore_jax.value_and_grad(loss)(params, state, X)
    x, w = np.float64(X.astype(jnp.float16)), np.float64(params["w"])
    gradient = 1e-6 * x.T @ np.cos(x @ w) / (x @ w).size
    basis = state.inner_states[0].bases["w"]
    expected = np.float64(basis.vectors["left"]).T @ gradient
    # The product itself is in float16: 2⁻¹¹ for each of cos and x w.
    error = np.linalg.norm(found["w"].value - expected) / np.linalg.norm(expected)
    assert error < 2e-3


def test_adafactor_keeps_the_phase_of_complex_gradients():
    params, gradient = {"z": jnp.ones(3, jnp.complex64)}, {"z": jnp.array([2 + 2j, 4 - 2j, 1j])}
    tx = galore_jax.adafactor(1e-2, rank=2, b1=None)
    updates, _ = tx.update(gradient, tx.init(params), params)
    # The first step divides each entry by its absolute value, and the whole by its length.
    expected = -gradient["z"] / jnp.abs(gradient["z"])
    found = updates["z"] / jnp.abs(updates["z"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("projected", [True, False])
def test_layerwise_steps_keep_the_imaginary_parts_of_parameters_and_activations(projected):
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / 2
    params = {
        "inputs": {"kernel": normal(0, 6, 8)},
        "layers": {"kernel": normal(1, 3, 8, 8), "phase": jnp.exp(1j * normal(2, 3, 8))},
        "outputs": {"kernel": normal(3, 8, 4) * (1 + 1j)},
    }

    def embed(params, x):
        return (x @ params["inputs"]["kernel"]).astype(jnp.complex64), ()

    def block(layer, x, _):
        return x + jnp.tanh((x @ layer["kernel"]) * layer["phase"])

    def head_loss(params, x, _):
        return jnp.mean(jnp.abs(x @ params["outputs"]["kernel"]) ** 2), None

    def loss(params, x):
        x, _ = embed(params, x)
        for i in range(3):
            x = block(jax.tree.map(lambda stack, i=i: stack[i], params["layers"]), x, ())
        return head_loss(params, x, None)[0]

    tx, _ = start(params)
    state = galore_jax.layerwise.init(tx, params)
    model = galore_jax.layerwise.LayeredModel(embed, block, head_loss)
    step = galore_jax.make_step(model, tx, projected=projected, refreshes=False)

    @jax.jit
    def ordinary(params, state, x):
        if projected:
            _, gradients = galore_jax.value_and_grad(loss)(params, state, x)
        else:
            gradients = jax.grad(loss)(params, x)
        return galore_jax.apply_gradients(tx, gradients, state, params)[0]

    expected, found = ordinary(params, state.inner, X), jax.jit(step)(params, state, X).params
    # Sums of at most 8 x 8 products in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert jnp.abs(found["layers"]["phase"] - params["layers"]["phase"]).max() > 1e-2


def test_float64_losses_pass_the_check_up_to_the_rounding_of_float32_coordinates():
    with jax.enable_x64(True):
        params = {"w": jnp.float64(W)}
        loss = lambda params, x: jnp.mean(jnp.sin(x @ params["w"]) ** 2)
        _, state = start(params)
        errors = galore_jax.check_projection(loss)(params, state, jnp.float64(X))
    assert 0 <= errors["w"] < 2e-6
