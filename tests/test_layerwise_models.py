"""Layer-wise steps of small models: tied and projected embeddings, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import max_difference

import galore_jax
from galore_jax import layerwise
from galore_jax.grads.layerwise import LayeredModel


def tied():
    """A model of plain arrays whose head is its embedding, and its loss in one piece."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (97, 16)),
        "layers": {"kernel": jax.random.normal(keys[1], (3, 16, 16)) / 4},
        "bias": jnp.zeros(97),
    }

    def embed(params, batch):
        return params["embedding"][batch], jnp.float32(0.5)

    def block(params, x, half):
        return x + half * jnp.tanh(x @ params["kernel"])

    def head_loss(params, x, batch):
        logits = x @ params["embedding"].T + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch)
        return losses.mean(), losses.max()

    def loss(params, batch):
        x, half = embed(params, batch)
        for i in range(3):
            x = block(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x, half)
        return head_loss(params, x, batch)[0]

    return LayeredModel(embed, block, head_loss), params, loss


def test_an_embedding_that_is_also_the_head_gets_both_gradients():
    model, params, loss = tied()
    tx = galore_jax.chain(galore_jax.galore(4), optax.sgd(0.1))
    step = jax.jit(galore_jax.make_step(model, tx, has_aux=True, refreshes=False))
    batch = jnp.arange(12).reshape(3, 4)
    state = layerwise.init(tx, params)
    result = step(params, state, batch)
    value, grads = galore_jax.value_and_grad(loss)(params, state.inner, batch)
    expected, _ = galore_jax.apply_gradients(tx, grads, state.inner, params)
    assert max_difference(result.params, expected) <= 1e-6
    loss, aux = result.value
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    assert aux >= loss


def patches(is_read_by_the_head):
    """A model whose embedding is a product, and one that its head multiplies by too."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "patch": jax.random.normal(keys[0], (24, 16)),
        "layers": {"kernel": jax.random.normal(keys[1], (1, 16, 16)) / 4},
    }

    def head_loss(params, x, batch):
        result = x @ params["patch"].T if is_read_by_the_head else x
        return jnp.mean(jnp.square(result - 1)), None

    def loss(params, batch):
        x = batch @ params["patch"]
        layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
        x = x + jnp.tanh(x @ layer["kernel"])
        if is_read_by_the_head:
            patch = params["patch"]
            x = x @ getattr(patch, "kernel", patch).T
        return jnp.mean(jnp.square(x - 1))

    block = lambda params, x, _: x + jnp.tanh(x @ params["kernel"])
    embed = lambda params, batch: (batch @ params["patch"], None)
    return LayeredModel(embed, block, head_loss), params, loss


@pytest.mark.parametrize("is_read_by_the_head", [False, True])
def test_an_embedding_that_is_projected_gets_the_ordinary_update(is_read_by_the_head):
    model, params, loss = patches(is_read_by_the_head)
    tx = galore_jax.adamw(0.01, 4)
    state = layerwise.init(tx, params)
    batch = jax.random.normal(jax.random.key(1), (10, 24))
    result = jax.jit(galore_jax.make_step(model, tx, refreshes=True))(params, state, batch)
    expected = galore_jax.refresh(loss)(params, state.inner, batch)
    _, grads = galore_jax.value_and_grad(loss)(params, expected, batch)
    expected, _ = galore_jax.apply_gradients(tx, grads, expected, params)
    assert max_difference(result.params, expected) <= 1e-6


def test_full_gradients_have_one_step_whether_it_refreshes_or_not():
    model, params, _ = tied()
    tx = galore_jax.adamw(0.01, 4)
    arguments = params, layerwise.init(tx, params), jnp.arange(12).reshape(3, 4)
    steps = [
        galore_jax.make_step(model, tx, projected=False, refreshes=refreshes)
        for refreshes in (False, True)
    ]
    assert len({str(jax.make_jaxpr(step)(*arguments)) for step in steps}) == 1


def test_models_it_would_train_wrongly_are_refused():
    model, params, _ = tied()
    tx = galore_jax.chain(galore_jax.galore(4), optax.sgd(0.1))
    state = layerwise.init(tx, params)
    leaking = model._replace(
        embed=lambda params, batch: (params["embedding"][batch], params["bias"])
    )
    with pytest.raises(ValueError, match="depends on parameters, whose gradient"):
        galore_jax.make_step(leaking, tx)(params, state, jnp.arange(4)[None])
    uneven = {**params, "layers": {**params["layers"], "other": jnp.zeros((2, 3))}}
    with pytest.raises(ValueError, match=r'below "layers" must be stacked by layer .* \[2, 3\]'):
        galore_jax.make_step(model, tx)(uneven, layerwise.init(tx, uneven), jnp.arange(4)[None])
    numbers = {"layers": {"kernel": optax.contrib.GaLoreDimensionNumbers(0, (1, 2))}}
    numbers |= {"embedding": None, "bias": None}
    tx = galore_jax.chain(galore_jax.galore(2, weight_dimension_numbers=numbers), optax.sgd(0.1))
    with pytest.raises(ValueError, match="layers/kernel is projected across its layers"):
        galore_jax.make_step(model, tx)(params, layerwise.init(tx, params), jnp.arange(4)[None])


def test_wrong_settings_and_states_are_refused():
    model, params, _ = tied()
    tx, batch = galore_jax.adamw(0.01, 4), jnp.arange(4)[None]
    with pytest.raises(ValueError, match=r"clip_by must be one of .* not 'previus_step'"):
        galore_jax.make_step(model, tx, clip_norm=1.0, clip_by="previus_step")
    plain = optax.adam(0.01)
    step, state = galore_jax.make_step(model, plain, projected=True), layerwise.init(plain, params)
    with pytest.raises(ValueError, match="need the state of an optimizer with galore"):
        step(params, state, batch)
    with pytest.raises(ValueError, match="which a LayeredModel does not have"):
        galore_jax.make_step(model, tx, data_axes="data")
