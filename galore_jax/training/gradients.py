"""Gradients of a mean loss over the micro-batches and shards of a batch, projected or full."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads.data_parallel import mean_over_shards
from galore_jax.grads.micro_batches import mean_over
from galore_jax.models.adapters import combine
from galore_jax.training.layout import data_axes
from galore_jax.training.state import Batch
from galore_jax.types import PyTree

Gradients = Callable[[PyTree, PyTree, Batch], tuple[PyTree, dict]]


def mean_gradients(
    loss: Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]],
    trained: Callable[[PyTree], tuple[PyTree, PyTree]],
    *,
    projected: bool,
    micro_batches: int = 1,
    mesh: Mesh | None = None,
) -> Gradients:
    """Gradients of the mean loss per target, over all micro-batches.

    Without dropout, the number of micro-batches changes the rounding and nothing else, however the
    targets are spread over them.

    Args:
      loss: the parameters and a batch, or a part of one → the sum of the losses of its targets, and
        how many, or of which weight, they are.
      trained: the parameters → those that it updates, and those that are frozen.
      projected: whether the backward pass projects.
      micro_batches: the parts of a batch that are computed one after the other.
      mesh: whose axis "data" divides the batch into shards; None: a single device.

    Returns:
      A function of the parameters, the optimizer's state and a batch. It returns the gradients of
      the trained parameters in float32, `Coordinates` where the backward pass projects them, and
      float32 scalars: `loss`, in nats per target, and `targets`, how many there are.
    """
    axes = data_axes(mesh)
    parts = micro_batches * (1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes))
    coordinates = galore_jax.value_and_grad(
        loss, has_aux=True, micro_batches=micro_batches, data_axes=axes
    )

    def full_of_shard(params: PyTree, batch: Batch) -> Any:
        updated, frozen = trained(params)
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


def seeded(batch: Batch, key: jax.Array) -> Batch:
    """The batch with a seed of dropout for each row, of which each part of it uses the first."""
    rows = jax.tree.leaves(batch)[0].shape[:1]
    return batch | {"seeds": jax.random.bits(key, rows, "uint32")}


def dropout_rngs(batch: Batch) -> dict[str, jax.Array]:
    """The random streams of a model that is applied to this batch."""
    return {"dropout": jax.random.key(batch["seeds"][0])} if "seeds" in batch else {}
