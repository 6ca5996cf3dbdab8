"""LLaMA as three pure functions for layer-wise steps; together they compute what `Llama` does."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from galore_jax.models.layers import Rotation, attention_mask, constrain, embedding, rms_norm
from galore_jax.models.llama import Block, LlamaConfig
from galore_jax.models.loss import chunked_next_token_loss
from galore_jax.types import PyTree

Batch = dict[str, jax.Array]


def embed(config: LlamaConfig, params: PyTree, batch: Batch) -> tuple[jax.Array, Any]:
    """The activations before the first block, and the rotation and mask that every block takes."""
    lookup = embedding(config.vocab_size, config)
    x: Any = lookup.apply({"params": params["embed_tokens"]}, batch["tokens"])
    rotation = config.rotation_at(batch["positions"])
    mask = attention_mask(batch["segments"], config.sliding_window)
    return constrain(x, "batch").astype(config.dtype), (rotation, mask)


def block(
    config: LlamaConfig,
    params: PyTree,
    x: jax.Array,
    block_inputs: tuple[Rotation, jax.Array],
) -> jax.Array:
    """One block, with parameters that have no layer axis."""
    return Block(config, remat_parts=True).apply({"params": params}, x, *block_inputs)[0]


def head_loss(
    config: LlamaConfig, params: PyTree, x: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The mean loss per target in nats, and the number of targets, without forming all logits.

    `batch["divisor"]` (B,), if there is one, replaces the number of targets in the mean: with that
    of all micro-batches, divided by how many these are, their mean is that over all targets.
    """
    normed: Any = rms_norm(config).apply({"params": params["norm"]}, x)
    if config.tie_embeddings:
        head = nn.meta.unbox(params["embed_tokens"])["embedding"].T
    else:
        head = nn.meta.unbox(params["lm_head"])["kernel"]
    loss, targets = chunked_next_token_loss(constrain(normed, "batch"), head, batch["targets"])
    divisor = batch["divisor"][0] if "divisor" in batch else targets
    return loss / jnp.where(divisor > 0, divisor, 1), targets
