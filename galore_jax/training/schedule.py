"""The learning-rate schedule of a training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to `floor` times the peak.

    In the warm-up the rate at update t, counted from 0, is `peak · (t + 1) / warmup`, so that no
    update has a rate of 0. The last update, t = steps - 1, is at the floor if there is another one
    between it and the warm-up.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    descent = max(steps - 1 - warmup, 1)

    def schedule(count: Any) -> jax.Array:
        rising = peak * (count + 1) / max(warmup, 1)
        progress = jnp.clip((count - warmup) / descent, 0, 1)
        falling = peak * (config.floor + (1 - config.floor) * (1 + jnp.cos(jnp.pi * progress)) / 2)
        return jnp.where(count < warmup, rising, falling)

    return schedule
