"""The optimizers that the benchmarks compare; `baselines` lists them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import GaLoreDimensionNumbers

import galore_jax
from galore_jax.subspace.basis import is_basis
from galore_jax.subspace.matrix_view import is_bias_or_scale, is_unprojected_by_name, path_names
from galore_jax.training.config import Config
from galore_jax.types import PyTree

Loss = Callable[[PyTree, PyTree], jax.Array]

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
GAP = 200  # updates between refreshes


@dataclass(frozen=True)
class Baseline:
    """An optimizer and the training step it makes.

    Attributes:
      name: name in the rows.
      init: params -> state, with the refresh of every matrix due at the first step.
      step: (loss, params, state, batch) -> params and state.
      stacks: whether it projects leaves in which layers are stacked.
      gap: updates between refreshes; None: it has no bases.
      refresh: (loss, params, state, batch) -> state; None if the step includes refreshes.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    step: Callable[[Loss, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    stacks: bool = True
    gap: int | None = GAP
    refresh: Callable[[Loss, PyTree, PyTree, PyTree], PyTree] | None = None


def rank_of(config: Config) -> int:
    """The rank of a configuration, for kernels whose smaller side is the width."""
    rank = config.optimizer.galore.rank
    return rank if isinstance(rank, int) else round(rank * config.model.hidden_size)


def baselines(rank: int) -> list[Baseline]:
    """All baselines, with equal settings and the same matrices projected to the same rank."""
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    contrib = optax.contrib.galore(
        LEARNING_RATE,
        rank,
        GAP,
        weight_decay=WEIGHT_DECAY,
        weight_dimension_numbers=_matrices_that_galore_jax_projects,
    )
    galore = galore_jax.adamw(LEARNING_RATE, rank, GAP, weight_decay=WEIGHT_DECAY)
    return [
        stock("adamw", adamw),
        replace(stock("optax.contrib.galore", contrib), stacks=False, gap=GAP),
        full("galore_full", galore),
        projected("galore_projected", galore),
    ]


def full(name: str, tx: optax.GradientTransformation) -> Baseline:
    """An optimizer of galore_jax with full gradients."""

    def step(loss: Loss, params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        return galore_jax.apply_gradients(tx, jax.grad(loss)(params, batch), state, params)

    return Baseline(name, partial(_start, tx), step)


def projected(name: str, tx: optax.GradientTransformation) -> Baseline:
    """An optimizer of galore_jax with projected gradients, refreshed by sketches."""

    def step(loss: Loss, params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        _, gradients = galore_jax.value_and_grad(loss)(params, state, batch)
        return galore_jax.apply_gradients(tx, gradients, state, params)

    def refresh(loss: Loss, params: PyTree, state: PyTree, batch: PyTree) -> PyTree:
        return galore_jax.refresh(loss)(params, state, batch)

    return Baseline(name, partial(_start, tx), step, refresh=refresh)


def stock(name: str, tx: optax.GradientTransformation) -> Baseline:
    """An optimizer of optax."""

    def step(loss: Loss, params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Baseline(name, tx.init, step, gap=None)


def _start(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The state with the refresh of every matrix due, and no random basis left."""
    return jax.tree.map(_due_again, tx.init(params), is_leaf=is_basis)


def _due_again(node: Any) -> Any:
    return replace(node, age=jnp.copy(node.gap)) if is_basis(node) else node


def _matrices_that_galore_jax_projects(params: PyTree) -> PyTree:
    def numbers(path: Any, leaf: Any) -> GaLoreDimensionNumbers | None:
        names = path_names(path)
        excluded = is_bias_or_scale(names) or is_unprojected_by_name(names)
        return None if leaf.ndim != 2 or excluded else GaLoreDimensionNumbers()

    return jax.tree_util.tree_map_with_path(numbers, params)
