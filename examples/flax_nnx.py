"""Flax NNX, with full and with projected gradients."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from galore_jax import adamw, refresh, refresh_due, value_and_grad

x = jax.random.normal(jax.random.key(0), (256, 64))
batches = 20 * [(x, jnp.sin(x[:, :32]))]
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(64, 256, rngs=rngs),
    nnx.gelu,
    nnx.Dropout(0.1, rngs=rngs),
    nnx.Linear(256, 32, rngs=rngs),
)
tx = adamw(1e-2, rank=16)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss_fn(model, x, y):
    return optax.l2_loss(model(x), y).mean()


@nnx.jit
def step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return value


# For projected gradients the loss is a function of the parameters. It returns what else the model
# changes, here the random state of the dropout, as an auxiliary value.
def split(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        return loss_fn(model, x, y), nnx.state(model, nnx.Not(nnx.Param))

    return loss, params


@nnx.jit
def projected_step(model, optimizer, x, y):
    loss, params = split(model)
    state = nnx.as_pure(optimizer.opt_state)
    (value, rest), grads = value_and_grad(loss, has_aux=True)(params, state, x, y)
    nnx.update(model, rest)
    optimizer.update(model, grads)
    return value


@nnx.jit
def new_bases(model, optimizer, x, y):
    loss, params = split(model)
    state = nnx.as_pure(optimizer.opt_state)
    state = refresh(loss, has_aux=True)(params, state, x, y)
    nnx.update(optimizer.opt_state, nnx.state(state))


for x, y in batches:
    if refresh_due(nnx.as_pure(optimizer.opt_state)):
        new_bases(model, optimizer, x, y)
    projected_step(model, optimizer, x, y)
