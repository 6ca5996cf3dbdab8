"""Parts of the models: rotary positions, causal attention, norms and embeddings.

Norm statistics, the rotation and the softmax are always computed in float32.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.errors import InputError
from galore_jax.models.dense import Dense, normal_init


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, float32 (batch or 1, length, 1, head/2)."""

    cos: jax.Array
    sin: jax.Array


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Activations whose axes have these logical names: "batch", "heads", "mlp"; None: undivided.

    A trainer maps logical axes to axes of its mesh by `nn.logical_axis_rules`; without rules, as on
    a single device, this does nothing. It keeps XLA from gathering the whole batch where weights
    are divided over the same axes. Further axes are undivided.
    """
    axes += (None,) * (x.ndim - len(axes))
    constrained: Any = nn.with_logical_constraint  # pyright: ignore[reportPrivateImportUsage]
    return constrained(x, axes, rules=_axis_rules())


def _axis_rules() -> list[tuple[str, tuple[str, ...] | None]]:
    """The rules for logical axes; inside a `shard_map` over some axes they name the others only."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return [
        (name, tuple(axis for axis in jax.tree.leaves(mesh_axes) if axis not in manual) or None)
        for name, mesh_axes in nn.get_logical_axis_rules()
    ]


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates heads `x` (batch, length, heads, head); pair i is the components i and i + head/2.

    This is the half-split convention of the LLaMA checkpoints in Hugging Face format.
    """
    return lax.platform_dependent(x, rotation, tpu=_rotate_by_product, default=_rotate_halves)


def _rotate_halves(x: jax.Array, rotation: Rotation) -> jax.Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)


def _rotate_by_product(x: jax.Array, rotation: Rotation) -> jax.Array:
    """`_rotate_halves` for TPUs, which keep halves of less than 128 components padded.

    The halves change places in an exact product with a permutation.
    """
    cos, sin = (jnp.concatenate((half, half), axis=-1) for half in rotation)
    size = x.shape[-1]
    source, target = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    is_partner = abs(source - target) == size // 2
    swap = jnp.where(is_partner, jnp.where(source < target, 1, -1), 0).astype(x.dtype)
    swapped = jnp.matmul(x, swap, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def attention_mask(segments: jax.Array, window: int | None = None) -> jax.Array:
    """Causal mask within equal `segments` (batch, length): bool (batch, 1, query, key).

    With a `window`, each query sees the last `window` positions, including its own.
    """
    positions = jnp.arange(segments.shape[1])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & is_visible(positions[:, None], positions, window)


def is_visible(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Whether a query at one position sees the key at another: bool, of their broadcast shape."""
    visible = queries >= keys
    return visible if window is None else visible & (queries - keys < window)


# "cudnn": the kernel of `jax.nn.dot_product_attention` for NVIDIA cards, which keeps no scores;
# "blocks": plain JAX, by blocks of queries; "auto": the kernel where there is one.
Implementation = Literal["auto", "blocks", "cudnn"]


def causal_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    implementation: Implementation = "auto",
) -> jax.Array:
    """`softmax(q kᵀ / √head) v`, in which a mask may hide more than what comes later.

    Args:
      queries: (batch, length, heads, head).
      keys: (batch, length, kv heads, head).
      values: same shape as keys.
      mask: bool (batch or 1, 1, length, length), causal, in which every query sees a key.
      implementation: see `Implementation`.

    Returns:
      An array with the shape of `queries`.
    """
    if implementation == "cudnn" or (implementation == "auto" and cudnn_takes(queries)):
        return _attention_by_cudnn(queries, keys, values, mask)
    return _attention_by_blocks(queries, keys, values, mask)


def cudnn_takes(queries: jax.Array) -> bool:
    """Whether cuDNN has attention for queries of this shape and dtype on the device compiled for.

    It has none for cards older than Ampere.
    """
    _, length, _, size = queries.shape
    if queries.dtype.itemsize != 2 or length % 2 or size % 8 or size > 128:
        return False
    # The devices of a mesh need not be those of this machine, whose card alone tells its age.
    own = jax.local_devices()[0]
    device = jax.sharding.get_abstract_mesh().abstract_device or own
    capability = getattr(own, "compute_capability", "8.0")
    return device.device_kind.startswith("NVIDIA") and float(capability) >= 8


def _attention_by_cudnn(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    def attention(queries: Any, keys: Any, values: Any, mask: Any) -> jax.Array:
        return jax.nn.dot_product_attention(
            queries, keys, values, mask=mask, is_causal=True, implementation="cudnn"
        )

    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.manual_axes and mesh.auto_axes):
        return attention(queries, keys, values, mask)
    # JAX itself cannot divide it inside a `shard_map` over other axes.
    names = ("batch", None, "heads", None)
    to_mesh: Any = nn.logical_to_mesh_axes  # pyright: ignore[reportPrivateImportUsage]
    spec = to_mesh(names, _axis_rules())
    of_mask = PartitionSpec(spec[0] if mask.shape[0] > 1 else None)
    divided = jax.shard_map(
        attention,
        in_specs=(spec, spec, spec, of_mask),
        out_specs=spec,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
    return divided(queries, keys, values, mask)


# Shorter blocks of queries save little, and more of them compile slowly.
MIN_QUERIES, MAX_BLOCKS = 128, 8


def _attention_by_blocks(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """`causal_attention` by blocks of queries, each with the keys up to its end.

    Beyond 128 positions a quarter to nearly half of the scores are never computed. The axis of
    heads precedes that of positions, so that every product is a plain matrix product, and the
    softmax is normalised after the product with the values. On CPUs the forward and backward passes
    take two thirds of the time of `jax.nn.dot_product_attention`.
    """
    batch, length, heads, size = queries.shape
    groups = keys.shape[2]
    queries = queries.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    keys, values = (x.transpose(0, 2, 1, 3)[:, :, None] for x in (keys, values))
    step = -(-length // min(MAX_BLOCKS, -(-length // MIN_QUERIES)))
    blocks = []
    for start in range(0, length, step):
        end = min(start + step, length)
        block = queries[..., start:end, :]
        scores = jnp.matmul(block, keys[..., :end, :].mT, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, :, start:end, :end], scores * size**-0.5, -jnp.inf)
        largest = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights.astype(values.dtype)
        sums = jnp.matmul(weights, values[..., :end, :], preferred_element_type=jnp.float32)
        blocks.append((sums / total).astype(queries.dtype))
    mixed = jnp.concatenate(blocks, axis=-2)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def check_length(tokens: jax.Array, config: Any) -> None:
    """Raises an `InputError` if rows of tokens are longer than a model's configuration allows."""
    if tokens.shape[1] > config.max_length:
        raise InputError(
            f"a row of {tokens.shape[1]} tokens is longer than model.max_length "
            f"{config.max_length}: shorten the rows, or raise it for a new model."
        )


def rms_norm(config: Any, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis, with a scale for each component, of a model's configuration."""
    dtype = config.dtype
    return nn.RMSNorm(config.norm_epsilon, dtype=dtype, param_dtype=dtype, name=name)


def embedding(rows: int, config: Any) -> nn.Embed:
    """An embedding of `rows` vectors of a model's configuration, looked up in float32.

    So the gradient, a sum over all occurrences of a token, is rounded only once.
    """
    return nn.Embed(
        rows,
        config.hidden_size,
        dtype=jnp.float32,
        param_dtype=config.dtype,
        embedding_init=normal_init(config.initializer_range, config.weights),
    )


def dense(features: int, config: Any, name: str | None = None, **options: Any) -> Dense:
    """A dense layer with the deviation, the dtype and the weights of a model's configuration."""
    options |= {"weights": config.weights}
    return Dense(features, config.initializer_range, config.dtype, name=name, **options)
