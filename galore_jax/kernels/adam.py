"""Adam (arXiv 1412.6980, algorithm 1) on moments in 8-bit codes (arXiv 2110.02861)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.kernels.parts import equal_parts
from galore_jax.quantization import Quantized, dequantize, quantize

# Numbers whose moments exist in float32 at a time.
MOST_AT_A_TIME = 2**20


class Factors(NamedTuple):
    """The numbers of one step, float32 scalars.

    Attributes:
      b1: decay of the first moment.
      rest1: `1 - b1`.
      b2: decay of the second moment.
      rest2: `1 - b2`.
      bias1: `1 - b1ᵗ`.
      bias2: `1 - b2ᵗ`.
      eps: added to the root of the second moment.
    """

    b1: Any
    rest1: Any
    b2: Any
    rest2: Any
    bias1: Any
    bias2: Any
    eps: Any


def adam_8bit(
    gradient: jax.Array, mu: Quantized, nu: Quantized, count: Any, *, b1: Any, b2: Any, eps: Any
) -> tuple[jax.Array, Quantized, Quantized]:
    """One step of `optax.scale_by_adam`; the update comes of the moments before they are rounded.

    Args:
      gradient: floating, one axis or more.
      mu: first moment, of the gradient's shape, in the code "signed".
      nu: second moment, of the gradient's shape, in the code "unsigned".
      count: int32 scalar, the number of this step from 1 on.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      The update in float32, of the gradient's shape, and the new moments.
    """
    given, numbers = (gradient.astype(jnp.float32), mu, nu), factors(count, b1, b2, eps)
    flat = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), given)
    rows = flat[0].shape[0]
    size = rows // equal_parts(rows, gradient.size, MOST_AT_A_TIME)

    def part(i: jax.Array, done: Any) -> Any:
        cut = lambda array: lax.dynamic_slice_in_dim(array, i * size, size)  # noqa: E731
        gradient, mu, nu = jax.tree.map(cut, done)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0)
        return jax.tree.map(put, done, step(gradient, mu, nu, numbers))

    # The update takes the place of the gradient.
    flat = lax.fori_loop(0, rows // size, part, flat)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), flat, given)


def factors(count: Any, b1: Any, b2: Any, eps: Any) -> Factors:
    """Of the step number `count`, from 1 on."""
    numbers = (b1, 1 - b1, b2, 1 - b2, 1 - b1**count, 1 - b2**count, eps)
    return Factors(*(jnp.asarray(number, jnp.float32) for number in numbers))


def step(
    gradient: jax.Array, mu: Quantized, nu: Quantized, factors: Factors
) -> tuple[jax.Array, Quantized, Quantized]:
    """`adam_8bit` with its numbers given."""
    gradient = gradient.astype(jnp.float32)
    m = factors.b1 * dequantize(mu) + factors.rest1 * gradient
    v = factors.b2 * dequantize(nu) + factors.rest2 * jnp.square(gradient)
    update = (m / factors.bias1) / (jnp.sqrt(v / factors.bias2) + factors.eps)
    return update, quantize(m, mu.code), quantize(v, nu.code)
