"""What converges where GaLore provably does not: the counterexample of arXiv 2410.11289.

`f(X) = ½ ‖A X‖² + ⟨B, X⟩`, where A keeps the first n − r rows and B has a block D of these rows and
columns. The gradient's noise, `± σ` on the diagonal of the other r rows and columns, is larger than
the gradient. The leading singular vectors of every sample are therefore those of the noise, and a
subspace of them contains nothing of the gradient (sections 3.2 and A).
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, galore

SIZE, RANK, GAP, STEPS = 12, 3, 10, 1500
REST = SIZE - RANK
NOISE = 5.0
DIAGONAL = jnp.linspace(1, 3, REST)


def rate(count):
    return 0.1 * (1 - count / STEPS)


def excess(x):
    """f(X) − min f, of which the noise changes nothing."""
    block = x[:REST]
    error = block.at[:, :REST].add(jnp.diag(DIAGONAL))
    return jnp.sum(error**2) / 2


def excess_after_training(tx):
    """As a fraction of the excess at the start."""

    def step(carry, sign):
        params, state = carry
        gradient = jax.grad(lambda params: excess(params["kernel"]))(params)
        noise = jnp.zeros((SIZE, SIZE)).at[REST:, REST:].set(NOISE * jnp.eye(RANK))
        gradient = {"kernel": gradient["kernel"] + sign * noise}
        return apply_gradients(tx, gradient, state, params), None

    @jax.jit
    def run(params):
        signs = jax.random.rademacher(jax.random.key(0), (STEPS,), jnp.float32)
        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), signs)
        return excess(after["kernel"]) / excess(params["kernel"])

    return float(run({"kernel": jnp.zeros((SIZE, SIZE))}))


def momentum(rate, rank, gap, scale, **settings):
    return chain(galore(rank, gap, scale, **settings), optax.sgd(rate, momentum=0.9))


OPTIMIZERS = {
    "adamw": galore_jax.adamw,
    "lion": galore_jax.lion,
    "momentum": momentum,
    "muon": galore_jax.muon,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leading_singular_vectors_hold_only_noise_and_nothing_is_learned(name):
    tx = OPTIMIZERS[name](rate, RANK, GAP, 1.0, refresh="svd")
    assert excess_after_training(tx) > 0.999


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_random_subspaces_converge(name):
    tx = OPTIMIZERS[name](rate, RANK, GAP, 1.0, refresh="random")
    # The noise in a random subspace is as large as the gradient when 0.05 of the excess is left.
    assert excess_after_training(tx) < 0.05


def test_without_a_subspace_muon_converges():
    assert excess_after_training(optax.contrib.muon(rate, consistent_rms=0.2)) < 1e-6
