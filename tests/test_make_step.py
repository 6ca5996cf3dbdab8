"""`make_step` against the same step from its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, clip_by_finite_norm, galore, make_step
from galore_jax.grads.value_and_grad import takes_coordinates

GAP = 3


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": jax.random.normal(keys[0], (3, 16, 16)) / 4,
        "last": jax.random.normal(keys[1], (16, 12)) / 4,
        "bias": jnp.zeros(12),
    }


def batch(seed):
    return jax.random.normal(jax.random.key(seed), (8, 16)), jnp.full((8, 1), 2.0)


def loss(params, x, scale, *, shift):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])
    losses = jnp.sin(scale * (x @ params["last"] + params["bias"]) + shift) ** 2
    return losses.mean(), losses.max(axis=0)


def by_parts(tx, clip, projected, micro_batches):
    """The compiled parts that `make_step` replaces."""
    settings = {"has_aux": True, "micro_batches": micro_batches}
    refresh = jax.jit(galore_jax.refresh(loss, **settings))

    @jax.jit
    def rest(params, state, *batch, shift):
        if projected:
            gradients = galore_jax.value_and_grad(loss, **settings)
            value, grads = gradients(params, state, *batch, shift=shift)
        else:
            value, grads = jax.value_and_grad(loss, has_aux=True)(params, *batch, shift=shift)
        if clip:
            grads, _ = clip_by_finite_norm(clip).update(grads, optax.EmptyState())
        return *apply_gradients(tx, grads, state, params), value

    def step(params, state, *batch, shift):
        if projected and galore_jax.refresh_due(state):
            state = refresh(params, state, *batch, shift=shift)
        return rest(params, state, *batch, shift=shift)

    return step


def assert_equal(found, wanted):
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("tx", "clip", "micro_batches"),
    [
        (galore_jax.adamw(0.01, 4, GAP, moments="rotate", weight_decay=0.1), 0.0, 1),
        (galore_jax.adamw(0.01, 4, GAP, basis_dtype=jnp.int8), 0.1, 2),
        (galore_jax.adamw(0.01, 4, GAP, refresh="random", lazy_overlap=0.5), 0.0, 1),
        (galore_jax.adamw(0.01, 4, GAP, refresh="svd"), 0.0, 1),
        (optax.chain(galore(4, GAP), optax.adam(0.01)), 0.0, 1),
        (optax.MultiSteps(galore_jax.adamw(0.01, 4, GAP), 2).gradient_transformation(), 0.0, 1),
        (optax.adamw(0.01), 0.1, 1),
    ],
    ids=["rotate", "clip-micro-batches-int8", "random", "svd", "stock", "wrapped", "no-galore"],
)
def test_it_equals_its_parts_over_several_refreshes(tx, clip, micro_batches):
    state = galore_jax.init(tx, params())
    projected = takes_coordinates(state)
    step = make_step(loss, tx, has_aux=True, micro_batches=micro_batches, clip_norm=clip)
    step = jax.jit(step, donate_argnums=(0, 1))
    parts = by_parts(tx, clip, projected, micro_batches)
    found, wanted = (params(), state), (params(), jax.tree.map(jnp.copy, state))
    for t in range(2 * GAP + 2):
        *found, value = step(*found, *batch(t), shift=0.1)
        *wanted, expected = parts(*wanted, *batch(t), shift=0.1)
        assert_equal(value, expected)
        assert_equal(found, wanted)
    assert step._cache_size() == 1


def test_steps_with_and_without_a_refresh_may_be_compiled_apart():
    tx = chain(galore(4, GAP), optax.adam(0.01))
    one, *steps = (
        jax.jit(make_step(loss, tx, has_aux=True, refreshes=refreshes))
        for refreshes in (None, False, True)
    )
    found = wanted = params(), tx.init(params())
    for t in range(GAP + 2):
        due = bool(galore_jax.refresh_due(wanted[1]))
        *found, _ = one(*found, *batch(t), shift=0.1)
        *wanted, _ = steps[due](*wanted, *batch(t), shift=0.1)
        assert_equal(found, wanted)


def test_a_key_rounds_bfloat16_parameters():
    tx = galore_jax.adamw(1e-4, 4)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    step = jax.jit(make_step(loss, tx, has_aux=True))
    one, other = (
        step(narrow, galore_jax.init(tx, narrow), *batch(0), shift=0.1, rounding_key=key).params
        for key in jax.random.split(jax.random.key(0))
    )
    assert (one["last"] != other["last"]).any()


def test_the_loss_is_traced_once_for_the_refresh_and_the_gradient():
    traces = []

    def counted(params, x, scale):
        traces.append(None)
        return loss(params, x, scale, shift=0.1)[0]

    tx = galore_jax.adamw(0.01, 4)
    for micro_batches in (1, 4):
        traces.clear()
        step = jax.jit(make_step(counted, tx, micro_batches=micro_batches))
        step.lower(params(), tx.init(params()), *batch(0))
        assert len(traces) == 1, micro_batches
