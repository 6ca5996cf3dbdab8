"""The optimizer that a configuration names."""

from typing import Any

import optax

import galore_jax
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.schedule import learning_rate_schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, *, clips: bool = True
) -> optax.GradientTransformation:
    """The transformation named by `config.name`, with a clip by global norm if one is set.

    With GaLore that clips coordinates, or stands in front and clips full gradients. A layer-wise
    step clips by itself, and wants none: `clips=False`.
    """
    schedule = learning_rate_schedule(config, steps)
    b2 = {} if config.b2 is None else {"b2": config.b2}
    implementation: Any = config.implementation
    adam: dict[str, Any] = {"b1": config.b1, "eps": config.eps, **b2}
    common: dict[str, Any] = {"weight_decay": config.weight_decay}
    clip_norm = config.clip_norm if clips else 0.0
    if not config.has_galore:
        if config.name == "adamw8bit":
            optimizer = galore_jax.adamw8bit(
                schedule, **adam, **common, implementation=implementation
            )
        else:
            optimizer = optax.adamw(schedule, **adam, **common)
        clip = optax.clip_by_global_norm(clip_norm)
        return galore_jax.chain(clip, optimizer) if clip_norm else optimizer
    common |= config.galore_settings
    if config.name in ("galore_adamw", "galore_adamw8bit"):
        is_8bit = config.name == "galore_adamw8bit"
        bits = {"eight_bit": True, "implementation": implementation} if is_8bit else {}
        optimizer = galore_jax.adamw(schedule, **adam, **common, **bits)
    elif config.name == "galore_adafactor":
        optimizer = galore_jax.adafactor(schedule, b1=config.b1 or None, **common)
    else:
        optimizer = galore_jax.lion(schedule, b1=config.b1, **b2, **common)
    if not clip_norm:
        return optimizer
    clip = galore_jax.clip_by_finite_norm(clip_norm)
    if config.clip_norm_of == "gradients":
        return galore_jax.chain(clip, optimizer)
    galore, *rest = optimizer.transforms
    return galore_jax.chain(galore, clip, *rest)
