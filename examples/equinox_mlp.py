"""Equinox: the arrays of a model are the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from galore_jax import adamw, apply_gradients, refresh, refresh_due, value_and_grad

x = jax.random.normal(jax.random.key(0), (256, 64))
batches = 20 * [(x, jnp.sin(x[:, :32]))]
model = eqx.nn.MLP(64, 32, 256, depth=2, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
tx = adamw(1e-2, rank=16)
state = tx.init(params)


def loss(params, x, y):
    model = eqx.combine(params, static)
    return optax.l2_loss(jax.vmap(model)(x), y).mean()


@eqx.filter_jit
def step(params, state, x, y):
    value, grads = value_and_grad(loss)(params, state, x, y)
    return *apply_gradients(tx, grads, state, params), value


new_bases = eqx.filter_jit(refresh(loss))
for x, y in batches:
    if refresh_due(state):
        state = new_bases(params, state, x, y)
    params, state, value = step(params, state, x, y)

model = eqx.combine(params, static)
