"""LLaMA (arXiv 2302.13971) in Flax Linen, with its blocks stacked along a leading layer axis."""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from galore_jax.errors import InputError
from galore_jax.models.layers import (
    Block,
    KeyValueCache,
    attention_mask,
    constrain,
    linear,
    rotation_at,
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and numerical settings of a LLaMA.

    Attributes:
      vocab_size: rows of the embedding and columns of the (untied) head.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: number of blocks.
      num_heads: query heads; each has hidden_size / num_heads components, an even number.
      num_kv_heads: key and value heads, a divisor of num_heads; None: as many as num_heads.
      max_length: the longest sequence in tokens.
      rope_theta: base of the rotary wavelengths.
      norm_epsilon: added to the mean square in RMSNorm.
      initializer_range: standard deviation of the initial kernels and embedding.
      dtype: dtype of the parameters and the computation, "float32" or "bfloat16".
      remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
      InputError: a size is not positive, a number of heads does not divide evenly, or the dtype is
        not supported.
    """

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    max_length: int = 1024
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name != "remat" and not value > 0:
                raise InputError(f"model.{field.name} is {value}: it must be positive.")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size "
                f"{self.hidden_size}: choose a divisor."
            )
        if self.head_size % 2:
            raise InputError(
                f"model.hidden_size {self.hidden_size} over model.num_heads {self.num_heads} gives "
                f"heads of {self.head_size}: rotary positions need an even size."
            )
        if self.num_heads % self.kv_heads:
            raise InputError(
                f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads "
                f"{self.num_heads}: choose a divisor."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f'model.dtype is "{self.dtype}": choose "float32" or "bfloat16".')

    @property
    def head_size(self) -> int:
        """Components of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class Llama(nn.Module):
    """The language model; `init(key, tokens)["params"]` has these leaves, in config.dtype.

    embed_tokens/embedding (vocab, hidden); with a leading layer axis: layers/input_norm/scale,
    layers/attention/{q,k,v,o}_proj/kernel, layers/post_attention_norm/scale,
    layers/mlp/{gate,up,down}_proj/kernel; norm/scale (hidden,); lm_head/kernel (hidden, vocab).
    """

    config: LlamaConfig

    def setup(self):
        """Creates the layers."""
        config = self.config
        initializer = nn.initializers.normal(config.initializer_range)
        # The lookup is done in float32 so that its gradient, a sum over all occurrences of a
        # token, is accumulated in float32 before it is rounded.
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.float32,
            param_dtype=config.dtype,
            embedding_init=initializer,
        )
        block = nn.remat(Block, prevent_cse=False) if config.remat else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast, 0, nn.broadcast)),
            length=config.num_layers,
        )
        self.layers = stack(
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            intermediate_size=config.intermediate_size,
            norm_epsilon=config.norm_epsilon,
            initializer_range=config.initializer_range,
            dtype=config.dtype,
        )
        self.norm = nn.RMSNorm(config.norm_epsilon, dtype=config.dtype, param_dtype=config.dtype)
        self.lm_head = linear(
            config.vocab_size, config.initializer_range, config.dtype, result=jnp.float32
        )

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
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise InputError(
                f"a row of {length} tokens is longer than model.max_length "
                f"{self.config.max_length}: shorten the rows or raise model.max_length."
            )
        if segments is None:
            segments = jnp.ones((1, length), jnp.int32)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        return self._logits(tokens, positions, attention_mask(segments))[0]

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
        seen = positions[:, None] >= jnp.arange(cache.keys.shape[2])
        return self._logits(tokens, positions[None], seen[None, None], cache, start)

    def _logits(self, tokens, positions, mask, cache=None, start: Any = 0) -> tuple[jax.Array, Any]:
        rotation = rotation_at(positions, self.config.head_size, self.config.rope_theta)
        x = constrain(self.embed_tokens(tokens), "batch").astype(self.config.dtype)
        x, cache = self.layers(x, rotation, mask, cache, start)
        return self.lm_head(constrain(self.norm(x), "batch")), cache
