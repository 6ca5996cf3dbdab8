"""Trees of parameters for the tests of the transform, and a loss that trains them."""

import jax
import jax.numpy as jnp
import numpy as np

STACKED = {"wide": (3, 12, 20), "tall": (3, 20, 12), "square": (3, 16, 16), "bias": (3, 12)}
PLAIN = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16), "bias": (12,)}


def random_params(shapes, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: {"bias" if name == "bias" else "kernel": jax.random.normal(key, shape, dtype)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(params, target):
    """A quadratic with one steep and many flat directions, so that subspaces are well defined."""
    errors = jax.tree.map(lambda p, t: p - t, params, target)
    decay = lambda e: e * 0.6 ** jnp.arange(e.shape[-1])
    return sum(jnp.sum(decay(e) ** 2) for e in jax.tree.leaves(errors))


gradients = jax.jit(jax.grad(loss))


def max_difference(one, other):
    # NumPy has nothing to compile.
    differences = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(), one, other)
    return float(max(jax.tree.leaves(differences)))
