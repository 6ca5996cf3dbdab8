"""The ready-made optimizers train: a quadratic, a low-rank regression, a small transformer."""

import jax
import jax.numpy as jnp
import optax
import pytest
from next_tokens import next_tokens

import galore_jax
from galore_jax import apply_gradients
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss

pytestmark = pytest.mark.slow

RANK, GAP, STEPS = 4, 10, 300
# Each coordinate moves by about the rate at a step: at most 15 over all steps, a third of them in
# any direction. The targets' largest singular values are near 4, 4 / √20 a coordinate.
RATE = optax.cosine_decay_schedule(0.1, STEPS)


def trained(tx, params, losses, steps):
    """The named losses before the first step and after the last."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: sum(losses(params).values()))(params)
            return apply_gradients(tx, grads, state, params), None

        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return losses(params), losses(after)

    return run(params)


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
    before, after = trained(tx, params, losses, STEPS)
    for problem in before:
        assert after[problem] < 0.02 * before[problem], problem


def test_the_blocks_of_a_small_transformer_learn_sequences_by_heart():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        max_length=16,
        initializer_range=0.2,
    )
    model = Llama(config)
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 1, config.vocab_size)
    segments = jnp.ones_like(tokens)
    targets = next_tokens(tokens, segments)
    params = model.init(jax.random.key(0), tokens)["params"]

    def losses(params):
        logits = model.apply({"params": params}, tokens, segments)
        total, count = next_token_loss(logits, targets)
        return {"loss": total / count}

    # Only the blocks are trained, so what is learned is learned in coordinates.
    labels = dict.fromkeys(params, "frozen") | {"layers": "trained"}
    tx = galore_jax.adamw(optax.cosine_decay_schedule(0.02, 150), 8, 20, scale=1.0)
    tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    before, after = trained(tx, params, losses, 150)
    assert after["loss"] < 0.1 * before["loss"]
