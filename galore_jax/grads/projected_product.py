"""The projected product: a matrix product whose backward pass gives coordinates.

For `y = x W` with W (in, out) and all tokens flattened, the gradient is `G = xᵀ dy`, and its
coordinates in a basis P are `PᵀG = (x P)ᵀ dy` (left) or `G P = xᵀ (dy P)` (right): exactly what
projecting G gives, up to rounding, for `tokens · r · (in + out)` multiplications in place of
`tokens · in · out`, and G is never formed.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.grads.tracked import BATCH, IN, OUT, TOKEN, Tracked, kind
from galore_jax.ops.partition import explicit_mesh, specs_of, with_auto_axes
from galore_jax.ops.precision import promoted
from galore_jax.ops.quantization import dequantize

# As for `lax.dot_general`, of x and the parameter: (contracting, contracting), (batch, batch).
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def projected_product(
    dot: Callable[[Any, Any], jax.Array],
    x: jax.Array,
    parameter: Tracked,
    numbers: DimensionNumbers,
    parameter_first: bool,
    precision: Any,
) -> jax.Array | None:
    """`dot(x, parameter.array)`, whose backward pass gives dx and the coordinates.

    Args:
      dot: the product; it is differentiated with respect to x. The coordinates are those of the
        plain product, from which it may differ by rounding only.
      x: activations, with any axes of tokens besides those that the product contracts or batches.
      parameter: the projected parameter.
      numbers: dimension numbers of the product.
      parameter_first: whether the axes of the parameter precede those of x in the result.
      precision: that of the product, as in `lax.dot_general`.

    Returns:
      The product; None unless it contracts the whole in side or the whole out side of the
      parameter, and nothing of the other side.
    """
    (x_contracting, contracting), (x_batch, batch) = numbers
    axes = parameter.axes
    contracted = sorted(axes[i] for i in contracting if kind(axes[i]) != BATCH)
    sides = [[axis for axis in sorted(axes) if kind(axis) == side] for side in (IN, OUT)]
    if contracted not in sides or any(kind(axes[i]) != BATCH for i in batch):
        return None
    # Label the axes of x and of the result with the letters of the parameter's axes.
    shared = dict(zip((*x_contracting, *x_batch), (*contracting, *batch), strict=True))
    x_axes = [axes[shared[i]] if i in shared else TOKEN for i in range(x.ndim)]
    kept = [axis for i, axis in enumerate(axes) if i not in shared.values()]
    tokens = [TOKEN] * x_axes.count(TOKEN)
    y_axes = [axes[i] for i in batch] + (kept + tokens if parameter_first else tokens + kept)
    # An algorithm of another type than a precision is one for the types of this product.
    precision = precision if isinstance(precision, tuple) else None
    contracts_in = contracted == sides[0]
    layout = _Layout("".join(x_axes), "".join(y_axes), contracts_in, precision)
    coordinates = varying_as(parameter.coordinates, x, parameter.array)
    if explicit_mesh((x, parameter.array)) is not None:
        layout = layout._replace(coordinates=specs_of(coordinates))
    return _product(dot, layout, x, parameter.array, parameter.vectors, coordinates)


def varying_as(array: jax.Array, *others: Any) -> jax.Array:
    """An array marked as varying over the mesh axes over which one of the others varies.

    Inside `jax.shard_map`, the derivative of an array that is marked as the same on all devices is
    summed over them.
    """
    axes = [set(jax.typeof(one).manual_axis_type.varying) for one in (array, *others)]
    return lax.pcast(array, tuple(set().union(*axes) - axes[0]), to="varying")


class _Layout(NamedTuple):
    """The axes of x and of the result, whether the product contracts the in side, its precision.

    On a mesh with Explicit axes, also the sharding type of the coordinates.
    """

    x_axes: str
    y_axes: str
    contracts_in: bool
    precision: tuple[Any, Any] | None
    coordinates: PartitionSpec | None = None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dot: Any, layout: _Layout, x: Any, array: Any, vectors: Any, coordinates: Any) -> Any:
    del layout, vectors, coordinates
    return dot(x, array)


def _forward(dot, layout, x, array, vectors, coordinates):
    del layout
    return dot(x, array), (x, array, vectors, jnp.zeros_like(coordinates, shape=()))


def _backward(dot, layout, residuals, dy):
    x, array, vectors, like = residuals
    (dx,) = jax.vjp(lambda x: dot(x, array), x)[1](dy)

    coordinates = partial(_coordinates, layout, array.dtype)
    x, dy = lax.optimization_barrier((x, dy))
    value = with_auto_axes(coordinates, x, dy, vectors, out=lambda: layout.coordinates)
    return dx, None, None, value.astype(like.dtype)


def product_dtype(dtype: Any) -> Any:
    """The dtype in which coordinates are computed from operands of this one.

    That is float32 for 8 bits, and for float16, in whose range neither every gradient nor every
    product with a basis is.
    """
    dtype = jnp.dtype(dtype)
    return jnp.float32 if dtype.itemsize == 1 or dtype == jnp.float16 else dtype


# Layers of equal shapes share one trace, which is inlined.
@partial(jax.jit, static_argnames=("layout", "dtype"), inline=True)
def _coordinates(layout: _Layout, dtype: Any, x: Any, dy: Any, vectors: Any) -> jax.Array:
    """The coordinates of the gradient `xᵀ dy`, or `dyᵀ x`, of a parameter with this dtype."""
    # x and dy as batches of matrices of tokens.
    dtype = promoted(product_dtype(x.dtype), product_dtype(dtype))
    einsum = partial(_einsum, layout.precision)
    inputs = _matrices(x.astype(dtype), layout.x_axes)
    outputs = _matrices(dy.astype(dtype), layout.y_axes)
    batch = "".join(sorted({*inputs[1], *outputs[1]}))  # Each is in x, in the result, or in both.
    rows, columns = (inputs, outputs) if layout.contracts_in else (outputs, inputs)
    if "left" in vectors:
        rows = _in_basis(einsum, *rows, vectors["left"], batch)
    if "right" in vectors:
        columns = _in_basis(einsum, *columns, vectors["right"], batch)
    # Both operands keep their tokens where they are: given a transpose, XLA would compute Pᵀ xᵀ,
    # which takes twice the time on CPUs.
    coordinates = einsum(f"{rows[1]}ta,{columns[1]}tc->{batch}ac", rows[0], columns[0])
    return jnp.real(coordinates)


_product.defvjp(_forward, _backward)


def _matrices(array: jax.Array, axes: str) -> tuple[jax.Array, str]:
    """An array as matrices `(*batch, tokens, n)`, and the letters of its batch axes."""
    array = array.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    batch = "".join(sorted(axis for axis in axes if axis < TOKEN))
    sizes, end = array.shape[len(batch) :], axes.count(TOKEN)
    shape = (*array.shape[: len(batch)], math.prod(sizes[:end]), math.prod(sizes[end:]))
    return array.reshape(shape), batch


def _in_basis(
    einsum: Any, matrices: jax.Array, axes: str, vectors: Any, batch: str
) -> tuple[jax.Array, str]:
    vectors = dequantize(vectors).astype(matrices.dtype)
    product = einsum(f"{axes}tn,{batch}nr->{batch}tr", matrices, vectors)
    return product.astype(matrices.dtype), batch


def _einsum(precision: Any, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = promoted(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=wide)
