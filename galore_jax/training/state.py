"""The state of a training, and the sizes of trees."""

import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import galore_jax
from galore_jax.grads import layerwise
from galore_jax.models.adapters import split
from galore_jax.ops.int8 import is_int8
from galore_jax.optim.galore_state import to_float32
from galore_jax.subspace.matrix_view import named_leaves, path_names
from galore_jax.training.mesh import DATA, batch_sharding, whole, with_shardings
from galore_jax.training.optimizer import make_optimizer, matrices
from galore_jax.training.task import Task
from galore_jax.types import PyTree

# Folded into the key of a step. The key itself is split over the leaves for stochastic rounding,
# and `split` gives the same keys as `fold_in` with small numbers.
DROPOUT, RESTART = 2**32 - 1, 2**32 - 2


class TrainState(NamedTuple):
    """The state of a training.

    Attributes:
      params: the model's parameters, in its dtype.
      opt_state: the optimizer's state.
      step: int32 scalar, the number of updates so far.
      seed: uint32 scalar, the random seed. It is here and not in the compiled step, so that runs
        that differ in nothing else share that.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array
    seed: jax.Array

    @property
    def key(self) -> jax.Array:
        """The random key of the next step, which a resumed run has too."""
        return jax.random.fold_in(jax.random.key(self.seed), self.step)


def init_state(task: Task, seed: Any = None) -> TrainState:
    """The state before the first step, without the parameters of a checkpoint; for `jax.jit`.

    It is determined by the configuration and the seed, by default that of the configuration.
    """
    seed = jnp.asarray(_seed(task) if seed is None else seed, jnp.uint32)
    params = task.init_params(jax.random.key(seed))
    tx, module = _optimizer(task)
    opt_state = module.init(tx, to_float32(trained(task, params)[0]))
    return TrainState(params, opt_state, jnp.zeros([], jnp.int32), seed)


def trained(task: Task, params: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters that the optimizer updates, and those that are frozen."""
    return split(params, task.trains_adapters_only)


def place_state(task: Task, mesh: Mesh | None) -> TrainState:
    """The state to start from, of which each device of a mesh has, and computes, its part only.

    It is `init_state`, with the parameters of the checkpoint if there is one.

    Raises:
      InputError: the checkpoint cannot be read or does not fit the model.
      MemoryError: the state and a batch are larger than the memory.
    """
    shapes = abstract_state(task, mesh)
    _check_memory(shapes, batch_shapes(task, mesh))
    leaves = []
    for program in starting_programs(task, shapes):
        leaves += jax.block_until_ready(program(_seed(task)))
    state = jax.tree.structure(shapes).unflatten(leaves)
    return state._replace(params=task.load_params(state.params))


def _check_memory(*shapes: PyTree) -> None:
    """Raises a `MemoryError` for what no device can hold: XLA may abort, or try for minutes."""

    def on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    if sum(map(on_a_device, jax.tree.leaves(shapes))) > device_memory():
        raise MemoryError


def program_bytes(compiled: Any) -> int:
    """The bytes that a compiled program needs, as assigned by XLA; aliased ones count once."""
    memory = compiled.memory_analysis()
    distinct = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + distinct


def device_memory() -> float:
    """The bytes that JAX can take of a device's memory; infinite if that is unknown."""
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    # Not every allocator has a limit.
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or math.inf


def starting_programs(task: Task, shapes: TrainState) -> list[Any]:
    """The jitted functions of the seed that make the leaves of `init_state`, one after the other.

    The first makes the parameters: what drawing them needs is free again before the rest is made.
    All lie where the leaves of `abstract_state`, the shapes, say, and each device computes its part
    only. Call or lower them outside of the mesh.
    """
    where, number = jax.tree.leaves(shapes), len(jax.tree.leaves(shapes.params))

    def program(part: slice) -> Any:
        make = lambda seed: jax.tree.leaves(init_state(task, seed))[part]
        return jax.jit(make, out_shardings=[leaf.sharding for leaf in where[part]])

    return [program(slice(number)), program(slice(number, None))]


def abstract_state(task: Task, mesh: Mesh | None = None) -> TrainState:
    """The shapes of the state, on a mesh with the sharding of each array."""
    shapes = jax.eval_shape(lambda: init_state(task))
    if mesh is None:
        return shapes
    tx, module = _optimizer(task)
    shardings = galore_jax.shardings(tx, shapes.params, mesh, task.tensor_rules)
    params = with_shardings(shapes.params, shardings)
    over = (DATA,) if task.config.mesh.shard_moments else ()
    # This tree knows the partitions of the parameters, by which later updates divide their work.
    updated, _ = trained(task, params)
    shardings = module.state_shardings(tx, to_float32(updated), over=over)
    opt_state = with_shardings(shapes.opt_state, shardings)
    scalars = (with_shardings(leaf, whole(mesh)) for leaf in (shapes.step, shapes.seed))
    return TrainState(params, opt_state, *scalars)


def batch_shapes(task: Task, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the largest batch."""
    data = task.config.data
    rows, sharding = (data.batch_size, data.sequence_length), batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(rows[:axes], dtype, sharding=sharding)
        for name, (axes, dtype) in task.arrays.items()
    }


def _seed(task: Task) -> np.ndarray:
    return np.asarray(task.config.training.seed, np.uint32)


def _optimizer(task: Task) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer, and the module that starts its state."""
    config, is_layerwise = task.config, task.config.training.layerwise
    tx = make_optimizer(config.optimizer, config.training.steps, clips=not is_layerwise)
    return tx, layerwise if is_layerwise else galore_jax


def matrix_state_bytes(task: Task) -> int:
    """Bytes that the optimizer keeps for the matrices that GaLore projects, bases included."""
    state = jax.eval_shape(lambda: init_state(task))
    found = matrices(to_float32(state.params))
    paths = [names for names, is_matrix in named_leaves(found) if is_matrix]

    def belongs_to_one(names: tuple[str, ...]) -> bool:
        # A state has the path of a parameter somewhere in its own: (1, mu, layers, …, kernel).
        parts = lambda length: (names[n : n + length] for n in range(len(names)))
        return any(path in parts(len(path)) for path in paths)

    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return tree_bytes([leaf for path, leaf in leaves if belongs_to_one(path_names(path))])


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether no number of the parameters and of the optimizer's state is infinite or NaN.

    On a mesh it is a scalar that each device has.
    """
    leaves = jax.tree.leaves((state.params, state.opt_state))
    inexact = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in inexact]).all()


def tree_size(tree: PyTree) -> int:
    """The number of elements in all leaves, of a parameter in 8 bits without its scales."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_int8))


def tree_bytes(tree: PyTree) -> int:
    """The number of bytes in all leaves."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
