"""What stands around a chain: the wrappers and tree tools of optax, jax.vmap, NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import PLAIN, loss, max_difference, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore, init


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, dict.fromkeys(PLAIN, True)),
        lambda tx: optax.partition({"low": tx}, dict.fromkeys(PLAIN, "low")),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.chain(optax.identity(), tx),
        lambda tx: optax.chain(galore(4, 2), optax.adam(0.1)),
        lambda tx: optax.inject_hyperparams(
            lambda rate, scale: chain(galore(4, 2, scale), optax.adam(rate))
        )(rate=0.1, scale=0.25),
    ],
    ids=["masked", "partition", "apply_if_finite", "MultiSteps", "chain", "stock", "inject"],
)
def test_wrappers_around_a_chain_change_nothing(wrap):
    target = random_params(PLAIN, seed=1)
    runs = []
    for tx in (plain := chain(galore(4, 2), optax.adam(0.1)), wrap(plain)):
        params, state = random_params(PLAIN), init(tx, random_params(PLAIN))
        step = jax.jit(lambda p, s, tx=tx: apply_gradients(tx, jax.grad(loss)(p, target), s, p))
        for _ in range(4):
            params, state = step(params, state)
        runs.append(params)
    assert max_difference(*runs) <= 2e-6


def test_a_partition_may_mix_a_chain_with_a_stock_one():
    target = random_params(PLAIN, seed=1)
    labels = dict.fromkeys(PLAIN, "chain") | {"tall": "stock"}
    inner = galore(4), optax.adam(0.1)
    mixed = optax.partition({"chain": chain(*inner), "stock": optax.chain(*inner)}, labels)
    results = []
    for tx in (mixed, chain(*inner)):
        params = random_params(PLAIN)
        grads = jax.grad(loss)(params, target)
        results.append(apply_gradients(tx, grads, init(tx, params), params)[0])
    # The seeds of the bases differ with the order of leaves; the gradients' own subspaces do not.
    assert max_difference(results[0]["bias"], results[1]["bias"]) == 0
    assert max_difference(results[0], random_params(PLAIN)) > 0


def test_extra_arguments_reach_the_transformations():
    params = random_params(PLAIN)
    for tx in (
        chain(galore(4), optax.sgd(1.0), optax.contrib.reduce_on_plateau()),
        optax.chain(galore(4), optax.sgd(1.0), optax.contrib.reduce_on_plateau()),
    ):
        _, state = apply_gradients(tx, params, init(tx, params), params, value=3.0)
        assert float(optax.tree.get(state, "best_value")) == 3.0


def test_tree_get_and_map_params_reach_the_state():
    params = random_params(PLAIN)
    tx = galore_jax.adamw(1e-2, rank=4)
    state = tx.init(params)
    assert optax.tree.get(state, "bases")["wide"]["kernel"].vectors["left"].shape == (12, 4)
    zeros = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert float(jnp.abs(zeros.links[0].bases["wide"]["kernel"].vectors["left"]).max()) == 0


def test_an_ensemble_is_trained_under_vmap():
    params = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (12, 20)))(jnp.arange(3))
    tx = galore_jax.adamw(0.1, rank=4)
    step = lambda p: apply_gradients(tx, {"w": p}, tx.init({"w": p}), {"w": p})[0]["w"]  # noqa: E731
    together = jax.vmap(step)(params)
    for one, alone in zip(together, params, strict=True):
        np.testing.assert_allclose(one, step(alone), atol=1e-5)


def test_trains_an_nnx_model():
    model = nnx.Linear(12, 20, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tx = chain(galore(rank=4), optax.adam(1e-1))
    state = tx.init(params)
    assert jax.tree.leaves(optax.tree.get(state, "mu")["kernel"])[0].shape == (4, 20)
    x = jax.random.normal(jax.random.key(0), (32, 12))

    def fit(params):
        return jnp.mean((nnx.merge(graph, params)(x) - jnp.tanh(x @ jnp.ones((12, 20)))) ** 2)

    before = fit(params)
    step = jax.jit(lambda p, s: apply_gradients(tx, jax.grad(fit)(p), s, p))
    for _ in range(30):
        params, state = step(params, state)
    assert fit(params) < 0.5 * before


def test_trains_with_the_optimizer_of_nnx():
    tx = galore_jax.adamw(1e-1, rank=4)
    # NNX wraps each array of a state in a variable, so the state must be started from pure arrays.
    pure = optax.GradientTransformationExtraArgs(lambda p: tx.init(nnx.as_pure(p)), tx.update)
    model = nnx.Linear(12, 20, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pure, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 12))

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(
            lambda model: jnp.mean((model(x) - jnp.sin(x).sum()) ** 2)
        )(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
