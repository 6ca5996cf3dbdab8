"""One training step: gradients over micro-batches, and the update."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads.data_parallel import mean_over_shards
from galore_jax.grads.micro_batches import mean_over
from galore_jax.models.adapters import combine
from galore_jax.optim.galore_state import galore_states, project
from galore_jax.training.mesh import data_axes, jit_on, per_shard, whole
from galore_jax.training.optimizer import learning_rate_schedule, make_optimizer
from galore_jax.training.relora import restart
from galore_jax.training.state import DROPOUT, TrainState, abstract_state, trained
from galore_jax.training.subspace_metrics import energy_metrics, subspace_metrics
from galore_jax.training.task import Batch, Task
from galore_jax.types import PyTree

Gradients = Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict]]


def make_train_step(task: Task, *, refreshes: bool = False, mesh: Mesh | None = None) -> TrainStep:
    """The jitted training step; the state that it is given is donated.

    bfloat16 parameters are rounded stochastically, which is unbiased; rounding to nearest loses
    every update below 1/512 of its weight. The random bits depend on the seed and the step alone,
    so a resumed run draws the same.

    Args:
      task: the task, with the configuration.
      refreshes: with projected gradients, refresh the bases that are due before the update; with
        ReLoRA, restart.
      mesh: from `training_mesh`; None: a single device.

    Returns:
      A function of a state and a batch, whose arrays are those of the task. It returns the next
      state and a dictionary of scalars: `loss` (before the update), `targets`, `learning_rate`,
      those of `subspace_metrics`, and norms before clipping: `gradient_norm` if there are full
      gradients, and with GaLore `coordinates_norm`, the norm of the coordinates and the unprojected
      gradients. With `training.diagnostics` also those of `energy_metrics`.
    """
    if task.config.training.layerwise:
        return _make_layerwise_step(task, refreshes, mesh)
    optimizer, training = task.config.optimizer, task.config.training
    tx = make_optimizer(optimizer, training.steps)
    schedule = learning_rate_schedule(optimizer, training.steps)
    projected = optimizer.has_projected_gradients
    gradients_of = make_gradients(task, mesh, projected=projected)
    full_gradients_of = make_gradients(task, mesh, projected=False)
    refresh = galore_jax.refresh(
        per_shard(task.loss),
        has_aux=True,
        micro_batches=training.accumulation,
        data_axes=data_axes(mesh),
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        batch = with_seeds(task, state.key, batch)
        # New bases where they are due, or new adapters.
        if refreshes and projected:
            opt_state = refresh(state.params, state.opt_state, batch)
            state = state._replace(opt_state=opt_state)
        if refreshes and optimizer.name == "relora":
            state = restart(task, state)
        # Gradients and the update.
        gradients, metrics = gradients_of(state.params, state.opt_state, batch)
        updated, frozen = trained(task, state.params)
        params, opt_state = galore_jax.apply_gradients(
            tx,
            gradients,
            state.opt_state,
            updated,
            key=_rounding_key(state),
            implementation=optimizer.implementation,
        )
        params = combine(params, frozen)
        # Metrics.
        metrics["learning_rate"] = schedule(state.step)
        metrics |= subspace_metrics(opt_state)
        if not projected:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        if optimizer.has_galore:
            bases = galore_states(opt_state, inside_chains=True)
            coordinates = gradients if projected else project(gradients, bases)
            metrics["coordinates_norm"] = optax.tree.norm(coordinates)
        if training.diagnostics:
            if projected:
                gradients, _ = full_gradients_of(state.params, state.opt_state, batch)
            metrics |= energy_metrics(opt_state, gradients, state.params, params)
        return TrainState(params, opt_state, state.step + 1, state.seed), metrics

    return _compiled(train_step, task, mesh)


def make_gradients(
    task: Task, mesh: Mesh | None = None, *, projected: bool | None = None
) -> Gradients:
    """Gradients of the mean loss per target, over all micro-batches.

    Without dropout, the number of micro-batches changes the rounding and nothing else, however the
    targets are spread over them.

    Args:
      task: the task, with the configuration.
      mesh: whose axis "data" divides the batch into shards; None: a single device.
      projected: whether the backward pass projects; None: as configured.

    Returns:
      A function of the parameters, the optimizer's state and a batch of `with_seeds`. It returns
      the gradients of the trained parameters in float32, `Coordinates` where the backward pass
      projects them, and float32 scalars: `loss`, per target, and `targets`, how many there are.
    """
    loss, axes, micro_batches = (
        per_shard(task.loss),
        data_axes(mesh),
        task.config.training.accumulation,
    )
    parts = micro_batches * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes))
    if projected is None:
        projected = task.config.optimizer.has_projected_gradients
    coordinates = galore_jax.value_and_grad(
        loss, has_aux=True, micro_batches=micro_batches, data_axes=axes
    )

    def full_of_shard(params: PyTree, batch: Batch) -> Any:
        updated, frozen = trained(task, params)
        full = jax.value_and_grad(
            lambda updated, batch: loss(combine(updated, frozen), batch), has_aux=True
        )
        return mean_over(functools.partial(full, updated), micro_batches, batch)

    def gradients(params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[PyTree, dict]:
        # Sums over the targets of a part, averaged over the parts: micro-batches of shards. The
        # ratio of two such averages is that of the sums over the batch.
        if projected:
            (loss_sum, targets), sums = coordinates(params, opt_state, batch)
        else:
            (loss_sum, targets), sums = mean_over_shards(full_of_shard, axes, params, batch)
        divisor = jnp.where(targets > 0, targets, 1)
        means = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * (1 / divisor), sums)
        return means, {"loss": loss_sum / divisor, "targets": jnp.round(parts * targets)}

    return gradients


def with_seeds(task: Task, key: jax.Array, batch: Batch) -> Batch:
    """The batch with a seed of dropout for each row, of which each part of it uses the first.

    The key is that of the step. Without dropout the batch stays as it is.
    """
    if not task.has_dropout:
        return batch
    rows = jax.tree.leaves(batch)[0].shape[:1]
    return batch | {"seeds": jax.random.bits(jax.random.fold_in(key, DROPOUT), rows, "uint32")}


def dropout_rngs(batch: Batch) -> dict[str, jax.Array]:
    """The random streams of a model that is applied to this batch, or to a part of one."""
    return {"dropout": jax.random.key(batch["seeds"][0])} if "seeds" in batch else {}


def _make_layerwise_step(task: Task, refreshes: bool, mesh: Mesh | None) -> TrainStep:
    optimizer, steps = task.config.optimizer, task.config.training.steps
    schedule = learning_rate_schedule(optimizer, steps)
    step = galore_jax.make_step(
        task.layered_model,
        make_optimizer(optimizer, steps, clips=False),
        projected=optimizer.has_projected_gradients,
        refreshes=refreshes,
        clip_norm=optimizer.clip_norm,
        clip_by=optimizer.clip_by,
        implementation=optimizer.implementation,
        has_aux=True,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        key = _rounding_key(state)
        params, opt_state, (loss, targets) = step(
            state.params, state.opt_state, batch, rounding_key=key
        )
        norm = "coordinates_norm" if optimizer.has_projected_gradients else "gradient_norm"
        metrics = {
            "loss": loss,
            "targets": targets,
            "learning_rate": schedule(state.step),
            norm: opt_state.norm,
            **subspace_metrics(opt_state),
        }
        return TrainState(params, opt_state, state.step + 1, state.seed), metrics

    return _compiled(train_step, task, mesh)


def _compiled(train_step: Callable[..., Any], task: Task, mesh: Mesh | None) -> Any:
    """The jitted step, which leaves each part of the state on the device where it was."""
    out = None
    if mesh is not None:
        out = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, mesh)), whole(mesh)
    return jit_on(mesh, train_step, out, donate_argnums=0)


def _rounding_key(state: TrainState) -> jax.Array | None:
    is_narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    return state.key if is_narrow else None
