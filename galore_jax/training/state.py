"""The state of a training, the shapes of a batch, and the sizes of trees."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads import layerwise
from galore_jax.models.adapters import combine, is_factor, split
from galore_jax.models.llama import Llama
from galore_jax.optim.state import to_float32
from galore_jax.subspace.matrix_view import named_leaves, path_names
from galore_jax.training.config import Config
from galore_jax.training.layout import (
    batch_sharding,
    moment_axes,
    tensor_rules,
    whole,
    with_shardings,
)
from galore_jax.training.optimizer import make_optimizer, matrices
from galore_jax.types import PyTree

Batch = dict[str, Any]
# Folded into the key of a step. The key itself is split over the leaves for stochastic rounding,
# and `split` gives the same keys as `fold_in` with small numbers.
DROPOUT, RESTART = 2**32 - 1, 2**32 - 2


class TrainState(NamedTuple):
    """Everything that a training step changes.

    Attributes:
      params: the model's parameters, in config.model.dtype.
      opt_state: the optimizer's state.
      step: int32 scalar, the number of updates so far.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array


def init_state(config: Config) -> TrainState:
    """The state before the first step, determined by the configuration alone; for `jax.jit`."""
    params = init_params(config, jax.random.key(config.training.seed))
    tx, module = _optimizer(config)
    opt_state = module.init(tx, to_float32(trained(config, params)[0]))
    return TrainState(params, opt_state, jnp.zeros([], jnp.int32))


def init_params(config: Config, key: jax.Array) -> PyTree:
    """Random parameters of the configured model, with its adapters.

    Whatever the optimizer, leaves that all models have are equal.
    """
    tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)
    plain, adapter = Llama(config.model).init(key, tokens)["params"], config.optimizer.adapter
    if adapter is None:
        return plain
    adapted = Llama(config.model, adapter).init(key, tokens)["params"]
    # Flax draws other kernels where a layer has more parameters.
    return combine(adapted, plain) if adapter.has_kernel else adapted


def step_key(config: Config, step: jax.Array) -> jax.Array:
    """The random key of a step, which a resumed run has too."""
    return jax.random.fold_in(jax.random.key(config.training.seed), step)


def trained(config: Config, params: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters that the optimizer updates, and those that are frozen."""
    return split(params, config.trains_adapters_only)


def place_state(config: Config, mesh: Mesh | None) -> TrainState:
    """The state to start from, of which each device of a mesh has, and computes, its part only.

    It is `init_state`, with the parameters of `model.checkpoint` if there is one. That has no
    adapters, so these stay as they were.

    Raises:
      InputError: the checkpoint cannot be read or does not fit the model.
      MemoryError: the state and a batch are larger than the memory.
    """
    shapes = abstract_state(config, mesh)
    _check_memory(shapes, batch_shapes(config, mesh))
    state = jax.tree.structure(shapes).unflatten(starting_program(config, shapes)())
    if config.model.checkpoint:
        state = state._replace(params=_read_params(config, state.params))
    return state


def _check_memory(*shapes: PyTree) -> None:
    """Raises a `MemoryError` for what no device can hold: XLA may abort, or try for minutes."""

    def on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    if jax.default_backend() == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    else:  # Not every allocator has a limit.
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or math.inf
    if sum(map(on_a_device, jax.tree.leaves(shapes))) > memory:
        raise MemoryError


def starting_program(config: Config, shapes: TrainState) -> Any:
    """The jitted function that makes the state to start from.

    Args:
      config: the configuration of the run.
      shapes: of `abstract_state`, for the devices on which the state is to lie.

    Returns:
      A function without arguments; it returns the leaves of `init_state`, of which each device
      computes its part only. Call or lower it outside of the mesh.
    """
    where = [leaf.sharding for leaf in jax.tree.leaves(shapes)]
    return jax.jit(lambda: jax.tree.leaves(init_state(config)), out_shardings=where)


def _read_params(config: Config, params: PyTree) -> PyTree:
    """The parameters of `model.checkpoint` in place of others, on the same devices.

    Each process reads what its devices have.
    """
    from galore_jax.interop.decoders import ModelFolder  # needs an extra of its own

    folder = ModelFolder(Path(config.model.checkpoint), config.model)

    def read(path: Any, old: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_factor(name.split("/")):
            return old
        shape, sharding = old.shape, old.sharding
        old.delete()  # Never are all of both in memory.
        read_part: Any = partial(folder.read, name)
        return jax.make_array_from_callback(shape, sharding, read_part)

    return jax.tree_util.tree_map_with_path(read, params)


def abstract_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """The shapes of the state, on a mesh with the sharding of each array."""
    shapes = jax.eval_shape(lambda: init_state(config))
    if mesh is None:
        return shapes
    tx, module = _optimizer(config)
    shardings = galore_jax.shardings(tx, shapes.params, mesh, tensor_rules(config))
    params, over = with_shardings(shapes.params, shardings), moment_axes(config.mesh, mesh)
    # This tree knows the partitions of the parameters, by which later updates divide their work.
    updated, _ = trained(config, params)
    shardings = module.state_shardings(tx, to_float32(updated), over=over)
    opt_state = with_shardings(shapes.opt_state, shardings)
    return TrainState(params, opt_state, with_shardings(shapes.step, whole(mesh)))


def _optimizer(config: Config) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer, and the module that starts its state."""
    is_layerwise = config.training.layerwise
    tx = make_optimizer(config.optimizer, config.training.steps, clips=not is_layerwise)
    return tx, layerwise if is_layerwise else galore_jax


def batch_shapes(config: Config, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch: `tokens`, `segments`, `positions`, `targets`, int32 (B, T)."""
    shape = config.data.batch_size, config.data.sequence_length
    leaf = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return dict.fromkeys(("tokens", "segments", "positions", "targets"), leaf)


def matrix_state_bytes(config: Config) -> int:
    """Bytes that the optimizer keeps for the matrices that GaLore projects, bases included."""
    params, opt_state, _ = jax.eval_shape(lambda: init_state(config))
    paths = [names for names, is_matrix in named_leaves(matrices(params)) if is_matrix]

    def belongs_to_one(names: tuple[str, ...]) -> bool:
        # A state has the path of a parameter somewhere in its own: (1, mu, layers, …, kernel).
        parts = lambda length: (names[n : n + length] for n in range(len(names)))
        return any(path in parts(len(path)) for path in paths)

    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return tree_bytes([leaf for path, leaf in leaves if belongs_to_one(path_names(path))])


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether no number of the parameters and of the optimizer's state is infinite or NaN.

    On a mesh it is a scalar that each device has.
    """
    inexact = [
        leaf
        for leaf in jax.tree.leaves((state.params, state.opt_state))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in inexact]).all()


def tree_size(tree: PyTree) -> int:
    """The number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """The number of bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
