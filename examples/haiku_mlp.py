"""Haiku: parameters are a plain dictionary."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from galore_jax import adamw, make_step

x = jax.random.normal(jax.random.key(0), (256, 64))
batches = 20 * [(x, jnp.sin(x[:, :32]))]
network = hk.transform(lambda x: hk.nets.MLP([256, 32], activation=jax.nn.gelu)(x))
params = network.init(jax.random.key(0), x)
tx = adamw(1e-2, rank=16)
state = tx.init(params)


def loss(params, x, y):
    return optax.l2_loss(network.apply(params, None, x), y).mean()


step = jax.jit(make_step(loss, tx))
for x, y in batches:
    params, state, value = step(params, state, x, y)
