"""The learning rate over the steps of a training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to `floor` times the peak.

    The rate at t (counted from 0) is `peak · (t + 1) / warmup` for t < warmup, so no update is lost
    to a rate of 0; the last one, t = steps - 1, is at the floor if another one is between it and
    the warm-up.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    descent = max(steps - 1 - warmup, 1)

    def schedule(count: Any) -> jax.Array:
        rising = peak * (count + 1) / max(warmup, 1)
        progress = jnp.clip((count - warmup) / descent, 0, 1)
        falling = peak * (config.floor + (1 - config.floor) * (1 + jnp.cos(jnp.pi * progress)) / 2)
        return jnp.where(count < warmup, rising, falling)

    return schedule
