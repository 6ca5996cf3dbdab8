"""LLaMA for the benchmarks: blocks alone, stacked or separate layers, two kinds of Dense."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from galore_jax.models import dense
from galore_jax.models.layers import attention_mask
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss
from galore_jax.types import PyTree


def init_llama(config: LlamaConfig) -> PyTree:
    """The parameters of the complete model."""
    return Llama(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def separate_layers(params: PyTree) -> PyTree:
    """The parameters with a list of layers instead of stacked ones."""
    stacked = params["layers"]
    number = len(jax.tree.leaves(stacked)[0])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(number)]
    return {**params, "layers": layers}


def blocks_loss(config: LlamaConfig, params: PyTree, batch: tuple[jax.Array, jax.Array]):
    """Mean squared difference between the output of the blocks and a target."""
    x, target = batch
    return jnp.mean((_run_layers(config, params["layers"], x) - target) ** 2)


def llama_loss(config: LlamaConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token."""
    model = Llama(config)
    embed = lambda model, tokens: model.embed_tokens(tokens)
    head = lambda model, x: model.lm_head(model.norm(x))
    x = model.apply({"params": params}, tokens, method=embed)
    x = _run_layers(config, params["layers"], x)
    logits: Any = model.apply({"params": params}, x, method=head)
    total, targets = next_token_loss(logits, jnp.roll(tokens, -1, axis=1).at[:, -1].set(-1))
    return total / targets


def with_dense(kind: str, loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss with Dense layers of this kind.

    Args:
      kind: "flax", with the derivative that JAX makes of the product; or "galore_jax", with the
        hand-written one, which on CPUs saves XLA a transposition of the weight's gradient.
      loss: a loss of a LLaMA.

    Returns:
      The loss.
    """

    @functools.wraps(loss)
    def run(*arguments: Any) -> jax.Array:
        as_in_flax = mock.patch.object(dense, "matmul", _multiply_as_flax)
        with as_in_flax if kind == "flax" else nullcontext():
            return loss(*arguments)

    return run


def _multiply_as_flax(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    axes = (x.ndim - 1,), (0,)
    return jax.lax.dot_general(x, kernel, (axes, ((), ()))).astype(dtype)


def _run_layers(config: LlamaConfig, layers: PyTree, x: Any) -> Any:
    # Computed once, as arrays. With separate layers XLA would otherwise compute all cosines again
    # for every head, in the forward and the backward pass.
    with jax.ensure_compile_time_eval():
        positions = jnp.arange(x.shape[1])[None]
        rotation = config.rotation_at(positions)
        mask = attention_mask(jnp.ones_like(positions))
    run = lambda model, x: model.layers(x, rotation, mask, None, 0)[0]
    if isinstance(layers, list):
        config = replace(config, num_layers=1)
        stacks = [jax.tree.map(lambda leaf: leaf[None], layer) for layer in layers]
    else:
        stacks = [layers]
    for stack in stacks:
        x = Llama(config).apply({"params": {"layers": stack}}, x, method=run)
    return x
