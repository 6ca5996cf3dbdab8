"""Restarts of ReLoRA (arXiv 2307.05695): merged adapters, new ones, and pruned moments."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.models.adapters import combine, factors, is_factor, merge
from galore_jax.subspace.matrix_view import path_names
from galore_jax.training.state import RESTART, TrainState
from galore_jax.training.task import Task
from galore_jax.types import PyTree

# The fraction of each adapter's moments that a restart sets to 0 (section 3 of the paper).
PRUNED = 0.99


def restart(task: Task, state: TrainState) -> TrainState:
    """Merges the adapters into the kernels and starts new ones, which leaves the model as it is.

    Kernels are rounded to the nearest number of their dtype. New A are drawn like the first ones,
    from the seed and the step; new B are 0. The moments are pruned, and the count of updates stays.
    """
    adapter = task.config.optimizer.adapter
    assert adapter is not None, "only ReLoRA restarts"
    key = jax.random.fold_in(state.key, RESTART)
    params = combine(merge(state.params, adapter), factors(task.init_params(key)))
    return state._replace(params=params, opt_state=prune_moments(state.opt_state))


def prune_moments(opt_state: PyTree) -> PyTree:
    """Sets all but the largest hundredth of each factor's moments to 0, separately by layer."""

    def pruned(path: Any, leaf: jax.Array) -> jax.Array:
        if not is_factor(path_names(path)):
            return leaf
        size = jnp.abs(leaf)
        limit = jnp.quantile(size, PRUNED, axis=(-2, -1), keepdims=True)
        return jnp.where(size > limit, leaf, 0)

    return jax.tree_util.tree_map_with_path(pruned, opt_state)


def steps_until_restart(gap: int, step: int) -> int:
    """The number of steps before the next one that begins with a restart; the first is step T."""
    return gap if step == 0 else -step % gap
