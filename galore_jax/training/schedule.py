"""The learning-rate schedule of a training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.training.config import OptimizerConfig

# Updates of ReLoRA's warm-up after a restart, in the scripts of its authors.
RESTART_WARMUP = 100


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to `floor` times the peak.

    In the warm-up the rate at update t, counted from 0, is `peak · (t + 1) / warmup`, so that no
    update has a rate of 0. The last update, t = steps - 1, is at the floor if there is another one
    between it and the warm-up.

    ReLoRA (arXiv 2307.05695, section 3) also warms up after each restart that comes after the
    first warm-up, over a tenth of the gap or `RESTART_WARMUP` updates, whichever is less: the rate
    is what it would be otherwise times 1/n, 2/n, …, 1.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    descent = max(steps - 1 - warmup, 1)

    gap = config.lora.restart_gap
    restart_warmup = max(1, min(gap // 10, RESTART_WARMUP))

    def schedule(count: Any) -> jax.Array:
        rising = peak * (count + 1) / max(warmup, 1)
        progress = jnp.clip((count - warmup) / descent, 0, 1)
        falling = peak * (config.floor + (1 - config.floor) * (1 + jnp.cos(jnp.pi * progress)) / 2)
        if config.name == "relora":
            after_restart = jnp.minimum((count % gap + 1) / restart_warmup, 1)
            restarted = count - count % gap >= max(gap, warmup)
            falling *= jnp.where(restarted, after_restart, 1)
        return jnp.where(count < warmup, rising, falling)

    return schedule
