"""RoBERTa (arXiv 1907.11692) and BERT (arXiv 1810.04805) in Flax Linen, with stacked blocks."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from galore_jax.errors import InputError, require
from galore_jax.models.adapters import Adapter
from galore_jax.models.dense import Weights
from galore_jax.models.layers import check_length, constrain, dense, embedding
from galore_jax.settings import checked

ARCHITECTURES = ("roberta", "bert")


Rate = Annotated[float, Field(ge=0, lt=1)]


@checked("model")
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and numerical settings of a RoBERTa or BERT; the defaults are those of RoBERTa base.

    Attributes:
      architecture: "roberta" or "bert". They differ in the numbering of positions (see
        `position_ids`) and in dropout before the dense layer of a classification head.
      vocab_size: rows of the word embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: number of blocks.
      num_heads: attention heads; each has hidden_size / num_heads components.
      max_length: the longest sequence in tokens.
      token_types: rows of the token type embedding.
      pad_id: the token that is padding: no position attends to it.
      dropout: rate of dropout of the embeddings and of what attention and MLP add to the stream.
      attention_dropout: rate of dropout of attention weights.
      classifier_dropout: rate of dropout in a classification head; None: `dropout`.
      norm_epsilon: added to the variance in LayerNorm.
      initializer_range: standard deviation of the initial kernels and embeddings.
      dtype: dtype of the parameters and the computation, "float32" or "bfloat16".

    Raises:
      InputError: a value is out of range, or the number of heads does not divide evenly.
    """

    architecture: Literal["roberta", "bert"] = "roberta"
    vocab_size: PositiveInt = 50265
    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 12
    max_length: PositiveInt = 512
    token_types: PositiveInt = 1
    pad_id: NonNegativeInt = 1
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    classifier_dropout: Rate | None = None
    norm_epsilon: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: ClassVar[Weights] = "plain"

    def __post_init__(self):
        in_vocabulary = self.pad_id < self.vocab_size
        require("model.pad_id", self.pad_id, in_vocabulary, "a row of the word embedding")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size "
                f"{self.hidden_size}: choose a divisor."
            )

    @property
    def first_position(self) -> int:
        """The row of the position embedding for the first token of a sequence."""
        return self.pad_id + 1 if self.architecture == "roberta" else 0


class Encoder(nn.Module):
    """The body of the model; `init(key, tokens)["params"]` has these leaves, in config.dtype.

    {word,position,token_type}_embedding/embedding (rows, hidden), embedding_norm/{scale,bias}; with
    a leading layer axis: layers/attention/{q,k,v,o}_proj/{kernel,bias},
    layers/attention_norm/{scale,bias}, layers/mlp/{up,down}_proj/{kernel,bias},
    layers/mlp_norm/{scale,bias}. With an adapter, each kernel in layers/ has the factors lora_a and
    lora_b beside it, or in its place.
    """

    config: EncoderConfig
    adapter: Adapter | None = None

    def setup(self):
        """Creates the layers."""
        config = self.config
        self.word_embedding = embedding(config.vocab_size, config)
        self.position_embedding = embedding(config.first_position + config.max_length, config)
        self.token_type_embedding = embedding(config.token_types, config)
        self.embedding_norm = _norm(config)
        self.embedding_dropout = nn.Dropout(config.dropout)
        stack = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast)),
            length=config.num_layers,
        )
        self.layers = stack(config, self.adapter)

    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes each token with its context on both sides.

        Args:
          tokens: int32 (batch, length), padded with config.pad_id.
          token_types: int32 (batch, length), the number of the token's text. None: 0.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          The hidden states (batch, length, hidden) in config.dtype.

        Raises:
          InputError: a row is longer than config.max_length.
        """
        config = self.config
        check_length(tokens, config)
        if token_types is None:
            token_types = jnp.zeros_like(tokens)
        x = self.word_embedding(tokens) + self.token_type_embedding(token_types)
        x = x + self.position_embedding(position_ids(tokens, config))
        x = self.embedding_norm(constrain(x, "batch")).astype(config.dtype)
        x = self.embedding_dropout(x, deterministic=deterministic)
        mask = (tokens != config.pad_id)[:, None, None]
        return self.layers(x, mask, deterministic)[0]


class Classifier(nn.Module):
    """An encoder with a head for whole texts: classification, or regression with one output.

    Its leaves are those of `Encoder` in encoder/, head/dense/{kernel,bias} (hidden, hidden) and
    head/out_proj/{kernel,bias} (hidden, num_labels). For BERT head/dense is the pooler.
    """

    config: EncoderConfig
    num_labels: int
    adapter: Adapter | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits, or values of a regression, float32 (batch, num_labels); see `Encoder`."""
        x = Encoder(self.config, self.adapter, name="encoder")(tokens, token_types, deterministic)
        head = ClassificationHead(self.config, self.num_labels, name="head")
        return head(x[:, 0], deterministic)


class ClassificationHead(nn.Module):
    """`out_proj(tanh(dense(x)))` of the first token, with dropout."""

    config: EncoderConfig
    num_labels: int

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Maps (batch, hidden) to float32 (batch, num_labels)."""
        config = self.config
        rate = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        dropout = nn.Dropout(rate, deterministic=deterministic)
        if config.architecture == "roberta":
            x = dropout(x)
        x = jnp.tanh(dense(config.hidden_size, config, "dense", use_bias=True)(x))
        out = dense(self.num_labels, config, "out_proj", result=jnp.float32, use_bias=True)
        return out(dropout(x))


class EncoderBlock(nn.Module):
    """One post-norm layer: `x = norm(x + attention(x)); x = norm(x + mlp(x))`."""

    config: EncoderConfig
    adapter: Adapter | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """The next activations (batch, length, hidden); the mask is that of `SelfAttention`."""
        config, adapter = self.config, self.adapter
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        # Inputs and outputs of a sublayer are undivided along the last axis, so that neither the
        # scales of norms nor dropout determine how XLA divides the products.
        attention = SelfAttention(config, adapter, name="attention")
        attended = constrain(attention(constrain(x, "batch"), mask, deterministic), "batch")
        x = _norm(config, "attention_norm")(x + dropout(attended))
        added = constrain(EncoderMLP(config, adapter, name="mlp")(constrain(x, "batch")), "batch")
        return _norm(config, "mlp_norm")(x + dropout(added)), None


class SelfAttention(nn.Module):
    """Attention to all tokens; its kernels are plain (hidden, hidden) matrices, q, k, v and o."""

    config: EncoderConfig
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        """Attends to `x` (batch, length, hidden) where `mask` (batch, 1, 1, length) is true."""
        config, options = self.config, {"use_bias": True, "adapter": self.adapter}

        def heads(name: str) -> jax.Array:
            projected = dense(config.hidden_size, config, name, **options)(x)
            projected = projected.reshape(*x.shape[:2], config.num_heads, -1)
            return constrain(projected, "batch", None, "heads")

        queries, keys, values = heads("q_proj"), heads("k_proj"), heads("v_proj")
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32
        ) * (queries.shape[-1] ** -0.5)
        # Not -inf, which would give NaN for a row of padding only.
        weights = nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
        weights = nn.Dropout(config.attention_dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(values.dtype), values)
        mixed = constrain(mixed.reshape(x.shape), "batch", None, "heads")
        return dense(config.hidden_size, config, "o_proj", **options)(mixed)


class EncoderMLP(nn.Module):
    """`down(gelu(up(x)))`."""

    config: EncoderConfig
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, hidden) to the same shape."""
        config, options = self.config, {"use_bias": True, "adapter": self.adapter}
        up = dense(config.intermediate_size, config, "up_proj", **options)(x)
        hidden = constrain(nn.gelu(up, approximate=False), "batch", None, "mlp")
        return dense(config.hidden_size, config, "down_proj", **options)(hidden)


def position_ids(tokens: jax.Array, config: EncoderConfig) -> jax.Array:
    """The rows of the position embedding for `tokens` (batch, length), int32 of that shape.

    BERT numbers positions from 0. RoBERTa, like fairseq's `make_positions`, numbers the tokens that
    are not padding from pad_id + 1; padding has row pad_id.
    """
    if config.architecture == "bert":
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    is_token = (tokens != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + config.pad_id


def _norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
    # The variance is that of centred values: E[x²] - E[x]² cancels where the mean is large.
    return nn.LayerNorm(
        config.norm_epsilon,
        dtype=config.dtype,
        param_dtype=config.dtype,
        use_fast_variance=False,
        name=name,
    )
