"""One training step: the loss, gradients over micro-batches, and the update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads import layerwise
from galore_jax.models import llama_layerwise
from galore_jax.models.adapters import Adapter, combine
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss
from galore_jax.optim.state import galore_states, project
from galore_jax.training.config import Config
from galore_jax.training.gradients import Gradients, dropout_rngs, mean_gradients, seeded
from galore_jax.training.layout import data_axes, jit_on, per_shard, whole
from galore_jax.training.optimizer import make_optimizer
from galore_jax.training.relora import restart
from galore_jax.training.schedule import learning_rate_schedule
from galore_jax.training.state import (
    DROPOUT,
    Batch,
    TrainState,
    abstract_state,
    step_key,
    trained,
)
from galore_jax.training.subspace_metrics import energy_metrics, subspace_metrics
from galore_jax.types import PyTree


def batch_loss(
    model: LlamaConfig, params: PyTree, batch: Batch, adapter: Adapter | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses in nats, and the number of targets, of a batch of (B, T) arrays.

    A `seeded` batch has dropout in the adapters.
    """
    logits: Any = Llama(model, adapter).apply(
        {"params": params},
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        rngs=dropout_rngs(batch),
    )
    return next_token_loss(logits, batch["targets"])


def with_seeds(config: Config, step: jax.Array, batch: Batch) -> Batch:
    """The batch, `seeded` by the run's seed and the step if the adapters have dropout."""
    adapter = config.optimizer.adapter
    if adapter is None or not adapter.dropout:
        return batch
    return seeded(batch, jax.random.fold_in(step_key(config, step), DROPOUT))


def make_loss(config: Config) -> Callable[..., Any]:
    """`batch_loss` of the configured model, for a batch or for a shard of one."""
    adapter = config.optimizer.adapter
    return per_shard(functools.partial(batch_loss, config.model, adapter=adapter))


def make_gradients(config: Config, mesh: Mesh | None = None) -> Gradients:
    """`mean_gradients` of the configured model and optimizer."""
    return mean_gradients(
        make_loss(config),
        functools.partial(trained, config),
        projected=config.optimizer.has_projected_gradients,
        micro_batches=config.training.accumulation,
        mesh=mesh,
    )


def make_train_step(
    config: Config, *, refreshes: bool = False, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The jitted training step; the state that it is given is donated.

    bfloat16 parameters are rounded stochastically, which is unbiased; rounding to nearest loses
    every update below 1/512 of its weight. The random bits depend on the seed and the step alone,
    so a resumed run draws the same.

    Args:
      config: the configuration of the run.
      refreshes: with projected gradients, refresh the bases that are due before the update; with
        ReLoRA, restart.
      mesh: from `training_mesh`; None: a single device.

    Returns:
      A function of a state and a batch, whose arrays are those of `train_batches`. It returns the
      next state and a dictionary of scalars: `loss` (before the update), `targets`,
      `learning_rate`, those of `subspace_metrics`, and norms before clipping: `gradient_norm` if
      there are full gradients, and with GaLore `coordinates_norm`, the norm of the coordinates and
      the unprojected gradients. With `training.diagnostics` also those of `energy_metrics`.
    """
    if config.training.layerwise:
        return _make_layerwise_step(config, refreshes, mesh)
    tx = make_optimizer(config.optimizer, config.training.steps)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    projected = config.optimizer.has_projected_gradients
    implementation: Any = config.optimizer.implementation
    gradients_of = make_gradients(config, mesh)
    full = dataclasses.replace(config.optimizer, gradients="full")
    full_gradients_of = make_gradients(dataclasses.replace(config, optimizer=full), mesh)
    refresh = galore_jax.refresh(
        make_loss(config),
        has_aux=True,
        micro_batches=config.training.accumulation,
        data_axes=data_axes(mesh),
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        # New bases where they are due, or new adapters.
        if refreshes and projected:
            opt_state = refresh(state.params, state.opt_state, batch)
            state = state._replace(opt_state=opt_state)
        if refreshes and config.optimizer.name == "relora":
            state = restart(config, state)
        # Gradients and the update.
        batch = with_seeds(config, state.step, batch)
        gradients, metrics = gradients_of(state.params, state.opt_state, batch)
        key = _rounding_key(config, state.step)
        updated, frozen = trained(config, state.params)
        params, opt_state = galore_jax.apply_gradients(
            tx, gradients, state.opt_state, updated, key=key, implementation=implementation
        )
        params = combine(params, frozen)
        # Metrics.
        metrics["learning_rate"] = schedule(state.step)
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

    return _compiled(train_step, config, mesh)


def _make_layerwise_step(
    config: Config, refreshes: bool, mesh: Mesh | None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    optimizer = config.optimizer
    schedule = learning_rate_schedule(optimizer, config.training.steps)
    options: dict[str, Any] = {
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
        projected=optimizer.has_projected_gradients,
        refreshes=refreshes,
        clip_norm=optimizer.clip_norm,
        **options,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        key = _rounding_key(config, state.step)
        params, opt_state, loss, targets = step(state.params, state.opt_state, batch, key)
        norm = "coordinates_norm" if optimizer.has_projected_gradients else "gradient_norm"
        metrics = {
            "loss": loss,
            "targets": targets,
            "learning_rate": schedule(state.step),
            norm: opt_state.norm,
            **subspace_metrics(opt_state),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return _compiled(train_step, config, mesh)


def _compiled(train_step: Callable[..., Any], config: Config, mesh: Mesh | None) -> Any:
    """The jitted step, which leaves each part of the state on the device where it was."""
    out = None
    if mesh is not None:
        out = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)), whole(mesh)
    return jit_on(mesh, train_step, out, donate_argnums=0)


def _rounding_key(config: Config, step: jax.Array) -> jax.Array | None:
    if config.model.dtype != "bfloat16":
        return None
    return step_key(config, step)
