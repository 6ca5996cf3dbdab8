"""Equinox: the arrays of a model are the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from galore_jax import adamw, make_step

x = jax.random.normal(jax.random.key(0), (256, 64))
batches = 20 * [(x, jnp.sin(x[:, :32]))]
model = eqx.nn.MLP(64, 32, 256, depth=2, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
tx = adamw(1e-2, rank=16)
state = tx.init(params)


def loss(params, x, y):
    model = eqx.combine(params, static)
    return optax.l2_loss(jax.vmap(model)(x), y).mean()


step = eqx.filter_jit(make_step(loss, tx))
for x, y in batches:
    params, state, value = step(params, state, x, y)

model = eqx.combine(params, static)
