"""The optimizer of a training, made from its configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax
from galore_jax.models.adapters import is_factor
from galore_jax.optim.apollo import scale_by_apollo
from galore_jax.optim.fira import scale_by_fira
from galore_jax.optim.foam import scale_by_foam
from galore_jax.optim.muon import scale_by_muon
from galore_jax.optim.muon8bit import scale_by_muon8bit
from galore_jax.optim.normuon import scale_by_neuron_norms
from galore_jax.optim.scale_sgd import scale_by_column_norms
from galore_jax.subspace.matrix_view import is_head, is_vector, path_names
from galore_jax.subspace.projection import is_coordinates
from galore_jax.subspace.rules import Rule, projections
from galore_jax.training.config import OptimizerConfig
from galore_jax.types import PyTree

# Updates of ReLoRA's warm-up after a restart, in the scripts of its authors.
RESTART_WARMUP = 100


def make_optimizer(
    config: OptimizerConfig, steps: int, *, clips: bool = True
) -> optax.GradientTransformation:
    """The optimizer called `config.name`, after a clip by global norm if one is set.

    Args:
      config: the section `[optimizer]`.
      steps: updates of the training, for the learning-rate schedule.
      clips: False leaves the clip out, for a layer-wise step, which clips by itself.
    """
    schedule = learning_rate_schedule(config, steps)
    optimizer: Any = (_low_rank if config.has_galore else _full_rank)(config, schedule)
    if not clips or not config.clip_norm:
        return optimizer
    clip = galore_jax.clip_by_finite_norm if config.has_galore else optax.clip_by_global_norm
    return galore_jax.chain(clip(config.clip_norm), optimizer)


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


def matrices(params: PyTree) -> PyTree:
    """Whether each leaf is one of those that GaLore projects, by name and shape, at some rank.

    So are low-rank factors, which take the place of these matrices.

    Args:
      params: arrays, their shapes or `Coordinates`, of a model or of one of its layers.

    Returns:
      A tree of booleans like `params`, with one for `Coordinates`.
    """

    def whole(leaf: Any) -> Any:
        if not is_coordinates(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.projection.view.shape, jnp.float32)

    # The rank of a configuration may be too large for some of the matrices.
    whole_params = jax.tree.map(whole, params, is_leaf=is_coordinates)
    found = projections(whole_params, Rule(rank=1, proj_type="std"), {}, None)

    def is_matrix(path: Any, projection: Any) -> bool:
        return projection is not None or is_factor(path_names(path))

    return jax.tree_util.tree_map_with_path(is_matrix, found, is_leaf=lambda leaf: leaf is None)


def _full_rank(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    match config.name:
        case "adamw" | "lora" | "relora" | "lowrank":
            normalise = optax.scale_by_adam(**_adam(config))
        case "galore_fira":
            normalise = scale_by_fira(**config.galore.given, **_adam(config))
        case "apollo":
            normalise = scale_by_apollo(**config.galore.given, **_adam(config))
        case "adamw8bit":
            normalise = galore_jax.scale_by_adam8bit(
                **_adam(config), implementation=config.implementation
            )
        case "muon8bit":
            normalise = scale_by_muon8bit(**_adam(config), implementation=config.implementation)
        case "scale":
            parts: dict[Any, optax.GradientTransformation] = {
                "vector": optax.scale_by_adam(**_adam(config)),
                "head": scale_by_column_norms(config.b1),
                "other": scale_by_column_norms(),
            }
            normalise = optax.partition(parts, _parts_of_scale)
        case "normuon":
            normuon = optax.chain(scale_by_muon(), scale_by_neuron_norms())
            normalise = _with_adam(normuon, config)
        case "foam":
            normalise = _with_adam(scale_by_foam(**_adam(config)), config)
        case _:
            normalise = _with_adam(scale_by_muon(), config)
    return optax.chain(
        normalise,
        _scale_matrices(config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_matrices(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.masked(optax.scale(config.matrix_rate), matrices)


def _with_adam(
    of_matrices: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    def labels(params: PyTree) -> PyTree:
        return jax.tree.map(lambda is_matrix: "matrix" if is_matrix else "rest", matrices(params))

    adam = optax.scale_by_adam(**_adam(config))
    return optax.partition({"matrix": of_matrices, "rest": adam}, labels)


def _parts_of_scale(params: PyTree) -> PyTree:
    def label(path: Any, _: Any) -> str:
        names = path_names(path)
        return "vector" if is_vector(names) else "head" if is_head(names) else "other"

    return jax.tree_util.tree_map_with_path(label, params)


def _low_rank(config: OptimizerConfig, schedule: optax.Schedule) -> Any:
    settings: dict[str, Any] = {"weight_decay": config.weight_decay} | config.galore.given
    settings |= {"implementation": config.implementation}
    adam: dict[str, Any] = settings | _adam(config)
    if config.name.endswith("8bit"):
        adam |= {"eight_bit": True}
    match config.name.removesuffix("8bit"):
        case "galore_adamw":
            optimizer = galore_jax.adamw(schedule, **adam)
        case "galore_muon":
            optimizer = galore_jax.muon(schedule, **adam)
        case "galore_adafactor":
            optimizer = galore_jax.adafactor(schedule, b1=config.b1 or None, **settings)
        case _:
            optimizer = galore_jax.lion(schedule, b1=config.b1, **_b2(config), **settings)
    *transforms, decay = optimizer.transforms
    return galore_jax.chain(*transforms, _scale_matrices(config), decay)


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    return {"b1": config.b1, "eps": config.eps, **_b2(config)}


def _b2(config: OptimizerConfig) -> dict[str, Any]:
    """The setting `b2`, unless the optimizer's default is meant."""
    return {} if config.b2 is None else {"b2": config.b2}
