"""LLaMA (arXiv 2302.13971) in Flax Linen, with its blocks stacked along a leading layer axis.

The configuration covers the models that differ from it in details: LLaMA 3, Mistral, Qwen2, Qwen3.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field, PositiveFloat

from galore_jax.errors import InputError
from galore_jax.models.adapters import Adapter
from galore_jax.models.dense import Dense, Weights, matmul
from galore_jax.models.layers import (
    Implementation,
    Rotation,
    attention_mask,
    causal_attention,
    check_length,
    constrain,
    dense,
    embedding,
    is_visible,
    rms_norm,
    rotate,
)
from galore_jax.settings import checked

Size = Annotated[int, Field(ge=1, lt=2**31)]


@checked("model")
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and numerical settings of a LLaMA.

    Attributes:
      vocab_size: rows of the embedding and columns of the head.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of num_heads; None: as many as num_heads.
      head_dim: components of a head, an even number; None: hidden_size / num_heads.
      attention_bias: which projections of attention have a bias, `"qkv"` (Qwen2) or `"qkvo"`;
        empty: none.
      qk_norm: RMSNorm of each head's queries and keys before the rotation (Qwen3).
      sliding_window: how many positions a query sees, its own included (Mistral); None: all
        up to its own.
      tie_embeddings: the head is the transposed embedding.
      max_length: the longest sequence in tokens.
      rope_theta: base of the rotary wavelengths.
      rope_factor: by how much the longest wavelengths are stretched, as in LLaMA 3; 1: not at all.
      rope_low_freq_factor: frequencies with fewer turns over rope_original_length are stretched.
      rope_high_freq_factor: frequencies with more turns over it stay; between the two is a blend.
      rope_original_length: the longest sequence before the wavelengths were stretched.
      norm_epsilon: added to the mean square in RMSNorm.
      initializer_range: standard deviation of the initial kernels and embedding.
      dtype: dtype of the parameters and the computation, "float32" or "bfloat16".
      weights: how kernels, embedding and head are stored: "plain", in `dtype`, or "int8", as codes
        with a scale for each row, which a block or the head dequantises to `dtype` where it reads
        them. Set `remat`, or `training.layerwise`: otherwise the backward pass keeps what all
        blocks have dequantised.
      attention: how attention is computed in training: "blocks", in plain JAX by blocks of queries;
        "cudnn", by the kernel for NVIDIA cards from Ampere on, in bfloat16, which keeps no scores;
        "auto", by the kernel wherever it can.
      remat: recompute each block in the backward pass instead of keeping its activations.
      checkpoint: folder of a model of Hugging Face's transformers whose parameters a training
        starts from; empty: random ones. On the command line it also sets what the model consists
        of, and the tokenizer, to those of the folder.

    Raises:
      InputError: a size is not positive, a number of heads does not divide evenly, or another value
        is not supported.
    """

    vocab_size: Size = 32000
    hidden_size: Size = 512
    intermediate_size: Size = 1376
    num_layers: Size = 8
    num_heads: Size = 8
    num_kv_heads: Size | None = None
    head_dim: Size | None = None
    attention_bias: Literal["", "qkv", "qkvo"] = ""
    qk_norm: bool = False
    sliding_window: Size | None = None
    tie_embeddings: bool = False
    max_length: Size = 1024
    rope_theta: PositiveFloat = 10000.0
    rope_factor: PositiveFloat = 1.0
    rope_low_freq_factor: PositiveFloat = 1.0
    rope_high_freq_factor: PositiveFloat = 4.0
    rope_original_length: Size = 8192
    norm_epsilon: PositiveFloat = 1e-6
    initializer_range: PositiveFloat = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Weights = "plain"
    attention: Implementation = "auto"
    remat: bool = False
    checkpoint: str = ""

    def __post_init__(self):
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size "
                f"{self.hidden_size}: choose a divisor, or set model.head_dim."
            )
        if self.head_size % 2:
            raise InputError(
                f"the model has heads of {self.head_size}, but rotary positions need an even size: "
                "choose another model.num_heads or model.head_dim."
            )
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise InputError("model.rope_low_freq_factor must be below rope_high_freq_factor.")
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads "
                f"{self.num_heads}: choose a divisor."
            )

    @property
    def plain(self) -> "LlamaConfig":
        """The same model with plain weights."""
        return dataclasses.replace(self, weights="plain")

    @property
    def head_size(self) -> int:
        """Components of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def rotation_at(self, positions: jax.Array) -> Rotation:
        """The rotation of RoFormer (arXiv 2104.09864, section 3.2.2) at positions (batch, length).

        Pair i of a head is rotated by `position / rope_theta ** (2 i / head_size)` radians. A
        rope_factor other than 1 divides the frequencies of few turns by it, as in LLaMA 3.
        """
        size = self.head_size
        frequencies = self.rope_theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
        if self.rope_factor != 1:
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            turns = self.rope_original_length * frequencies / (2 * jnp.pi)
            kept = jnp.clip((turns - low) / (high - low), 0, 1)
            frequencies *= kept + (1 - kept) / self.rope_factor
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
        return Rotation(jnp.cos(angles), jnp.sin(angles))


class KeyValueCache(NamedTuple):
    """Keys and values of all positions so far, each (batch, max length, kv heads, head)."""

    keys: jax.Array
    values: jax.Array


class Llama(nn.Module):
    """The language model; `init(key, tokens)["params"]` has these leaves, in config.dtype.

    embed_tokens/embedding (vocab, hidden); with a leading layer axis: layers/input_norm/scale,
    layers/attention/{q,k,v,o}_proj/kernel, layers/post_attention_norm/scale,
    layers/mlp/{gate,up,down}_proj/kernel; norm/scale (hidden,); lm_head/kernel (hidden, vocab).
    As configured, also layers/attention/{q,k,v,o}_proj/bias and layers/attention/{q,k}_norm/scale;
    and there is no lm_head if the embeddings are tied. With an adapter all kernels in layers/ have
    the leaves that it says.
    """

    config: LlamaConfig
    adapter: Adapter | None = None

    def setup(self):
        """Creates the layers."""
        config = self.config
        self.embed_tokens = embedding(config.vocab_size, config)
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast, 0, nn.broadcast)),
            length=config.num_layers,
        )
        self.layers = stack(config, self.adapter)
        self.norm = rms_norm(config)
        if not config.tie_embeddings:
            self.lm_head = dense(config.vocab_size, config, result=jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the token after each position.

        Args:
          tokens: int32 (batch, length).
          segments: int32 (batch, length), the number of the document that a token belongs to, 0 for
            padding; tokens attend to those with the same number. None: one document per row.
          positions: int32 (batch, length), within the document. None: 0, 1, 2, …

        Returns:
          Logits, float32 (batch, length, vocab).

        Raises:
          InputError: a row is longer than config.max_length.
        """
        check_length(tokens, self.config)
        length = tokens.shape[1]
        if segments is None:
            segments = jnp.ones((1, length), jnp.int32)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        mask = attention_mask(segments, self.config.sliding_window)
        return self._logits(tokens, positions, mask)[0]

    def extend(
        self, tokens: jax.Array, cache: KeyValueCache, start: jax.Array | int
    ) -> tuple[jax.Array, KeyValueCache]:
        """Predicts the token after each of `tokens`, which continue the rows held in `cache`.

        Args:
          tokens: int32 (batch, length), at positions start, start + 1, …
          cache: keys and values of positions 0 to start - 1, with a leading layer axis:
            (layers, batch, max length, kv heads, head).
          start: int32 scalar.

        Returns:
          Logits, float32 (batch, length, vocab), and the cache with `tokens` in it.
        """
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        keys = jnp.arange(cache.keys.shape[2])
        seen = is_visible(positions[:, None], keys, self.config.sliding_window)
        return self._logits(tokens, positions[None], seen[None, None], cache, start)

    def _logits(self, tokens, positions, mask, cache=None, start: Any = 0) -> tuple[jax.Array, Any]:
        rotation = self.config.rotation_at(positions)
        x = constrain(self.embed_tokens(tokens), "batch").astype(self.config.dtype)
        x, cache = self.layers(x, rotation, mask, cache, start)
        x = constrain(self.norm(x), "batch")
        if self.config.tie_embeddings:
            return matmul(x, self.embed_tokens.embedding.T, jnp.float32), cache
        return self.lm_head(x), cache


class Block(nn.Module):
    """One pre-norm layer: `x += attention(norm(x)); x += mlp(norm(x))`.

    With `remat_parts` the backward pass recomputes the MLP, and attention from queries, keys and
    values, so that the largest activations of only one of them exist at a time.
    """

    config: LlamaConfig
    adapter: Adapter | None = None
    remat_parts: bool = False

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
        attention = Attention(self.config, self.adapter, self.remat_parts, name="attention")
        mlp = (nn.remat(MLP) if self.remat_parts else MLP)(self.config, self.adapter, name="mlp")
        attended, cache = attention(self._norm("input_norm", x), rotation, mask, cache, start)
        x = x + attended
        return constrain(x + mlp(self._norm("post_attention_norm", x)), "batch"), cache

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return constrain(rms_norm(self.config, name)(x), "batch")


class Attention(nn.Module):
    """Causal self-attention with rotary positions; kv heads are shared by groups of query heads.

    Kernels are plain (in, out) matrices: q (hidden, heads x head), k and v (hidden, kv heads x
    head), o (heads x head, hidden). With `remat` the backward pass recomputes what lies between
    the rotated queries, keys and values and the product with o.
    """

    config: LlamaConfig
    adapter: Adapter | None = None
    remat: bool = False

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
        config, (batch, length, hidden) = self.config, x.shape

        def heads(letter: str, count: int) -> jax.Array:
            projected = self._projection(letter, count * config.head_size)(x)
            projected = projected.reshape(batch, length, count, config.head_size)
            return constrain(projected, "batch", None, "heads")

        def rotated(letter: str, count: int) -> jax.Array:
            projected = heads(letter, count)
            if config.qk_norm:
                projected = rms_norm(config, f"{letter}_norm")(projected)
            return rotate(projected, rotation)

        queries, keys = rotated("q", config.num_heads), rotated("k", config.kv_heads)
        values = heads("v", config.kv_heads)
        if cache is None:
            attend = partial(causal_attention, implementation=config.attention)
            attend = jax.checkpoint(attend) if self.remat else attend
            mixed = attend(queries, keys, values, mask)
        else:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, values, start, axis=1)
            cache = KeyValueCache(keys, values)
            mixed = jax.nn.dot_product_attention(queries, keys, values, mask=mask)
        mixed = constrain(mixed.reshape(batch, length, -1), "batch", None, "heads")
        return self._projection("o", hidden)(mixed), cache

    def _projection(self, letter: str, features: int) -> Dense:
        has_bias = letter in self.config.attention_bias
        options = {"use_bias": has_bias, "adapter": self.adapter}
        return dense(features, self.config, f"{letter}_proj", **options)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same shape."""
        config, adapter = self.config, self.adapter
        gate = dense(config.intermediate_size, config, "gate_proj", adapter=adapter)(x)
        up = dense(config.intermediate_size, config, "up_proj", adapter=adapter)(x)
        hidden = constrain(nn.silu(gate) * up, "batch", None, "mlp")
        return dense(x.shape[-1], config, "down_proj", adapter=adapter)(hidden)
