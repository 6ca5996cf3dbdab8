"""What tests of projected gradients share: a comparison with full ones, and a small model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import chain, describe, galore, value_and_grad
from galore_jax.optim.galore_state import galore_states
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.projection import is_coordinates

DENSE = (((1,), (0,)), ((), ()))
# Bounds of the largest difference over the largest coordinate.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def started(params, **settings):
    """An optimizer and its state, with random bases."""
    tx = chain(galore(settings.pop("rank", 4), **settings), optax.adam(1e-3))
    return tx, tx.init(params)


def compared(loss, params, *batch, **settings):
    """The paths whose gradients are all projected in the backward pass.

    All gradients are compared with full ones, and the value with that of the loss.
    """
    dtype = settings.pop("dtype", "float32")
    options = {key: settings.pop(key) for key in ("has_aux", "micro_batches") if key in settings}
    tx, state = started(params, **settings)
    has_aux = options.get("has_aux", False)
    value, found = jax.jit(value_and_grad(loss, **options))(params, state, *batch)
    wanted, full = jax.jit(jax.value_and_grad(loss, has_aux=has_aux))(params, *batch)
    np.testing.assert_allclose(*map(jax.tree.leaves, (value, wanted)), rtol=1e-6)
    found, full = unboxed(found), unboxed(full)
    [galore_state] = galore_states(state, inside_chains=True)
    uses = describe(params, tx, loss, *batch, has_aux=has_aux).uses

    def at_leaf(path, found, full, basis):
        wanted = full
        if is_coordinates(found):
            assert uses[basis.projection.name].gradient != "full"
            wanted, found = basis.projection.project(basis.vectors, full), found.value
            assert found.dtype == jnp.float32
        wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
        largest = np.abs(wanted).max()
        assert largest > 0, path
        assert np.abs(found - wanted).max() <= TOLERANCE[dtype] * largest, path

    jax.tree_util.tree_map_with_path(
        at_leaf, found, full, galore_state.bases, is_leaf=is_coordinates
    )
    return {name for name, own in uses.items() if own.gradient == "projected"}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.gelu(nn.Dense(24, name="first")(x)))


def squared(model, x):
    """A loss whose gradient is dense, and the model's parameters."""
    params = model.init(jax.random.key(0), x)["params"]
    return lambda params, x: jnp.mean(jnp.sin(model.apply({"params": params}, x)) ** 2), params


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape)
