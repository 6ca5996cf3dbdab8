"""The step of a training: gradients over micro-batches, the update, and refreshes of bases."""

import ctypes
import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads.data_parallel import mean_over_shards
from galore_jax.grads.micro_batches import mean_over
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.models.adapters import combine
from galore_jax.ops.int8 import places_of, with_places
from galore_jax.optim.galore_state import bases_of, galore_states, projected_tree
from galore_jax.training.mesh import data_axes, on_mesh, whole
from galore_jax.training.metrics import format_bytes
from galore_jax.training.optimizer import learning_rate_schedule, make_optimizer
from galore_jax.training.relora import restart, steps_until_restart
from galore_jax.training.state import (
    DROPOUT,
    TrainState,
    abstract_state,
    device_memory,
    program_bytes,
    trained,
)
from galore_jax.training.task import Batch, Task
from galore_jax.types import PyTree

Gradients = Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict]]
# From a state, a batch and a key for rounding: the parameters, the optimizer's state and metrics.
Update = Callable[[TrainState, Batch, jax.Array | None], tuple[PyTree, PyTree, dict]]


class Stepper:
    """Training steps: one that refreshes the bases or restarts ReLoRA, and one that does not.

    Each is compiled when it is first needed, and again for batches of another shape.

    Args:
      task: the task, with the configuration of the run.
      mesh: from `make_mesh`; batches come from `put_batch`.
      programs: those that an earlier stepper compiled for a run that differs in its seed alone, or
        an empty dictionary to collect them.
      compiling: makes a context in which a program is compiled.
      say: gets a sentence about the memory of each program that is compiled.

    Attributes:
      compile_seconds: the time that compilation took so far.
    """

    def __init__(
        self,
        task: Task,
        mesh: Mesh | None = None,
        programs: dict[Any, Any] | None = None,
        compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
        say: Callable[[str], object] = lambda _: None,
    ):
        self._task, self._mesh, self._compiling, self._say = task, mesh, compiling, say
        self._programs = {} if programs is None else programs
        self._steps_left = 0
        self.compile_seconds = 0.0

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """One step; arguments and results are those of the function from `make_train_step`."""
        refreshes = self._task.config.optimizer.has_refreshes and self._is_due(state)
        shapes = tuple(np.shape(leaf) for leaf in batch.values())
        if (refreshes, shapes) not in self._programs:
            with self._compiling(), on_mesh(self._mesh):
                start = time.perf_counter()
                step: Any = make_train_step(self._task, refreshes=refreshes, mesh=self._mesh)
                program = step.lower(state, batch).compile()
                self._programs[refreshes, shapes] = program
                _return_freed_memory()
                self.compile_seconds += time.perf_counter() - start
            which = "a step with a refresh" if refreshes else "a step"
            self._say(f"{which} needs {_memory_of(program)}")
        return self._programs[refreshes, shapes](state, batch)

    def _is_due(self, state: TrainState) -> bool:
        """Whether this step has to refresh or restart.

        To know it, the host has to wait for the device. So it does not ask at every step, but only
        after as many steps as were left when it last asked.
        """
        if self._steps_left == 0:
            optimizer = self._task.config.optimizer
            if optimizer.has_projected_gradients:
                self._steps_left = int(updates_until_refresh(state.opt_state))
            else:
                gap = optimizer.lora.restart_gap
                self._steps_left = steps_until_restart(gap, int(state.step))
            if self._steps_left == 0:
                return True  # It still is at the next step if it fails.
        self._steps_left -= 1
        return False


def _return_freed_memory() -> None:
    """Returns what the compiler has freed to the system, which glibc keeps.

    It is 0.5 GiB for a 7B model, whose state lies in the same memory on a CPU.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _memory_of(program: Any) -> str:
    """The memory that a compiled program needs, and that of the device, in words."""
    memory = device_memory()
    of = f" of the device's {format_bytes(memory)}" if memory < math.inf else ""
    return format_bytes(program_bytes(program)) + of


def make_train_step(task: Task, *, refreshes: bool = False, mesh: Mesh | None = None) -> TrainStep:
    """The jitted training step; the state that it is given is donated.

    Parameters in bfloat16 and in 8 bits are rounded stochastically, which is unbiased; rounding to
    nearest loses every update below 1/512 of its bfloat16 weight. The random bits depend on the
    seed and the step alone, so a resumed run draws the same.

    Args:
      task: the task, with the configuration.
      refreshes: with projected gradients, refresh the bases that are due before the update; with
        ReLoRA, restart.
      mesh: from `make_mesh`; None: a single device.

    Returns:
      A function of a state and a batch, whose arrays are those of the task. It returns the next
      state and a dictionary of scalars: `loss` (before the update), `targets`, `learning_rate`,
      those of `subspace_metrics`, and norms before clipping: `gradient_norm` if there are full
      gradients, and with GaLore `coordinates_norm`, the norm of the coordinates and the unprojected
      gradients.
    """
    optimizer, steps = task.config.optimizer, task.config.training.steps
    make_update = _layerwise_update if task.config.training.layerwise else _update
    update, schedule = make_update(task, refreshes, mesh), learning_rate_schedule(optimizer, steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        narrow = (jnp.bfloat16, jnp.int8)
        is_narrow = any(leaf.dtype in narrow for leaf in jax.tree.leaves(state.params))
        params, opt_state, metrics = update(state, batch, state.key if is_narrow else None)
        metrics |= {"learning_rate": schedule(state.step), **subspace_metrics(opt_state)}
        return TrainState(params, opt_state, state.step + 1, state.seed), metrics

    out = None  # Each part of the state stays on the device where it was.
    if mesh is not None:
        out = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, mesh)), whole(mesh)
    return jax.jit(train_step, out_shardings=out, donate_argnums=0)


def _update(task: Task, refreshes: bool, mesh: Mesh | None) -> Update:
    """An update of all parameters together."""
    optimizer, training = task.config.optimizer, task.config.training
    tx = make_optimizer(optimizer, training.steps)
    projected = optimizer.has_projected_gradients
    gradients_of = make_gradients(task, mesh)
    refresh = galore_jax.refresh(
        task.loss,
        has_aux=True,
        micro_batches=training.accumulation,
        data_axes=data_axes(mesh),
    )

    def update(state: TrainState, batch: Batch, key: jax.Array | None) -> Any:
        batch = with_seeds(task, state.key, batch)
        # New bases where they are due, or new adapters.
        if refreshes and projected:
            opt_state = refresh(state.params, state.opt_state, batch)
            state = state._replace(opt_state=opt_state)
        if refreshes and optimizer.name == "relora":
            state = restart(task, state)
        gradients, metrics = gradients_of(state.params, state.opt_state, batch)
        updated, frozen = trained(task, state.params)
        params, opt_state = galore_jax.apply_gradients(
            tx, gradients, state.opt_state, updated, key=key
        )
        if not projected:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        if optimizer.has_galore:
            bases = galore_states(opt_state, inside_chains=True)
            coordinates = gradients if projected else projected_tree(gradients, bases)
            metrics["coordinates_norm"] = optax.tree.norm(coordinates)
        return combine(params, frozen), opt_state, metrics

    return update


def _layerwise_update(task: Task, refreshes: bool, mesh: Mesh | None) -> Update:
    """An update layer by layer, during the backward pass."""
    del mesh
    optimizer, training = task.config.optimizer, task.config.training
    projected = optimizer.has_projected_gradients
    step = galore_jax.make_step(
        task.layered_model,
        make_optimizer(optimizer, training.steps, clips=False),
        micro_batches=training.accumulation,
        projected=projected,
        refreshes=refreshes,
        clip_norm=optimizer.clip_norm,
        clip_by=optimizer.clip_by,
        has_aux=True,
    )

    def update(state: TrainState, batch: Batch, key: jax.Array | None) -> Any:
        targets = jnp.sum(batch["targets"] >= 0, dtype=jnp.float32)
        rows = len(batch["targets"])
        batch = batch | {"divisor": jnp.full(rows, targets / training.accumulation)}
        params, opt_state, (loss, _) = step(state.params, state.opt_state, batch, rounding_key=key)
        norm = "coordinates_norm" if projected else "gradient_norm"
        return params, opt_state, {"loss": loss, "targets": targets, norm: opt_state.norm}

    return update


def make_gradients(task: Task, mesh: Mesh | None = None) -> Gradients:
    """Gradients of the mean loss per target, over all micro-batches.

    Without dropout, the number of micro-batches changes the rounding and nothing else, however the
    targets are spread over them.

    Args:
      task: the task, with the configuration.
      mesh: whose axis "data" divides the batch into shards; None: a single device.

    Returns:
      A function of the parameters, the optimizer's state and a batch of `with_seeds`. It returns
      the gradients of the trained parameters in float32, `Coordinates` where the backward pass
      projects them, and float32 scalars: `loss`, per target, and `targets`, how many there are.
    """
    loss, axes = task.loss, data_axes(mesh)
    projected = task.config.optimizer.has_projected_gradients
    micro_batches = task.config.training.accumulation
    parts = micro_batches * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes))
    coordinates = galore_jax.value_and_grad(
        loss, has_aux=True, micro_batches=micro_batches, data_axes=axes
    )

    def full_of_shard(params: PyTree, batch: Batch) -> Any:
        updated, frozen = trained(task, params)
        of_places = lambda places, batch: loss(combine(with_places(updated, places), frozen), batch)
        full = jax.value_and_grad(of_places, has_aux=True)
        return mean_over(functools.partial(full, places_of(updated)), micro_batches, batch)

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


def subspace_metrics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Scalars over all projected matrices; none if nothing is projected.

    Returns:
      `subspace_overlap`, the mean squared cosine of the principal angles between the old and the
      new subspaces at the last refresh: before the second one the old subspace is random, and the
      overlap about rank / side. `refreshes_saved`, the number of refreshes that lazily doubled gaps
      have saved so far. `skipped`, the number of updates that were skipped so far, as the gradient
      of a matrix was not finite.
    """
    bases = bases_of(galore_states(opt_state, inside_chains=True))
    if not bases:
        return {}
    overlap, saved, skipped = (
        jnp.concatenate([getattr(basis, name).reshape(-1) for basis in bases])
        for name in ("overlap", "saved", "skipped")
    )
    return {
        "subspace_overlap": overlap.mean(),
        "refreshes_saved": saved.sum(),
        "skipped": skipped.sum(),
    }


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
