"""The dense layer of all models, with or without a low-rank adapter."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from galore_jax.models.adapters import KERNEL, A, Adapter, B
from galore_jax.ops.int8 import quantized, worth_int8

Weights = Literal["plain", "int8"]


class Dense(nn.Module):
    """`x kernel + bias`, with a kernel from N(0, initializer_range²) and a bias of 0.

    Attributes:
      features: size of the result's last axis.
      initializer_range: standard deviation of the initial kernel.
      dtype: of the parameters.
      result: dtype of the result; None: `dtype`.
      use_bias: whether there is a bias.
      weights: how the kernel is stored, "plain" or "int8".
      adapter: factors of low rank that are added to the kernel, which is then frozen, or that
        replace it; see `Adapter`.
    """

    features: int
    initializer_range: float
    dtype: Any
    result: Any = None
    use_bias: bool = False
    weights: Weights = "plain"
    adapter: Adapter | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (…, in) to (…, features)."""
        adapter, rows = self.adapter, x.shape[-1]
        result = self.dtype if self.result is None else self.result
        x = x.astype(self.dtype)
        y: Any = None
        if adapter is None or adapter.has_kernel:
            normal = normal_init(self.initializer_range, self.weights)
            kernel = self.param(KERNEL, normal, (rows, self.features), self.dtype)
            multiply = matmul if adapter is None else matmul_by_frozen
            y = multiply(x, kernel, result)
        if adapter is not None:
            rank = adapter.rank_of(rows, self.features)
            start_a, start_b = adapter.initializers(rank, self.initializer_range)
            a = self.param(A, start_a, (rows, rank), self.dtype)
            b = self.param(B, start_b, (rank, self.features), self.dtype)
            if adapter.dropout and self.has_rng("dropout"):
                x = nn.Dropout(adapter.dropout, deterministic=False)(x)
            added = matmul(matmul(x, a, self.dtype), b, result)
            y = added if y is None else y + adapter.scale_of(rank) * added
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return y


def normal_init(deviation: float, weights: Weights) -> Callable[..., Any]:
    """The initializer of a matrix from N(0, deviation²), stored as `weights` says."""
    normal = nn.initializers.normal(deviation)

    def in_int8(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
        array = normal(key, shape, dtype)
        return quantized(array) if worth_int8(shape) else array

    return in_int8 if weights == "int8" else normal


def galore_jax_product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """`x @ kernel`, (..., in) by (in, out), summed in float32 and returned in `dtype`.

    The derivative is written by hand for two reasons: the one that JAX derives forms the kernel's
    gradient as (out, in) and transposes it, which takes twice the time on CPUs, and it multiplies a
    float32 cotangent with a bfloat16 kernel in float32. Forward-mode differentiation is not
    supported.
    """
    return _matmul(x, kernel, dtype)


# grads/jaxpr.py recognises this product in a traced loss by the name of the jitted function.
matmul = jax.jit(galore_jax_product, static_argnums=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, dtype):
    return _dot(x, kernel, (x.ndim - 1,), (0,)).astype(dtype)


def _matmul_forward(x, kernel, dtype):
    return _matmul(x, kernel, dtype), (x, kernel)


def _matmul_backward(dtype, residuals, cotangent):
    x, kernel = residuals
    cotangent = cotangent.astype(kernel.dtype)
    tokens = tuple(range(x.ndim - 1))
    x_gradient = _dot(cotangent, kernel, (x.ndim - 1,), (1,)).astype(x.dtype)
    return x_gradient, _dot(x, cotangent, tokens, tokens).astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_by_frozen(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """`matmul` by a kernel that is not trained: its derivative is 0.

    The backward pass neither forms the kernel's gradient nor needs `x`.
    """
    return _dot(x, kernel, (x.ndim - 1,), (0,)).astype(dtype)


def _by_frozen_forward(x, kernel, dtype):
    # An empty array carries the dtype of x.
    return matmul_by_frozen(x, kernel, dtype), (kernel, jnp.empty(0, x.dtype))


def _by_frozen_backward(dtype, residuals, cotangent):
    kernel, empty = residuals
    cotangent = cotangent.astype(kernel.dtype)
    return _dot(cotangent, kernel, (cotangent.ndim - 1,), (1,)).astype(empty.dtype), None


matmul_by_frozen.defvjp(_by_frozen_forward, _by_frozen_backward)


def _dot(a, b, axes_of_a, axes_of_b):
    axes = ((axes_of_a, axes_of_b), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
