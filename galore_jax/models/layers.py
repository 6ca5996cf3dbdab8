"""The layers of a decoder-only transformer: rotary attention, gated MLP, pre-norm block.

Every layer works on activations of shape (batch, length, hidden) in the dtype of its parameters.
Norm statistics, the rotation and the softmax are always computed in float32.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from galore_jax.models.adapters import Adapter
from galore_jax.models.dense import Dense


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, float32 (batch or 1, length, 1, head/2)."""

    cos: jax.Array
    sin: jax.Array


class RotaryScaling(NamedTuple):
    """LLaMA 3's change of rotary frequencies for sequences longer than the model was trained on.

    Frequencies that turn less than `low` times over `original_length` positions are divided by
    `factor`, those that turn more than `high` times stay, and a linear blend joins the two.
    """

    factor: float
    low: float
    high: float
    original_length: int


class KeyValueCache(NamedTuple):
    """Keys and values of all positions so far, each (batch, max length, kv heads, head)."""

    keys: jax.Array
    values: jax.Array


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Activations whose axes have these logical names: "batch", "heads", "mlp"; None: undivided.

    A trainer maps logical axes to axes of its mesh by `nn.logical_axis_rules`; without rules, as on
    a single device, this does nothing. It keeps XLA from gathering the whole batch where weights
    are divided over the same axes. Further axes are undivided.
    """
    axes += (None,) * (x.ndim - len(axes))
    return nn.with_logical_constraint(x, axes)  # pyright: ignore[reportPrivateImportUsage]


def rotation_at(
    positions: jax.Array, head_size: int, theta: float, scaling: RotaryScaling | None = None
) -> Rotation:
    """The rotation of RoFormer (arXiv 2104.09864, section 3.2.2) at `positions`, (batch, length).

    Pair i of a head is rotated by `position / theta ** (2 i / head_size)` radians, changed by
    `scaling` if given.
    """
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is not None:
        turns = scaling.original_length * frequencies / (2 * jnp.pi)
        kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequencies *= kept + (1 - kept) / scaling.factor
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates heads `x` (batch, length, heads, head); pair i is the components i and i + head/2.

    This is the half-split convention of the LLaMA checkpoints in Hugging Face format.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)


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


# Blocks of queries in attention: shorter blocks save little, and more of them compile slowly.
MIN_QUERIES, MAX_BLOCKS = 128, 8


def causal_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> jax.Array:
    """`softmax(q kᵀ / √head) v` by blocks of queries, each with the keys up to its end.

    Beyond 128 positions a quarter to nearly half of the scores are never computed. The axis of
    heads precedes that of positions, so that every product is a plain matrix product, and the
    softmax is normalised after the product with the values. On CPUs the forward and backward passes
    take two thirds of the time of `jax.nn.dot_product_attention`.

    Args:
      queries: (batch, length, heads, head).
      keys: (batch, length, kv heads, head).
      values: same shape as keys.
      mask: bool (batch or 1, 1, length, length), causal, in which every query sees a key.

    Returns:
      An array with the shape of `queries`.
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
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights.astype(values.dtype)
        sums = jnp.matmul(weights, values[..., :end, :], preferred_element_type=jnp.float32)
        blocks.append((sums / total).astype(queries.dtype))
    mixed = jnp.concatenate(blocks, axis=-2)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; kv heads are shared by groups of query heads.

    Kernels are plain (in, out) matrices: q (hidden, heads x head), k and v (hidden, kv heads x
    head), o (heads x head, hidden).

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads`.
      head_size: components of a head, an even number.
      biased: which of the projections "q", "k", "v" and "o" have a bias, one letter each.
      qk_norm_epsilon: added to the mean square in the RMS norms of queries and keys, which have a
        scale for each component of a head; None: there are no such norms.
      initializer_range: standard deviation of the initial kernels.
      dtype: of the parameters and the result.
      adapter: of the kernels.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    biased: str
    qk_norm_epsilon: float | None
    initializer_range: float
    dtype: Any
    adapter: Adapter | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        mask: jax.Array,
        cache: KeyValueCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValueCache | None]:
        """Attends to `x` itself, or to `cache` after `x` is written into it.

        Args:
          x: activations (batch, length, hidden).
          rotation: the rotary embedding at the positions of `x`.
          mask: bool (batch or 1, 1, length, keys), true where a query sees a key.
          cache: keys and values of earlier positions; `x` is written from `start` on.
          start: position of the first token of `x`, int32 scalar.

        Returns:
          The activations, and the cache with `x` in it (None without a cache).
        """
        batch, length, hidden = x.shape

        def projection(features: int, letter: str) -> Dense:
            return Dense(
                features,
                self.initializer_range,
                self.dtype,
                use_bias=letter in self.biased,
                adapter=self.adapter,
                name=f"{letter}_proj",
            )

        def heads(letter: str, count: int) -> jax.Array:
            projected = projection(count * self.head_size, letter)(x)
            projected = projected.reshape(batch, length, count, self.head_size)
            return constrain(projected, "batch", None, "heads")

        def rotated(letter: str, count: int) -> jax.Array:
            projected = heads(letter, count)
            if self.qk_norm_epsilon is not None:
                projected = rms_norm(self.qk_norm_epsilon, self.dtype, f"{letter}_norm")(projected)
            return rotate(projected, rotation)

        queries, keys = rotated("q", self.num_heads), rotated("k", self.num_kv_heads)
        values = heads("v", self.num_kv_heads)
        if cache is None:
            mixed = causal_attention(queries, keys, values, mask)
        else:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, values, start, axis=1)
            cache = KeyValueCache(keys, values)
            mixed = jax.nn.dot_product_attention(queries, keys, values, mask=mask)
        mixed = constrain(mixed.reshape(batch, length, -1), "batch", None, "heads")
        return projection(hidden, "o")(mixed), cache


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    intermediate_size: int
    initializer_range: float
    dtype: Any
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same shape."""

        def projection(features: int, name: str) -> Dense:
            return Dense(
                features, self.initializer_range, self.dtype, adapter=self.adapter, name=name
            )

        gate = projection(self.intermediate_size, "gate_proj")(x)
        up = projection(self.intermediate_size, "up_proj")(x)
        hidden = constrain(nn.silu(gate) * up, "batch", None, "mlp")
        return projection(x.shape[-1], "down_proj")(hidden)


class Block(nn.Module):
    """One pre-norm layer of LLaMA: `x += attention(norm(x)); x += mlp(norm(x))`.

    With `remat_halves` the backward pass recomputes attention and the MLP separately, so that the
    activations of only one of them exist at a time. With `qk_norm` queries and keys are normalised;
    the other attributes are those of `Attention` and `MLP`.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    biased: str
    qk_norm: bool
    norm_epsilon: float
    initializer_range: float
    dtype: Any
    adapter: Adapter | None = None
    remat_halves: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation,
        mask: jax.Array,
        cache: KeyValueCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValueCache | None]:
        """Arguments and results are those of `Attention`."""
        half = nn.remat if self.remat_halves else lambda layer: layer
        attention = half(Attention)(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            biased=self.biased,
            qk_norm_epsilon=self.norm_epsilon if self.qk_norm else None,
            initializer_range=self.initializer_range,
            dtype=self.dtype,
            adapter=self.adapter,
            name="attention",
        )
        mlp = half(MLP)(
            self.intermediate_size, self.initializer_range, self.dtype, self.adapter, name="mlp"
        )
        attended, cache = attention(self._norm("input_norm", x), rotation, mask, cache, start)
        x = x + attended
        return constrain(x + mlp(self._norm("post_attention_norm", x)), "batch"), cache

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return constrain(rms_norm(self.norm_epsilon, self.dtype, name)(x), "batch")


def rms_norm(epsilon: float, dtype: Any, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis, with a scale for each component."""
    return nn.RMSNorm(epsilon, dtype=dtype, param_dtype=dtype, name=name)
