"""Block-wise quantisation to 8 or 4 bits that keeps an array's shape.

An array is divided into blocks of 256 numbers along its last axis (arXiv 2110.02861, section 2.1),
or along the axis before it, down the columns of a matrix. Each block stores its largest magnitude
in float32 and, for each number, a code for the number's fraction of that magnitude. There are four
codes:

* "signed" and "unsigned", the dynamic codes of 8-bit optimizers (arXiv 2110.02861, section 2.2).
  They cover seven decades, each with evenly spaced values, twice as many as in the decade below, so
  that small numbers keep some precision. "signed" has 127 negative values, zero and 128 positive
  values; "unsigned" has zero and 255 positive values.
* "int8" and "int4", 255 and 15 evenly spaced values from -1 to 1. Of the latter two share a byte.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from galore_jax.ops.partition import Partition

BLOCK = 256
DECADES = 7
Code = Literal["signed", "unsigned", "int8", "int4"]
# Of evenly spaced codes the largest, which stands for 1.
LARGEST = {"int8": 127, "int4": 7}


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Quantized:
    """An array in codes of 8 or 4 bits.

    Attributes:
      codes: uint8 (int8 for the code "int8"), the shape of the array; for "int4" the axis of the
        blocks is half as long: of each block a byte holds a number of the first half and one of the
        second.
      scales: float32, the largest magnitude in each block; NaN if a number in the block was not
        finite. The shape is that of the array with ⌈length / 256⌉ in place of the length of the
        axis of the blocks.
      code: static, the name of the code.
      axis: static, along which the blocks lie, -1 or -2.
      partition: static, of the codes over a mesh, if known. It divides no block.
      length: static, of the array's axis of the blocks, for "int4".
    """

    codes: Any
    scales: Any
    code: Code = field(metadata={"static": True})
    axis: int = field(default=-1, metadata={"static": True})
    partition: Partition | None = field(default=None, metadata={"static": True})
    length: int | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        if self.length is None:
            return self.codes.shape
        return _replaced(self.codes.shape, self.axis, self.length)


def quantize(x: jax.Array, code: Code, axis: int = -1) -> Quantized:
    """Quantises block-wise to the nearest values of a code; ties may go either way.

    The error is at most half the distance between neighbouring values: 1/254 of the block's largest
    magnitude for "int8", 1/14 for "int4", and for the dynamic codes 0.45 / 2ⁿ of the decade's upper
    end in the n-th decade from below (n starts at 0 for "signed", at 1 for "unsigned"). Zero stays
    zero. "unsigned" rounds other numbers up to its smallest value, 3.25e-7, unless they are
    subnormal: an update is divided by the root of the second moment, and would become far too
    large. A block with a number that is not finite is dequantised to NaN.

    Args:
      x: real, at least one axis.
      code: name of the code; "unsigned" is for non-negative numbers.
      axis: along which the blocks lie, -1 or -2.

    Returns:
      The codes and scales.
    """
    return quantize_blocks(to_blocks(x.astype(jnp.float32), axis), x.shape, code, axis)


def quantize_blocks(blocks: jax.Array, shape: tuple[int, ...], code: Code, axis: int) -> Quantized:
    """`quantize` of an array of this shape, given its blocks in float32."""
    max_magnitude = block_max(blocks, axis=axis)
    fractions = block_fractions(blocks, max_magnitude)
    scales = max_magnitude.squeeze(axis)
    if code in LARGEST:
        codes = jnp.floor(fractions * LARGEST[code] + 0.5).astype(jnp.int8)
    else:
        codes = encode(fractions, signed=code == "signed").astype(jnp.uint8)
    if code == "int4":
        return Quantized(_packed(codes, axis), scales, code, axis, length=shape[axis])
    return Quantized(from_blocks(codes, shape, axis), scales, code, axis)


def zeros_like(x: Any, code: Code, axis: int = -1) -> Quantized:
    """Quantised zeros with the shape of `x`, an array or a `jax.ShapeDtypeStruct`."""
    if code == "int4":
        return quantize(jnp.zeros(x.shape), code, axis)
    scales = jnp.zeros(_replaced(x.shape, axis, -(-x.shape[axis] // BLOCK)), jnp.float32)
    dtype = jnp.int8 if code == "int8" else jnp.uint8
    return Quantized(jnp.full_like(x, zero_code(code), dtype), scales, code, axis)


def dequantize(x: Any) -> Any:
    """The array that a `Quantized` represents, float32; anything else is returned unchanged."""
    if not isinstance(x, Quantized):
        return x
    return from_blocks(dequantize_blocks(x), x.shape, x.axis)


def dequantize_blocks(x: Quantized) -> jax.Array:
    """The blocks of the array that a `Quantized` represents, float32."""
    blocks = _unpacked(x) if x.code == "int4" else to_blocks(x.codes, x.axis, zero_code(x.code))
    if x.code in LARGEST:
        fractions = blocks.astype(jnp.float32) / LARGEST[x.code]
    else:
        fractions = decode(blocks.astype(jnp.int32), signed=x.code == "signed")
    return fractions * jnp.expand_dims(x.scales, x.axis)


def as_float32(x: Any) -> jax.Array:
    """Converts an array, quantised or of any dtype, to float32."""
    return dequantize(x).astype(jnp.float32)


def stored_like(x: jax.Array, stored: Any) -> Any:
    """Converts an array to the format of another one: its code and its blocks, or its dtype."""
    if not isinstance(stored, Quantized):
        return x.astype(stored.dtype)
    return replace(quantize(x, stored.code, stored.axis), partition=stored.partition)


def zero_code(code: Code) -> int:
    """The code of zero."""
    return 127 if code == "signed" else 0


def to_blocks(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
    """Divides an axis `n` into `(blocks, 256)`, filled up with a number.

    An axis shorter than 256 forms a single block of its own length.
    """
    size = block_size(x.shape[axis])
    missing = -x.shape[axis] % size
    if missing:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, missing)
        x = jnp.pad(x, widths, constant_values=fill)
    return _laid_out(x.reshape(_replaced(x.shape, axis, x.shape[axis] // size, size)), axis)


def block_size(length: int) -> int:
    """The numbers in a block of an axis of this length."""
    return max(1, min(BLOCK, length))


def _packed(blocks: jax.Array, axis: int) -> jax.Array:
    """int8 codes of 4 bits in blocks, as bytes: `(blocks, size)` becomes `blocks · ⌈size / 2⌉`."""
    half = -(-blocks.shape[axis] // 2)
    first, second = jnp.split(blocks, [half], axis)
    widths = [(0, 0)] * blocks.ndim
    widths[axis] = (0, half - second.shape[axis])
    codes = ((first & 15) | (jnp.pad(second, widths) << 4)).astype(jnp.uint8)
    return _merged(codes, axis)


def _unpacked(x: Quantized) -> jax.Array:
    """The inverse of `_packed`."""
    number = x.scales.shape[x.axis]
    half = x.codes.shape[x.axis] // max(number, 1)
    packed = x.codes.reshape(_replaced(x.codes.shape, x.axis, number, half))
    packed = lax.bitcast_convert_type(packed, jnp.int8)
    # Shifts of int8 keep the sign.
    codes = jnp.concatenate(((packed << 4) >> 4, packed >> 4), x.axis)
    size = min(block_size(x.shape[x.axis]), 2 * half)
    return _laid_out(lax.slice_in_dim(codes, 0, size, axis=codes.ndim + x.axis), x.axis)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Inverts `to_blocks`, given the shape of the array."""
    merged = _merged(_laid_out(blocks, axis), axis)
    return lax.slice_in_dim(merged, 0, shape[axis], axis=merged.ndim + axis)


def _merged(blocks: jax.Array, axis: int) -> jax.Array:
    """Merges the axis of the blocks, and that of their numbers, into one."""
    number, size = blocks.shape[axis - 1], blocks.shape[axis]
    shape = list(_replaced(blocks.shape, axis, number * size))
    del shape[axis - 1]
    return blocks.reshape(shape)


def _replaced(shape: tuple[int, ...], axis: int, *sizes: int) -> tuple[int, ...]:
    """The shape with other axes in place of one, which is counted from the end."""
    place = len(shape) + axis
    return (*shape[:place], *sizes, *shape[place + 1 :])


def _laid_out(blocks: jax.Array, axis: int) -> jax.Array:
    """Blocks `(..., rows, blocks, 256)` or `(..., blocks, 256, columns)`, laid out for a TPU.

    The numbers of a block lie below each other, so that neither the reshape nor the maximum nor the
    scale of a block moves numbers between lanes. Those of a column do so anyway, but without this
    constraint XLA divides the work on them into many passes.
    """
    if blocks.ndim < 3:
        return blocks
    *batch, first, second, third = range(blocks.ndim)
    order = (first, second, third) if axis == -2 else (second, third, first)
    on_tpu = lambda x: with_layout_constraint(x, Layout((*batch, *order)))
    return lax.platform_dependent(blocks, tpu=on_tpu, default=lambda x: x)


def block_max(blocks: jax.Array, *, axis: int = -1, keepdims: bool = True) -> jax.Array:
    """Largest magnitude along an axis; NaN if a number is not finite."""
    # On GPUs the maximum of numbers and NaN is a number.
    magnitudes = jnp.where(jnp.isnan(blocks), jnp.inf, jnp.abs(blocks))
    largest = jnp.max(magnitudes, axis=axis, keepdims=keepdims)
    return jnp.where(largest < jnp.inf, largest, jnp.nan)


def block_fractions(blocks: jax.Array, max_magnitude: jax.Array) -> jax.Array:
    """Numbers divided by the largest magnitude in their block; 0 where that is 0."""
    # XLA multiplies by the reciprocal, which is 0 for the largest numbers of float32.
    scale = jnp.where(max_magnitude > 2.0**64, 2.0**-64, 1.0)
    # Selected for a block, not for each number, for which a TPU would store a mask.
    divisor = jnp.where(max_magnitude > 0, max_magnitude * scale, jnp.inf)
    return blocks * scale / divisor


def encode(fractions: jax.Array, *, signed: bool) -> jax.Array:
    """Dynamic codes, int32 from 0 to 255, of float32 fractions from -1 ("unsigned": 0) to 1.

    Codes ascend with the values: zero is 127 for "signed" and 0 for "unsigned", and one is 255.
    """
    # Without a sign each decade has twice as many values.
    extra_bits = 0 if signed else 1
    magnitude = jnp.abs(fractions)

    # Find the decade: the number of its values, and the power of ten that maps it to [0.1, 1).
    count = jnp.full(magnitude.shape, 1 << extra_bits, jnp.float32)
    power = jnp.full(magnitude.shape, 10.0 ** (DECADES - 1), jnp.float32)
    for decade in range(1, DECADES):
        reached = magnitude >= _lower_bound(decade, extra_bits)
        count = jnp.where(reached, 1 << (decade + extra_bits), count)
        power = jnp.where(reached, 10.0 ** (DECADES - 1 - decade), power)

    # Find the value within the decade, then handle 1 and 0, which belong to none.
    position = ((magnitude * power - 0.1) * count * (1 / 0.9)).astype(jnp.int32)
    index = count - extra_bits + jnp.clip(position.astype(jnp.float32), 0, count - 1)
    is_one = magnitude >= _lower_bound(DECADES, extra_bits)
    index = jnp.where(is_one, (1 << (DECADES + extra_bits)) - extra_bits, index)
    min_nonzero = _lower_bound(0, extra_bits) if signed else jnp.finfo(jnp.float32).tiny
    index = jnp.where(magnitude >= min_nonzero, index, 0).astype(jnp.int32)
    if not signed:
        return index
    return 127 + jnp.where(fractions < 0, -jnp.minimum(index, 127), index)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """Float32 fractions of dynamic codes, int32: the inverse of `encode`."""
    extra_bits = 0 if signed else 1
    index = jnp.abs(codes - 127) if signed else codes

    # Find the decade of each code.
    count = jnp.full(index.shape, 1 << extra_bits, jnp.int32)
    power = jnp.full(index.shape, 10.0 ** (1 - DECADES), jnp.float32)
    for decade in range(1, DECADES):
        reached = index >= (1 << (decade + extra_bits)) - extra_bits
        count = jnp.where(reached, 1 << (decade + extra_bits), count)
        power = jnp.where(reached, 10.0 ** (1 - DECADES + decade), power)

    # Compute the value from its position in the decade.
    position = (index + extra_bits - count).astype(jnp.float32) + 0.5
    magnitude = power * (0.1 + 0.9 * position / count.astype(jnp.float32))
    magnitude = jnp.where(index == 0, 0.0, jnp.where(codes == 255, 1.0, magnitude))
    return jnp.where(codes < 127, -magnitude, magnitude) if signed else magnitude


def _lower_bound(decade: int, extra_bits: int) -> float:
    """The midpoint between the last value below a decade and its first value."""

    def value(decade: int, position: int) -> float:
        fraction = (position + 0.5) / (1 << (decade + extra_bits))
        return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * fraction)

    last = value(decade - 1, (1 << (decade - 1 + extra_bits)) - 1) if decade else 0.0
    return (last + (1.0 if decade == DECADES else value(decade, 0))) / 2
