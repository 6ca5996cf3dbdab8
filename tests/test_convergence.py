"""The ready-made optimizers solve a quadratic and a low-rank regression."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients

pytestmark = pytest.mark.slow

RANK, GAP, STEPS = 4, 10, 300
# Each coordinate moves by about the rate at a step: at most 15 over all steps, a third of them in
# any direction. The targets' largest singular values are near 4, 4 / √20 a coordinate.
RATE = optax.cosine_decay_schedule(0.1, STEPS)


@pytest.mark.parametrize(
    ("name", "method", "moments"),
    [
        ("adamw", "random", "keep"),
        ("adafactor", "eigh", "keep"),
        ("lion", "subspace_iteration", "rotate"),
        ("muon", "subspace_iteration", "keep"),
        ("fira", "svd", "keep"),
        ("apollo", "random", "keep"),
    ],
)
def test_a_quadratic_and_a_low_rank_regression_are_solved(name, method, moments):
    random = lambda key, shape: 0.5 * jax.random.normal(key, shape)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    target = {"stack": random(next(keys), (2, 12, 20)), "bias": random(next(keys), (12,))}
    inputs = random(next(keys), (64, 20))
    outputs = inputs @ random(next(keys), (20, RANK)) @ random(next(keys), (RANK, 12))

    def losses(params):
        errors = jax.tree.map(jnp.subtract, params["quadratic"], target)
        return {
            "quadratic": sum(jnp.sum(error**2) / 2 for error in jax.tree.leaves(errors)),
            "regression": jnp.mean((inputs @ params["regression"] - outputs) ** 2),
        }

    params = {"quadratic": jax.tree.map(jnp.zeros_like, target), "regression": jnp.zeros((20, 12))}
    make = getattr(galore_jax, name)
    tx = make(RATE, RANK, GAP, scale=1.0, refresh=method, moments=moments)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: sum(losses(params).values()))(params)
            return apply_gradients(tx, grads, state, params), None

        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return losses(params), losses(after)

    before, after = run(params)
    for problem in before:
        assert after[problem] < 0.02 * before[problem], problem
