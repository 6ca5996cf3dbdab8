"""The projected product: a matrix product whose backward pass gives coordinates.

For `y = x W` with W (in, out), all tokens flattened, the gradient is `G = xᵀ dy`, and its
coordinates in a basis P are `PᵀG = (x P)ᵀ dy` (left) or `G P = xᵀ (dy P)` (right): exactly those
that projecting G would give, up to rounding, for `tokens · r · (in + out)` multiplications in place
of `tokens · in · out`, and G is never formed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.projection import Basis, Side
from galore_jax.quantization import dequantize

# What an axis is, "batch", "in" or "out" of the matrix view, and its place among those of its kind.
Axis = tuple[str, int]
Axes = tuple[Axis, ...]
# As `lax.dot_general` has them, of x and the kernel: (contracting, contracting), (batch, batch).
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Tracked:
    """A projected parameter on its way through a loss, from its leaf to its products.

    Attributes:
      array: the parameter as it is by now: cast, transposed, cut along its batch axes.
      vectors: of its basis by side, `(*batch, in or out, r)`, cut in the same way.
      coordinates: zeros `(*batch, rows, columns)`, cut in the same way; the derivative of projected
        products alone depends on them.
      axes: static; what each axis of `array` is. The axes of one kind, in the order of their
        places, are the batch, the in side or the out side of the other arrays.
      leaf: static; the number of the parameter's leaf.
    """

    array: Any
    vectors: dict[Side, Any]
    coordinates: Any
    axes: Axes = field(metadata={"static": True})
    leaf: int = field(metadata={"static": True})


def track(leaf: int, array: Any, basis: Basis, coordinates: Any) -> Tracked:
    """A parameter as it enters the loss."""
    view = basis.projection.view
    kinds = {"batch": view.batch_axes, "in": view.in_axes, "out": view.out_axes}
    what = {axis: (kind, i) for kind, axes in kinds.items() for i, axis in enumerate(axes)}
    axes = tuple(what[axis] for axis in range(len(view.shape)))
    return Tracked(array, basis.vectors, coordinates, axes, leaf)


def projected_product(
    dot: Callable[[Any, Any], jax.Array],
    x: jax.Array,
    kernel: Tracked,
    numbers: DimensionNumbers,
    kernel_first: bool,
) -> jax.Array | None:
    """`dot(x, kernel.array)`, whose backward pass gives dx and the coordinates.

    Args:
      dot: the product; it is differentiated by x. The coordinates are those of the plain product,
        from which it may differ by rounding alone.
      x: activations.
      kernel: the projected parameter.
      numbers: dimension numbers of the product.
      kernel_first: whether the axes of the kernel precede those of x in the result.

    Returns:
      The product; None if it does not contract the in side or the out side of the kernel, all of it
      and nothing else.
    """
    layout = _layout(kernel.axes, x.ndim, numbers, kernel_first)
    if layout is None:
        return None
    coordinates = varying_as(kernel.coordinates, x, kernel.array)
    return _product(dot, layout, x, lax.stop_gradient(kernel.array), kernel.vectors, coordinates)


def varying_as(array: jax.Array, *others: Any) -> jax.Array:
    """An array that shard_map's checks take for different on every device, as one of the others is.

    Of the same array a derivative is summed over the devices.
    """
    axes = [set(jax.typeof(one).manual_axis_type.varying) for one in (array, *others)]
    return lax.pcast(array, tuple(set().union(*axes) - axes[0]), to="varying")


class _Layout(NamedTuple):
    """What the axes of x and of the result are: of the kernel's kinds, or "token".

    Attributes:
      x_axes: of x.
      y_axes: of the result.
      contracts_in: whether the product contracts the in side, else the out side.
    """

    x_axes: Axes
    y_axes: Axes
    contracts_in: bool


def _layout(
    axes: Axes, x_ndim: int, numbers: DimensionNumbers, kernel_first: bool
) -> _Layout | None:
    (x_contracting, contracting), (x_batch, batch) = numbers
    summed = {axes[i] for i in contracting}
    sides = [{axis for axis in axes if axis[0] == side} for side in ("in", "out")]
    if summed not in sides or any(axes[i][0] != "batch" for i in batch):
        return None
    shared = dict(zip((*x_contracting, *x_batch), (*contracting, *batch), strict=True))
    x_axes = tuple(axes[shared[i]] if i in shared else ("token", i) for i in range(x_ndim))
    tokens = [axis for axis in x_axes if axis[0] == "token"]
    rest = [axis for i, axis in enumerate(axes) if i not in shared.values()]
    y_axes = [*(axes[i] for i in batch), *(rest + tokens if kernel_first else tokens + rest)]
    return _Layout(x_axes, tuple(y_axes), summed == sides[0])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dot: Any, layout: _Layout, x: Any, kernel: Any, vectors: Any, coordinates: Any) -> Any:
    del layout, vectors, coordinates
    return dot(x, kernel)


def _forward(dot, layout, x, kernel, vectors, coordinates):
    del layout
    return dot(x, kernel), (x, kernel, vectors, jnp.zeros_like(coordinates, shape=()))


def _backward(dot, layout, saved, upstream):
    x, kernel, vectors, like = saved
    (dx,) = jax.vjp(lambda x: dot(x, kernel), x)[1](upstream)
    x, upstream = lax.optimization_barrier((x, upstream))
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    inner, x_batch = _matrices(x.astype(dtype), layout.x_axes)
    # A batch axis of the kernel that x lacks is one of the result.
    outer, batch = _matrices(upstream.astype(dtype), layout.y_axes)
    sides = [(inner, x_batch), (outer, batch)]
    (rows, row_batch), (columns, column_batch) = sides if layout.contracts_in else sides[::-1]
    if "left" in vectors:
        rows, row_batch = _in_basis(rows, row_batch, vectors["left"], batch), batch
    if "right" in vectors:
        columns, column_batch = _in_basis(columns, column_batch, vectors["right"], batch), batch
    # It contracts the tokens of both as they lie: of a transpose XLA would make the product
    # Pᵀ xᵀ, which takes twice the time on CPUs.
    coordinates = _einsum(f"{row_batch}ta,{column_batch}tc->{batch}ac", rows, columns)
    return dx, None, None, coordinates.astype(like.dtype)


_product.defvjp(_forward, _backward)


def _matrices(array: jax.Array, axes: Axes) -> tuple[jax.Array, str]:
    """An array as matrices of tokens, `(*batch, tokens, n)`, and a letter for each batch axis."""
    batch, tokens, side = (
        sorted((i for i, (kind, _) in enumerate(axes) if kind in kinds), key=axes.__getitem__)
        for kinds in (("batch",), ("token",), ("in", "out"))
    )
    sizes = [math.prod(array.shape[i] for i in part) for part in (tokens, side)]
    shape = (*(array.shape[i] for i in batch), *sizes)
    letters = "".join(chr(ord("A") + axes[i][1]) for i in batch)
    return array.transpose(*batch, *tokens, *side).reshape(shape), letters


def _in_basis(matrices: jax.Array, own_batch: str, vectors: Any, batch: str) -> jax.Array:
    vectors = dequantize(vectors).astype(matrices.dtype)
    product = _einsum(f"{own_batch}tn,{batch}nr->{batch}tr", matrices, vectors)
    return product.astype(matrices.dtype)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
