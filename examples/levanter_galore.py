"""An optimizer for Levanter, found as `optimizer.type: galore`."""

from dataclasses import dataclass

import optax
from levanter.optim.config import OptimizerConfig
from levanter.optim.util import flatten_linear_layers, unflatten_linear_layers

import galore_jax


@OptimizerConfig.register_subclass("galore")
@dataclass(frozen=True)
class GaLoreConfig(OptimizerConfig):
    rank: int = 128
    update_proj_gap: int = 200
    max_grad_norm: float = 1.0

    def build(self, num_train_steps):
        def optimizer(learning_rate):
            settings = {"update_proj_gap": self.update_proj_gap, "weight_decay": self.weight_decay}
            clip = galore_jax.clip_by_finite_norm(self.max_grad_norm)
            adamw = galore_jax.adamw(learning_rate, self.rank, **settings)
            return on_flat_layers(galore_jax.chain(clip, adamw))

        schedule = self.lr_scheduler(num_train_steps)
        return optax.inject_hyperparams(optimizer)(learning_rate=schedule)


def on_flat_layers(tx):
    def init(params):
        return tx.init(flatten_linear_layers(params))

    def update(grads, state, params, **extra_args):
        flat = flatten_linear_layers(params)
        updates, state = tx.update(flatten_linear_layers(grads), state, flat)
        return unflatten_linear_layers(params, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
