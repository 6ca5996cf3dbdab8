"""Where GaLore provably does not converge, and what does: the counterexamples of GoLore and GUM.

`f(X) = ½ ‖A X‖² + ⟨B, X⟩`, where A keeps the first n − r rows and B has a block D of these rows and
columns. The gradient's noise, `± σ` on the diagonal of the other r rows and columns, is larger than
the gradient. The leading singular vectors of every sample are therefore those of the noise, and a
subspace of them contains nothing of the gradient (arXiv 2410.11289, sections 3.2 and A). GUM (arXiv
2510.17802, section 5.1) takes the same problem with a dense D, a larger subspace and noise.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, galore

GAP, STEPS = 10, 1500


@dataclass(frozen=True)
class Problem:
    """A counterexample, tried with this rank r."""

    size: int
    rank: int
    noise: float
    dense: bool

    @property
    def rest(self):
        return self.size - self.rank

    def excess(self, x):
        """f(X) − min f, of which the noise changes nothing."""
        if self.dense:
            block = jax.random.normal(jax.random.key(1), (self.rest, self.rest))
        else:
            block = jnp.diag(jnp.linspace(1, 3, self.rest))
        error = x[: self.rest].at[:, : self.rest].add(block)
        return jnp.sum(error**2) / 2


GOLORE = Problem(size=12, rank=3, noise=5.0, dense=False)
GUM = Problem(size=20, rank=12, noise=100.0, dense=True)
PROBLEMS = pytest.mark.parametrize("problem", [GOLORE, GUM], ids=["GoLore", "GUM"])


def rate(count):
    return 0.1 * (1 - count / STEPS)


def excess_after_training(problem, tx):
    """As a fraction of the excess at the start."""
    rest, noise = problem.rest, problem.noise * jnp.eye(problem.rank)
    noise = jnp.zeros((problem.size, problem.size)).at[rest:, rest:].set(noise)

    def step(carry, sign):
        params, state = carry
        gradient = jax.grad(lambda params: problem.excess(params["kernel"]))(params)
        gradient = {"kernel": gradient["kernel"] + sign * noise}
        return apply_gradients(tx, gradient, state, params), None

    @jax.jit
    def run(params):
        signs = jax.random.rademacher(jax.random.key(0), (STEPS,), jnp.float32)
        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), signs)
        return problem.excess(after["kernel"]) / problem.excess(params["kernel"])

    return float(run({"kernel": jnp.zeros((problem.size, problem.size))}))


def momentum(rate, rank, gap, scale, **settings):
    return chain(galore(rank, gap, scale, **settings), optax.sgd(rate, momentum=0.9))


OPTIMIZERS = {"adamw": galore_jax.adamw, "momentum": momentum}


@PROBLEMS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leading_singular_vectors_hold_only_noise_and_nothing_is_learned(name, problem):
    tx = OPTIMIZERS[name](rate, problem.rank, GAP, 1.0, refresh="svd")
    assert excess_after_training(problem, tx) > 0.999


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_random_subspaces_converge_where_the_noise_is_moderate(name):
    tx = OPTIMIZERS[name](rate, GOLORE.rank, GAP, 1.0, refresh="random")
    # The noise in a random subspace is as large as the gradient when 0.05 of the excess is left.
    assert excess_after_training(GOLORE, tx) < 0.05
