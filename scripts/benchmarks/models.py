"""LLaMA for the benchmarks: blocks alone, stacked or separate layers, two kinds of Dense.

And the same blocks in plain JAX, as a user might have written them.
"""

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
    """The parameters of the complete model, as plain arrays."""
    return Llama(config.plain).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


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


def init_plain(config: LlamaConfig) -> PyTree:
    """The parameters of blocks in plain JAX."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}

    def one(key: jax.Array) -> PyTree:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        kernels = {
            name: {"kernel": jax.random.normal(keys[name], shape) / shape[0] ** 0.5}
            for name, shape in shapes.items()
        }
        return kernels | {name: {"scale": jnp.ones(width)} for name in ("norm1", "norm2")}

    return [one(key) for key in jax.random.split(jax.random.key(0), config.num_layers)]


def plain_loss(config: LlamaConfig, params: PyTree, batch: tuple[jax.Array, jax.Array]):
    """Mean squared difference between the output of the blocks in plain JAX and a target."""
    x, target = batch
    block = jax.checkpoint(functools.partial(_plain_block, config.num_heads))
    for layer in params:
        x = block(layer, x)
    return jnp.mean((x - target).astype(jnp.float32) ** 2)


def _plain_block(heads: int, params: PyTree, x: jax.Array) -> jax.Array:
    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return wide.astype(x.dtype) * scale

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)

    y = norm(x, params["norm1"]["scale"])
    query, key, value = (split(dense(name, y)) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(causal, scores / query.shape[-1] ** 0.5, -1e30)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
    x = x + dense("out", mixed)
    y = norm(x, params["norm2"]["scale"])
    return x + dense("down", jax.nn.silu(dense("gate", y)) * dense("up", y))


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
