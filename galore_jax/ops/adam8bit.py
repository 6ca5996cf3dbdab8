"""Adam (arXiv 1412.6980, algorithm 1) on moments in 8-bit codes (arXiv 2110.02861)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.ops.loops import by_parts
from galore_jax.ops.quantization import BLOCK, Quantized, dequantize, quantize

LARGEST = float(jnp.finfo(jnp.float32).max)
# Numbers whose moments exist in float32 at a time.
MAX_CHUNK = 2**20


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
    numbers = factors(count, b1, b2, eps)
    given = gradient.astype(jnp.float32), mu, nu

    def part(_: Any, own: Any) -> Any:
        gradient, mu, nu = own
        return step(gradient, mu, nu, numbers)

    # The update takes the place of the gradient.
    new = by_parts(part, as_rows(given), MAX_CHUNK)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), new, given)


def as_rows(moments: Any) -> Any:
    """Arrays and codes of one shape, and their scales, as matrices that blocks lie in the rows of.

    A vector is cut into blocks, if it holds a whole number of them.
    """
    shape = jax.tree.leaves(moments)[0].shape
    rows = math.prod(shape[:-1])
    if rows == 1 and shape[-1] % BLOCK == 0:
        rows = shape[-1] // BLOCK
    return jax.tree.map(lambda x: x.reshape(rows, -1), moments)


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
    # The square of a finite 1e30 is not: as the scale of its block it would be NaN for ever.
    v = jnp.where((v > LARGEST) & (jnp.abs(gradient) <= LARGEST), LARGEST, v)
    update = (m / factors.bias1) / (jnp.sqrt(v / factors.bias2) + factors.eps)
    return update, quantize(m, mu.code), quantize(v, nu.code)
