"""Evaluation: the loss on held-out text."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.grads.micro_batches import split
from galore_jax.training.mesh import jit_on, on_mesh, put_batch
from galore_jax.training.task import Batch, Task


def make_evaluate(
    task: Task, mesh: Mesh | None = None
) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """Makes a function that evaluates parameters on batches.

    Parameters on a mesh need the mesh. Batches are split into the micro-batches of the training;
    the last one is that which completes `training.evaluation_tokens`, unless that is 0.

    Returns:
      A function of the parameters and batches; it returns

      * `validation_loss`: the sum of the losses divided by the number of targets, in nats;
      * `validation_targets`: the number of tokens that were predicted.

      It raises an `InputError` if the batches have no targets.
    """
    config = task.config

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        parts = split(batch, config.training.accumulation)
        losses, targets = lax.map(functools.partial(task.loss, params), parts)
        return jnp.sum(losses), jnp.sum(targets)

    compiled = jit_on(mesh, sums)

    def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        results = []
        with on_mesh(mesh):
            for batch in take_targets(batches, config.training.evaluation_tokens):
                results.append(compiled(params, put_batch(batch, mesh)))
        results = np.array(jax.device_get(results), np.float64)
        losses, targets = results.reshape(-1, 2).T
        if not targets.sum():
            raise InputError(
                "there is nothing to evaluate on: the validation split of "
                f"data.source = {config.data.source!r} holds no two tokens in one row."
            )
        return {
            "validation_loss": float(losses.sum() / targets.sum()),
            "validation_targets": int(targets.sum()),
        }

    return evaluate


def perplexity(loss: float) -> float:
    """exp(loss), infinite if that overflows."""
    return math.inf if loss > 709 else math.exp(loss)


def take_targets(batches: Iterable[Batch], targets: int) -> Iterator[Batch]:
    """Batches up to the one that completes this number of targets; all of them if it is 0."""
    seen = 0
    for batch in batches:
        yield batch
        seen += np.count_nonzero(batch["targets"] >= 0)
        if targets and seen >= targets:
            return
