"""Numbers in fewer bits: block-wise 8-bit codes that keep an array's shape, stochastic rounding.

Along the last axis an array is cut into blocks of 256 numbers (arXiv 2110.02861, section 2.1). Of
each block the largest magnitude is kept in float32, and of each number a code for its fraction of
that. Three codes there are:

* "signed" and "unsigned", the dynamic codes of 8-bit optimizers (arXiv 2110.02861, section 2.2):
  seven decades, the fractions of each spaced evenly, twice as many in each as in the one below, so
  that small numbers keep digits. Beside zero one has 127 values below it and 128 above, the other
  255 above.
* "int8", 255 values evenly from -1 to 1.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

BLOCK = 256
DECADES = 7
Code = Literal["signed", "unsigned", "int8"]


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Quantized:
    """An array in 8-bit codes.

    Attributes:
      codes: uint8 (int8 of the code "int8"), the shape of the array.
      scales: float32 `(*shape[:-1], ⌈shape[-1] / 256⌉)`, the largest magnitude of each block; NaN
        where one of its numbers was not finite.
      code: static.
    """

    codes: Any
    scales: Any
    code: Code = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim


def quantize(x: jax.Array, code: Code, key: jax.Array | None = None) -> Quantized:
    """Each number as the code of the nearest value; of those halfway between two either.

    The error is at most half the distance of two values: 1/254 of the block's largest magnitude for
    "int8", and for the dynamic codes 0.45 / 2ⁿ of the number's decade in the n-th decade from below
    (n from 0, unsigned from 1). Zero stays zero. By "unsigned" no other number becomes zero, unless
    its fraction is below float32's normal numbers: what is nearer to zero becomes the least value,
    3.25e-7, for an update over the root of a second moment of zero would be many times too large. A
    block with a number that is not finite comes back as NaN.

    Args:
      x: real, one axis or more.
      code: which; "unsigned" for numbers that are not negative.
      key: for "int8" alone: round up or down at random, right on average.

    Returns:
      The codes and scales.

    Raises:
      ValueError: no such code, a key with a dynamic code, or a scalar.
    """
    if code not in get_args(Code):
        raise ValueError(f"quantize: the code must be one of {get_args(Code)}, not {code!r}.")
    if not jnp.ndim(x):
        raise ValueError("quantize: a scalar has no blocks; give an array of one axis or more.")
    if key is not None and code != "int8":
        raise ValueError(f'quantize: only the code "int8" rounds stochastically, not "{code}".')
    x = x.astype(jnp.float32)
    blocks = to_blocks(x)
    largest = largest_of_blocks(blocks)
    fractions = fractions_of(blocks, largest)
    if code == "int8":
        noise = 0.5 if key is None else jax.random.uniform(key, fractions.shape)
        codes = jnp.clip(jnp.floor(fractions * 127 + noise), -127, 127).astype(jnp.int8)
    else:
        codes = encode(fractions, signed=code == "signed").astype(jnp.uint8)
    return Quantized(from_blocks(codes, x.shape), largest.squeeze(-1), code)


def zeros_like(x: Any, code: Code) -> Quantized:
    """The codes of as many zeros as `x`, an array or its shape, has numbers."""
    blocks = -(-x.shape[-1] // BLOCK)
    scales = jnp.zeros((*x.shape[:-1], blocks), jnp.float32)
    dtype = jnp.int8 if code == "int8" else jnp.uint8
    return Quantized(jnp.full_like(x, 127 if code == "signed" else 0, dtype), scales, code)


def dequantize(x: Any) -> Any:
    """The array that a `Quantized` stands for, float32; anything else as it is."""
    if not isinstance(x, Quantized):
        return x
    blocks = to_blocks(x.codes)
    if x.code == "int8":
        fractions = blocks.astype(jnp.float32) / 127
    else:
        fractions = decode(blocks.astype(jnp.int32), signed=x.code == "signed")
    return from_blocks(fractions * x.scales[..., None], x.shape)


def as_float32(x: Any) -> jax.Array:
    """An array in float32, from whatever form it is stored in."""
    return dequantize(x).astype(jnp.float32)


def stored_like(x: jax.Array, stored: Any) -> Any:
    """An array in the form of another: its codes or its dtype."""
    return quantize(x, stored.code) if isinstance(stored, Quantized) else x.astype(stored.dtype)


def to_blocks(x: jax.Array) -> jax.Array:
    """`(..., n)` as `(..., blocks, 256)`, filled up with zeros; where n < 256 the block is n."""
    size = max(1, min(BLOCK, x.shape[-1]))
    missing = -x.shape[-1] % size
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_blocks`, to an array of this shape."""
    width = blocks.shape[-2] * blocks.shape[-1]
    return blocks.reshape(*shape[:-1], width)[..., : shape[-1]]


def largest_of_blocks(blocks: jax.Array) -> jax.Array:
    """Largest magnitudes along the last axis, which stays, as 1; NaN where one is not finite."""
    # On GPUs the largest of numbers and NaN is a number.
    sizes = jnp.where(jnp.isnan(blocks), jnp.inf, jnp.abs(blocks))
    largest = jnp.max(sizes, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


def fractions_of(blocks: jax.Array, largest: jax.Array) -> jax.Array:
    """Numbers over the largest of their block, 0 where that is 0."""
    return jnp.where(largest > 0, blocks / largest, 0)


def encode(fractions: jax.Array, *, signed: bool) -> jax.Array:
    """Dynamic codes of fractions, float32 from -1 (unsigned from 0) to 1, int32 in 0 to 255.

    The values lie in ascending order: code 127 of "signed", 0 of "unsigned" is zero, 255 is one.
    """
    spare = 0 if signed else 1
    size = jnp.abs(fractions)
    number = jnp.full(size.shape, 1 << spare, jnp.float32)  # of values in the decade
    power = jnp.full(size.shape, 10.0 ** (DECADES - 1), jnp.float32)
    for decade in range(1, DECADES):
        above = size >= _halfway(decade, spare)
        number = jnp.where(above, 1 << (decade + spare), number)
        power = jnp.where(above, 10.0 ** (DECADES - 1 - decade), power)
    place = jnp.floor((size * power - 0.1) * number * (1 / 0.9))
    index = number - spare + jnp.clip(place, 0, number - 1)
    index = jnp.where(size >= _halfway(DECADES, spare), (1 << (DECADES + spare)) - spare, index)
    least = _halfway(0, spare) if signed else jnp.finfo(jnp.float32).tiny
    index = jnp.where(size >= least, index, 0).astype(jnp.int32)
    if not signed:
        return index
    return 127 + jnp.where(fractions < 0, -jnp.minimum(index, 127), index)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """Fractions, float32, of dynamic codes, int32: the inverse of `encode`."""
    spare = 0 if signed else 1
    index = jnp.abs(codes - 127) if signed else codes
    number = jnp.full(index.shape, 1 << spare, jnp.int32)
    power = jnp.full(index.shape, 10.0 ** (1 - DECADES), jnp.float32)
    for decade in range(1, DECADES):
        above = index >= (1 << (decade + spare)) - spare
        number = jnp.where(above, 1 << (decade + spare), number)
        power = jnp.where(above, 10.0 ** (1 - DECADES + decade), power)
    place = (index + spare - number).astype(jnp.float32) + 0.5
    size = power * (0.1 + 0.9 * place / number.astype(jnp.float32))
    size = jnp.where(index == 0, 0.0, jnp.where(index >= 128 << spare, 1.0, size))
    if not signed:
        return jnp.where(codes == 255, 1.0, size)
    return jnp.where(codes < 127, -size, size)


def _value(decade: int, place: float, spare: int) -> float:
    """The value at a place of a decade, from 0 on."""
    if decade == DECADES:
        return 1.0
    return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (place + 0.5) / (1 << (decade + spare)))


def _halfway(decade: int, spare: int) -> float:
    """Halfway from the last value below a decade to its first."""
    below = _value(decade - 1, (1 << (decade - 1 + spare)) - 1, spare) if decade else 0.0
    return (below + _value(decade, 0, spare)) / 2
