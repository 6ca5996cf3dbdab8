"""Parameters in 8 bits: an `Int8` stands for an array wherever this package takes parameters.

Each row of a matrix, along the last axis, has integer codes from -127 to 127 and one scale, its
largest magnitude. There is no other copy of the parameter. An update dequantises some rows, adds in
float32, takes the scales from the new rows and rounds stochastically, so that no row saturates and
rounding is unbiased.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.loops import MAX_CHUNK, MAX_CHUNK_ON_GPU, map_chunks
from galore_jax.ops.noise import noise
from galore_jax.ops.quantization import LARGEST, block_fractions, block_max
from galore_jax.types import PyTree

# Shorter rows are not worth a scale of four bytes.
MIN_ROW = 32


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Int8:
    """A parameter in 8 bits, a pytree node that Flax takes for a box.

    A Flax module unboxes its parameters when it reads them, so that inside `nn.scan` and `nn.remat`
    only one layer is dequantised at a time. Other losses call `to_arrays` where they read it.

    Attributes:
      codes: int8, the shape of the array.
      scales: float32 `(*shape[:-1], 1)`, the largest magnitude in each row; NaN if a number of the
        row was not finite: then so is the array.
      dtype: static, of the array.
      place: None, or zeros with the shape and dtype of the array, to which the array's derivative
        belongs, as integers have none.
    """

    codes: Any
    scales: Any
    dtype: Any = field(metadata={"static": True})
    place: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def size(self) -> int:
        """Number of elements of the array."""
        return self.codes.size

    def unbox(self) -> jax.Array:
        """The array."""
        return _array(self.codes, self.scales, self.place, self.dtype)

    def replace_boxed(self, value: jax.Array) -> "Int8":
        """The same parameter with other values."""
        return quantized(value, self.dtype)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Int8":
        """Itself: `nn.scan` stacks its arrays."""
        del index, params
        return self

    remove_axis = add_axis

    def float32(self) -> jax.Array:
        """The array in float32, with 0 in rows whose largest magnitude is below 1.5e-36.

        Raises:
          TypeError: codes and scales are not integers and float32 any more.
        """
        if self.codes.dtype != jnp.int8 or self.scales.dtype != jnp.float32:
            raise TypeError(
                "the codes and scales of a parameter in 8 bits have been cast or computed with: "
                "call galore_jax.to_arrays before what maps over the leaves of parameters."
            )
        return self.codes.astype(jnp.float32) * (self.scales / LARGEST["int8"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled one."""
        _register_with_flax()
        self.__dict__.update(state)


def is_int8(node: Any) -> TypeGuard[Int8]:
    """Whether a node is an `Int8`, for the argument `is_leaf` of tree maps."""
    return isinstance(node, Int8)


def worth_int8(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape takes much less memory in 8 bits."""
    return len(shape) >= 2 and shape[-1] >= MIN_ROW


def to_arrays(params: PyTree) -> PyTree:
    """Parameters with the array, in its dtype, in place of each `Int8`."""
    array = lambda leaf: leaf.unbox() if is_int8(leaf) else leaf
    return jax.tree.map(array, params, is_leaf=is_int8)


def quantized(
    x: jax.Array, dtype: Any = None, seed: jax.Array | None = None, first: Any = 0
) -> Int8:
    """An array in 8 bits.

    Args:
      x: floating point, at least one axis.
      dtype: of the array that the result stands for; None: that of `x`.
      seed: two uint32; if given, numbers are rounded stochastically, unbiased up to 2^-17 of the
        distance between two codes, with random bits that depend only on the seed, the row and the
        column. None rounds to nearest.
      first: the number of the first row, if `x` is a part of a larger array.
    """
    _register_with_flax()
    dtype = x.dtype if dtype is None else dtype
    x = x.astype(jnp.float32)
    scales = block_max(x)
    fractions = block_fractions(x, scales)
    added = 0.5
    if seed is not None:
        bits = noise(seed, first, 0, (math.prod(x.shape[:-1]), x.shape[-1])).reshape(x.shape)
        added = (bits.astype(jnp.float32) + 0.5) * 2.0**-16
    largest = LARGEST["int8"]
    codes = jnp.clip(jnp.floor(fractions * largest + added), -largest, largest)
    return Int8(codes.astype(jnp.int8), scales, jnp.dtype(dtype))


def update_rows(
    param: Int8, new_rows: Callable[[Any, jax.Array], jax.Array], seed: jax.Array | None
) -> Int8:
    """A parameter after an update, of which only some rows exist in float32 at a time.

    On TPUs all of them do.

    Args:
      param: of any shape; "rows" are slices of its first axis.
      new_rows: from the index of the first of some rows, and these in float32, the new ones.
      seed: of stochastic rounding, as for `quantized`.
    """
    per_row = math.prod(param.shape[1:-1])

    def at_rows(first: Any, rows: Int8) -> Int8:
        return quantized(new_rows(first, rows.float32()), param.dtype, seed, first * per_row)

    by_chunks = partial(map_chunks, at_rows)
    return lax.platform_dependent(
        param,
        tpu=partial(at_rows, 0),  # Chunks take longer, by the compiler's estimate.
        cuda=partial(by_chunks, max_size=MAX_CHUNK_ON_GPU),
        default=partial(by_chunks, max_size=MAX_CHUNK),
    )


# Derivatives by parameters in 8 bits.


def places_of(params: PyTree) -> PyTree:
    """The arrays by which parameters are differentiated: see `place_of`."""
    return jax.tree.map(place_of, params, is_leaf=is_int8)


def with_places(params: PyTree, places: PyTree) -> PyTree:
    """Parameters whose derivatives are those of `places`."""
    return jax.tree.map(with_place, params, places, is_leaf=is_int8)


def place_of(param: Any) -> Any:
    """The array by which a parameter is differentiated: its own, or zeros in place of an `Int8`."""
    if not is_int8(param):
        return param
    return jnp.zeros(param.shape, param.dtype) if param.place is None else param.place


def with_place(param: Any, place: Any) -> Any:
    """A parameter whose derivative is that of the array `place`; see `place_of`."""
    return replace(param, place=place) if is_int8(param) else place


def galore_jax_array(codes: jax.Array, scales: jax.Array, place: Any, dtype: Any) -> jax.Array:
    """The array of an `Int8`."""
    array = Int8(codes, scales, dtype).float32().astype(dtype)
    return array if place is None else _with_derivative(array, place)


# grads/jaxpr.py recognises it in a traced loss by the name of the jitted function.
_array = jax.jit(galore_jax_array, static_argnums=3)


@jax.custom_vjp
def _with_derivative(array: jax.Array, place: jax.Array) -> jax.Array:
    """The array; its derivative is that of `place`, whose values are not used."""
    del place
    return array


_with_derivative.defvjp(lambda array, place: (array, None), lambda _, dy: (None, dy))


@functools.cache
def _register_with_flax() -> None:
    try:
        from flax.core.meta import AxisMetadata
    except ImportError:
        return
    AxisMetadata.register(Int8)
