"""One training step: the optimizer and its schedule, gradients over micro-batches, the update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import galore_jax
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.diagnostics import diagnose, movement

PyTree = Any
Batch = dict[str, Any]

# The arguments of `galore_jax.galore` that `OptimizerConfig` has.
GALORE = (
    "rank",
    "update_proj_gap",
    "scale",
    "proj_type",
    "refresh",
    "moments",
    "stagger",
    "lazy_overlap",
    "max_gap",
)


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      params: the model's parameters, in config.model.dtype.
      opt_state: the optimizer's state.
      step: int32 scalar, updates made so far.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation named by `config.name`, behind a clip by global norm if one is set."""
    schedule = learning_rate_schedule(config, steps)
    b2 = {} if config.b2 is None else {"b2": config.b2}
    adam: dict[str, Any] = {"b1": config.b1, "eps": config.eps, **b2}
    common: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.name == "adamw":
        optimizer, clip = optax.adamw(schedule, **adam, **common), optax.clip_by_global_norm
    else:
        common |= {name: getattr(config, name) for name in GALORE}
        clip = galore_jax.clip_by_finite_norm
        if config.name == "galore_adamw":
            optimizer = galore_jax.adamw(schedule, **adam, **common)
        elif config.name == "galore_adafactor":
            optimizer = galore_jax.adafactor(schedule, b1=config.b1 or None, **common)
        else:
            optimizer = galore_jax.lion(schedule, b1=config.b1, **b2, **common)
    return galore_jax.chain(clip(config.clip_norm), optimizer) if config.clip_norm else optimizer


def init_state(config: Config) -> TrainState:
    """The state before the first step; a pure function of the configuration."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Llama(config.model).init(jax.random.key(config.training.seed), tokens)["params"]
    tx = make_optimizer(config.optimizer, config.training.steps)
    # As galore's, the moments of plain AdamW are float32 whatever the parameters are.
    started = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(params, galore_jax.init(tx, started), jnp.zeros([], jnp.int32))


def batch_loss(model: LlamaConfig, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses in nats, and the number of targets, over a batch of (B, T) arrays."""
    logits: Any = Llama(model).apply(
        {"params": params}, batch["tokens"], batch["segments"], batch["positions"]
    )
    return next_token_loss(logits, batch["tokens"], batch["segments"])


def micro_batches(batch: Batch, number: int) -> Batch:
    """Splits (B, T) arrays into (number, B / number, T)."""
    return jax.tree.map(lambda rows: rows.reshape(number, -1, *rows.shape[1:]), batch)


def mean_gradients(config: Config, params: PyTree, batch: Batch) -> tuple[PyTree, dict]:
    """Gradients of the mean loss per target, float32, summed over the micro-batches.

    Sums are divided by the targets of the whole batch, so the number of micro-batches changes the
    rounding and nothing else, however the targets are spread over them.

    Returns:
      The gradients, shaped as `params`, and `{"loss", "targets"}`, float32 scalars.
    """
    value_and_grad = jax.value_and_grad(functools.partial(batch_loss, config.model), has_aux=True)

    def add(total: PyTree, micro_batch: Batch) -> tuple[PyTree, None]:
        result = value_and_grad(params, micro_batch)
        return jax.tree.map(lambda old, new: old + new.astype(jnp.float32), total, result), None

    split = micro_batches(batch, config.training.accumulation)
    if config.training.accumulation == 1:
        total = value_and_grad(params, batch)
    else:
        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda rows: rows[0], split))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        total, _ = lax.scan(add, zeros, split)
    (losses, targets), gradients = total
    divisor = jnp.maximum(targets, 1)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / divisor, gradients)
    return gradients, {"loss": losses / divisor, "targets": targets}


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The jitted step, which takes over (donates) the state it is given.

    bfloat16 parameters are rounded stochastically unless `optimizer.stochastic_rounding` is off:
    the sum in float32 goes up or down to a neighbouring bfloat16 with odds by its distance to
    each. The odds come from the seed and the step alone, so a resumed run draws the same.

    Returns:
      A function of a state and a batch (`tokens`, `segments`, `positions`: int32 (B, T)) that
      returns the next state and scalars: `loss` before the update, `targets`, `learning_rate`,
      `gradient_norm` before any clipping, and with GaLore those of `diagnostics`.
    """
    tx = make_optimizer(config.optimizer, config.training.steps)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    rounds = config.model.dtype == "bfloat16" and config.optimizer.stochastic_rounding

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        gradients, metrics = mean_gradients(config, state.params, batch)
        metrics["learning_rate"] = schedule(state.step)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        params, opt_state = galore_jax.apply_gradients(
            tx, gradients, state.opt_state, state.params, key=key if rounds else None
        )
        metrics |= movement(opt_state)
        if config.training.diagnostics:
            metrics |= diagnose(opt_state, gradients, state.params, params)
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def tree_size(tree: PyTree) -> int:
    """Elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """Bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
