"""One training step: the optimizer and its schedule, gradients over micro-batches, the update."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax
from galore_jax.errors import InputError
from galore_jax.grads import layerwise
from galore_jax.grads.micro_batches import mean_over
from galore_jax.grads.sketch import updates_until_refresh
from galore_jax.models import llama_layerwise
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss
from galore_jax.optim.state import galore_states, project
from galore_jax.training.config import Config
from galore_jax.training.sections import OptimizerConfig
from galore_jax.training.subspace_metrics import energy_metrics, subspace_metrics
from galore_jax.types import PyTree

Batch = dict[str, Any]
Gradients = Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict]]

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
    "basis_dtype",
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
    common |= {name: getattr(config, name) for name in GALORE}
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


def init_state(config: Config) -> TrainState:
    """The state before the first step; a pure function of the configuration."""
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    params = Llama(config.model).init(jax.random.key(config.training.seed), tokens)["params"]
    is_layerwise = config.training.layerwise
    tx = make_optimizer(config.optimizer, config.training.steps, clips=not is_layerwise)
    # As galore's, the moments of plain AdamW are float32 whatever the parameters are.
    started = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    opt_state = (layerwise if is_layerwise else galore_jax).init(tx, started)
    return TrainState(params, opt_state, jnp.zeros([], jnp.int32))


def batch_loss(model: LlamaConfig, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses in nats, and the number of targets, over a batch of (B, T) arrays."""
    logits: Any = Llama(model).apply(
        {"params": params}, batch["tokens"], batch["segments"], batch["positions"]
    )
    return next_token_loss(logits, batch["tokens"], batch["segments"])


def make_gradients(config: Config, tx: optax.GradientTransformation) -> Gradients:
    """Gradients of the mean loss per target, over all micro-batches.

    Sums are divided by the targets of the whole batch, so the number of micro-batches changes the
    rounding and nothing else, however the targets are spread over them.

    Returns:
      A function of parameters, optimizer's state and batch. It returns gradients in float32,
      `Coordinates` where the backward pass projects them; and `{"loss", "targets"}`, float32
      scalars.
    """
    loss, number = functools.partial(batch_loss, config.model), config.training.accumulation
    projected = galore_jax.value_and_grad(loss, tx, has_aux=True, micro_batches=number)
    whole = jax.value_and_grad(loss, has_aux=True)

    def gradients(params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        if config.optimizer.are_projected:
            means, found = projected(params, opt_state, batch)
        else:
            means, found = mean_over(functools.partial(whole, params), number, batch)
        loss_sum, targets = (number * mean for mean in means)
        targets = jnp.round(targets)  # A whole number; its mean need not be.
        divisor = jnp.maximum(targets, 1)
        found = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * (number / divisor), found)
        return found, {"loss": loss_sum / divisor, "targets": targets}

    return gradients


def make_train_step(
    config: Config, *, refreshes: bool = False
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The jitted step, which takes over (donates) the state it is given.

    bfloat16 parameters are rounded stochastically unless `optimizer.stochastic_rounding` is off:
    the sum in float32 goes up or down to a neighbouring bfloat16 with odds by its distance to
    each. The odds come from the seed and the step alone, so a resumed run draws the same.

    Args:
      config: of the run.
      refreshes: of projected gradients, before the update: make new bases where they are due.

    Returns:
      A function of a state and a batch (`tokens`, `segments`, `positions`: int32 (B, T)) that
      returns the next state and scalars: `loss` before the update, `targets`, `learning_rate`,
      before any clipping `gradient_norm`, of full gradients, and with GaLore `coordinates_norm`, in
      which coordinates stand for the projected ones, and those of `diagnostics`. A step of
      projected gradients knows no full ones.
    """
    if config.training.layerwise:
        return _make_layerwise_step(config, refreshes)
    tx = make_optimizer(config.optimizer, config.training.steps)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    projected = config.optimizer.are_projected
    implementation: Any = config.optimizer.implementation
    gradients_of = make_gradients(config, tx)
    full = dataclasses.replace(config.optimizer, gradients="full")
    full_gradients_of = make_gradients(dataclasses.replace(config, optimizer=full), tx)
    loss, number = functools.partial(batch_loss, config.model), config.training.accumulation
    refresh = galore_jax.refresh(loss, tx, has_aux=True, micro_batches=number)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        if refreshes and projected:
            opt_state = refresh(state.params, state.opt_state, batch)
            state = state._replace(opt_state=opt_state)
        gradients, metrics = gradients_of(state.params, state.opt_state, batch)
        metrics["learning_rate"] = schedule(state.step)
        key = _rounding_key(config, state.step)
        params, opt_state = galore_jax.apply_gradients(
            tx, gradients, state.opt_state, state.params, key=key, implementation=implementation
        )
        metrics |= subspace_metrics(opt_state)
        if not projected:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        if config.optimizer.has_galore:
            bases = galore_states(opt_state, inside_chains=True)
            coordinates = gradients if projected else project(gradients, bases)
            metrics["coordinates_norm"] = optax.tree.norm(coordinates)
        if config.training.diagnostics:
            if projected:
                gradients, _ = full_gradients_of(state.params, state.opt_state, batch)
            metrics |= energy_metrics(opt_state, gradients, state.params, params)
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def _make_layerwise_step(
    config: Config, refreshes: bool
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    optimizer = config.optimizer
    schedule = learning_rate_schedule(optimizer, config.training.steps)
    choices: dict[str, Any] = {
        "clip_by": optimizer.clip_by,
        "implementation": optimizer.implementation,
    }
    step = layerwise.make_step(
        layerwise.LayeredModel(
            embed=functools.partial(llama_layerwise.embed, config.model),
            block=functools.partial(llama_layerwise.block, config.model),
            head_loss=functools.partial(llama_layerwise.head_loss, config.model),
        ),
        make_optimizer(optimizer, config.training.steps, clips=False),
        projected=optimizer.are_projected,
        refreshes=refreshes,
        clip_norm=optimizer.clip_norm,
        **choices,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        key = _rounding_key(config, state.step)
        params, opt_state, loss, targets = step(state.params, state.opt_state, batch, key)
        norm = "coordinates_norm" if optimizer.are_projected else "gradient_norm"
        metrics = {
            "loss": loss,
            "targets": targets,
            "learning_rate": schedule(state.step),
            norm: opt_state.norm,
            **subspace_metrics(opt_state),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def _rounding_key(config: Config, step: jax.Array) -> jax.Array | None:
    if config.model.dtype != "bfloat16" or not config.optimizer.stochastic_rounding:
        return None
    return jax.random.fold_in(jax.random.key(config.training.seed), step)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the arrays of a batch, in this process."""
    rows = config.data.batch_size // jax.process_count()
    leaf = jax.ShapeDtypeStruct((rows, config.data.sequence_length), jnp.int32)
    return dict.fromkeys(("tokens", "segments", "positions"), leaf)


def check_gpu(config: Config) -> None:
    """Ends a run whose implementation is for a GPU where there is none.

    Raises:
      InputError: there is none.
    """
    if config.optimizer.implementation == "pallas" and jax.default_backend() != "gpu":
        raise InputError(
            'optimizer.implementation = "pallas" needs an NVIDIA GPU, and JAX finds none here: set '
            'optimizer.implementation = "xla".'
        )


class Stepper:
    """Steps of training, compiled ahead: those that refresh bases apart from the others.

    The device is not asked at every step whether a basis is due, since the host would have to wait
    for the answer: only when as many steps have passed as the one nearest to its refresh had left.

    Raises:
      InputError: an implementation for a GPU where there is none.
    """

    def __init__(self, config: Config, state: TrainState):
        check_gpu(config)
        batch = batch_shapes(config)
        began = time.perf_counter()
        self._step = make_train_step(config).lower(state, batch).compile()
        self._refreshing_step = None
        if config.optimizer.are_projected:
            refreshing = make_train_step(config, refreshes=True)
            self._refreshing_step = refreshing.lower(state, batch).compile()
        self._steps_left = 0
        self.compile_seconds = time.perf_counter() - began

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """As the function of `make_train_step`."""
        if self._refreshing_step is not None and self._steps_left == 0:
            self._steps_left = int(updates_until_refresh(state.opt_state))
            if self._steps_left == 0:
                state, measured = self._refreshing_step(state, batch)
                # 0 where a basis could not be refreshed: it is tried again at the next step.
                self._steps_left = int(updates_until_refresh(state.opt_state))
                return state, measured
        self._steps_left -= 1
        return self._step(state, batch)


def tree_size(tree: PyTree) -> int:
    """Elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """Bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
