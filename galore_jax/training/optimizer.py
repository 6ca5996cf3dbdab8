"""The optimizer of a training, made from its configuration."""

from typing import Any

import optax

import galore_jax
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.schedule import learning_rate_schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, *, clips: bool = True
) -> optax.GradientTransformation:
    """The optimizer called `config.name`, with a clip by global norm if one is set.

    With GaLore the clip comes after the projection and clips coordinates, or in front of it and
    clips full gradients.

    Args:
      config: the section `[optimizer]`.
      steps: updates of the training, for the learning-rate schedule.
      clips: False leaves the clip out, for a layer-wise step, which clips by itself.
    """
    optimizer = _unclipped(config, learning_rate_schedule(config, steps))
    if not clips or not config.clip_norm:
        return optimizer
    if not config.has_galore:
        return galore_jax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    clip = galore_jax.clip_by_finite_norm(config.clip_norm)
    if config.clip_norm_of == "gradients":
        return galore_jax.chain(clip, optimizer)
    galore, *rest = optimizer.transforms
    return galore_jax.chain(galore, clip, *rest)


def _unclipped(config: OptimizerConfig, schedule: optax.Schedule) -> Any:
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    galore: dict[str, Any] = decay | config.galore_settings
    b2 = {} if config.b2 is None else {"b2": config.b2}
    adam: dict[str, Any] = {"b1": config.b1, "eps": config.eps, **b2}
    implementation: Any = config.implementation
    match config.name:
        case "adamw":
            return optax.adamw(schedule, **adam, **decay)
        case "adamw8bit":
            return galore_jax.adamw8bit(schedule, **adam, **decay, implementation=implementation)
        case "galore_adamw":
            return galore_jax.adamw(schedule, **adam, **galore)
        case "galore_adamw8bit":
            return galore_jax.adamw(
                schedule, **adam, **galore, eight_bit=True, implementation=implementation
            )
        case "galore_adafactor":
            return galore_jax.adafactor(schedule, b1=config.b1 or None, **galore)
        case _:
            return galore_jax.lion(schedule, b1=config.b1, **b2, **galore)
