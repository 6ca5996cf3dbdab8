"""A TrainState of Flax Linen, with projected gradients, and its checkpoint."""

import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from galore_jax import adamw, make_step

x = jax.random.normal(jax.random.key(0), (256, 64))
batches = 20 * [(x, jnp.sin(x[:, :32]))]
model = nn.Sequential([nn.Dense(256), nn.gelu, nn.Dense(32)])


def create():
    params = model.init(jax.random.key(0), x)["params"]
    kernels = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = adamw(1e-2, rank=16, weight_decay=0.1, mask=kernels)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss(params, x, y):
    return optax.l2_loss(model.apply({"params": params}, x), y).mean()


@jax.jit
def step(state, x, y):
    params, opt_state, value = make_step(loss, state.tx)(state.params, state.opt_state, x, y)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value


state = create()
for x, y in batches:
    state, value = step(state, x, y)

# The state is a pytree of arrays, which Orbax saves and restores as it is.
with ocp.CheckpointManager(tempfile.mkdtemp()) as checkpoints:
    checkpoints.save(20, args=ocp.args.StandardSave(state))
    shapes = jax.eval_shape(lambda: state)
    restored = checkpoints.restore(20, args=ocp.args.StandardRestore(shapes))
