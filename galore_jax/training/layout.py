"""How parameters, batches and activations of a training lie on its mesh.

A batch is divided over the axes "data" and "fsdp", and so are activations. Parameters are divided
over "fsdp" as `galore_jax.shardings` decides, and over "tensor" by `tensor_rules`: one of the two
products of attention and of the MLP is cut by columns, the other by rows, so that a sum at the end
of each is all that the devices exchange.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galore_jax.errors import InputError
from galore_jax.grads.data_parallel import needs_whole_embeddings
from galore_jax.models.adapters import A, Adapter, B
from galore_jax.subspace.matrix_view import path_names
from galore_jax.training.config import Config
from galore_jax.training.mesh import DATA, FSDP, TENSOR, MeshConfig, any_of, divisors, make_mesh
from galore_jax.types import PyTree

P = PartitionSpec
BATCH_AXES = (DATA, FSDP)


def tensor_rules(config: Config) -> Mapping[str, PartitionSpec]:
    """How parameters of a decoder are divided over the axis "tensor", by glob of their paths."""
    model, by_columns = config.model, ("q", "k", "v", "gate", "up")
    rules = kernel_rules(config.optimizer.adapter, by_columns)
    if model.attention_bias:
        rules |= {f"*/{name}_proj/bias": P(None, TENSOR) for name in ("q", "k", "v")}
    if not model.tie_embeddings:
        rules["lm_head/kernel"] = P(None, TENSOR)
    return rules | {"embed_tokens/embedding": P(TENSOR, None)}


def kernel_rules(adapter: Adapter | None, by_columns: Sequence[str]) -> dict[str, PartitionSpec]:
    """Those of the blocks' kernels and adapters, some of which are divided by columns."""
    by_rows, rules = ("o", "down"), {}
    if adapter is None or adapter.has_kernel:
        rules |= {f"*/{name}_proj/kernel": P(None, None, TENSOR) for name in by_columns}
        rules |= {f"*/{name}_proj/kernel": P(None, TENSOR, None) for name in by_rows}
    if adapter is not None:
        rules |= {f"*/{name}_proj/{B}": P(None, None, TENSOR) for name in by_columns}
        rules |= {f"*/{name}_proj/{A}": P(None, TENSOR, None) for name in by_rows}
    return rules


def training_mesh(config: Config) -> Mesh | None:
    """The mesh of a training on all devices; None for a single device.

    Raises:
      InputError: the mesh does not have as many devices as there are, the rows of a micro-batch
        cannot be divided among them, or the heads, the MLP or the vocabulary cannot.
    """
    mesh = make_mesh(config.mesh)
    check_training_mesh(config, mesh)
    return mesh


def check_training_mesh(config: Config, mesh: Mesh | None) -> None:
    """Raises an `InputError` if a training cannot be divided over a mesh: see `training_mesh`."""
    model = config.model
    sizes = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    check_divisible(mesh, config.data.batch_size, sizes, config.training.accumulation)


def check_divisible(
    mesh: Mesh | None, batch_size: int, sizes: Mapping[str, int], parts: int | None = None
) -> None:
    """Raises an `InputError` if a mesh cannot divide a batch in some parts, or a model's sizes."""
    if mesh is None:
        return
    rows, divided = batch_size // (parts or 1), math.prod(mesh.shape[name] for name in BATCH_AXES)
    if rows % divided:
        possible = [size for size in divisors(mesh.size) if rows % size == 0]
        micro_batch = "" if parts is None else " / training.accumulation"
        fewer = ""
        if parts is not None and batch_size % divided == 0:
            fitting = math.gcd(parts, batch_size // divided)
            fewer = f"lower training.accumulation to {fitting}, "
        raise InputError(
            f"mesh.data × mesh.fsdp is {divided}, which does not divide data.batch_size"
            f"{micro_batch}, {rows} rows: {fewer}set data.batch_size to a multiple of "
            f"{(parts or 1) * divided}, or choose a mesh in which mesh.data × mesh.fsdp is "
            f"{any_of(possible)}."
        )
    for name, size in sizes.items():
        if size % mesh.shape[TENSOR]:
            raise InputError(
                f"mesh.tensor is {mesh.shape[TENSOR]}, which does not divide model.{name}, {size}: "
                f"choose {any_of(divisors(math.gcd(*sizes.values())))}."
            )


def moment_axes(config: MeshConfig, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which the optimizer's moments are divided, besides those of the parameters."""
    return (DATA,) if config.shard_moments and mesh.shape[DATA] > 1 else ()


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """The shapes with these shardings, in the tree of the shardings."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    ]
    return jax.tree.structure(shardings).unflatten(leaves)


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of a batch's arrays, (rows, length)."""
    return None if mesh is None else NamedSharding(mesh, P(BATCH_AXES))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Puts the rows of a batch, which every process has, on the devices that they belong to."""
    sharding = batch_sharding(mesh)
    if sharding is None:
        return dict(batch)

    def put(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return {name: put(rows) for name, rows in batch.items()}


def data_axes(mesh: Mesh | None) -> tuple[str, ...]:
    """The axes over which the batch is cut into shards, for each of which the loss is traced."""
    return (DATA,) if mesh is not None and mesh.shape[DATA] > 1 else ()


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that each device has all of."""
    return NamedSharding(mesh, P())


def jit_on(mesh: Mesh | None, f: Callable[..., Any], out: Any = None, **options: Any) -> Any:
    """`jax.jit` of a function on a mesh, in which XLA chooses how intermediate arrays lie.

    Args:
      mesh: None: a single device.
      f: the function; call or lower the result inside `on_mesh`.
      out: the shardings of its results; None: each device gets all of them.
      options: of `jax.jit`.
    """
    if mesh is None:
        return jax.jit(f, **options)
    out = whole(mesh) if out is None else out
    return jax.jit(f, out_shardings=out, **options)


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """A context in which functions are traced for a mesh.

    In it, the models' activations lie as this module says, by `nn.with_logical_constraint`.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(_rules(BATCH_AXES)):
        yield


def _rules(batch_axes: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The mesh axes of the models' logical axes."""
    return [("batch", batch_axes), ("heads", TENSOR), ("mlp", TENSOR)]


def per_shard(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of parameters and a batch, also inside a `shard_map` over some of the batch's axes.

    There a sharding may name the other axes only, and an embedding may have to be whole.
    """

    def shard_loss(params: PyTree, *batch: Any) -> Any:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if not manual:
            return loss(params, *batch)
        if needs_whole_embeddings():
            params = jax.tree_util.tree_map_with_path(_whole_embedding, params)
        free = tuple(name for name in BATCH_AXES if name not in manual)
        with nn.logical_axis_rules(_rules(free)):
            return loss(params, *batch)

    return shard_loss


def _whole_embedding(path: Any, leaf: jax.Array) -> jax.Array:
    if path_names(path)[-1] != "embedding":
        return leaf
    return jax.lax.with_sharding_constraint(leaf, P())
