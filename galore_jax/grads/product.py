"""The projected product: a matrix product whose backward pass gives coordinates.

For `y = x W` with W (in, out), all tokens flattened, the gradient is `G = xᵀ dy`, and its
coordinates in a basis P are `PᵀG = (x P)ᵀ dy` (left) or `G P = xᵀ (dy P)` (right): exactly those
that projecting G would give, up to rounding, for `tokens · r · (in + out)` multiplications in place
of `tokens · in · out`, and G is never formed.

Axes have letters, as in `jnp.einsum`: A, B, … are batch axes, a, b, … make up the in side in this
order, m, n, … the out side, and _ is an axis of tokens. So sorted axes are a batch of matrices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.quantization import dequantize
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Side

BATCH, IN, OUT, TOKEN = "A", "a", "m", "_"
# As `lax.dot_general` has them, of x and the kernel: (contracting, contracting), (batch, batch).
DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Tracked:
    """A projected parameter on its way through a loss, from its leaf to its products.

    Attributes:
      array: the parameter as it is by now: cast, transposed, cut along its batch axes.
      vectors: of its basis by side, `(*batch, in or out, r)`, the batch axes as those of `array`.
      coordinates: zeros `(*batch, rows, columns)`, likewise; the derivative of projected products
        alone depends on them.
      axes: static; the letters of the axes of `array`, those of the batch in alphabetical order.
      leaf: static; the number of the parameter's leaf.
    """

    array: Any
    vectors: dict[Side, Any]
    coordinates: Any
    axes: str = field(metadata={"static": True})
    leaf: int = field(metadata={"static": True})


def track(leaf: int, array: Any, basis: Basis, coordinates: Any) -> Tracked:
    """A parameter as it enters the loss."""
    view = basis.projection.view
    sides = ((BATCH, view.batch_axes), (IN, view.in_axes), (OUT, view.out_axes))
    letters = {axis: chr(ord(kind) + i) for kind, axes in sides for i, axis in enumerate(axes)}
    axes = "".join(letters[axis] for axis in range(len(letters)))
    return Tracked(array, basis.vectors, coordinates, axes, leaf)


def kind(axis: str) -> str:
    """`BATCH`, `IN` or `OUT`, of a letter."""
    return BATCH if axis < TOKEN else IN if axis < OUT else OUT


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
      The product; None if it does not contract all of the in side or of the out side of the kernel,
      and nothing of the other.
    """
    (x_contracting, contracting), (x_batch, batch) = numbers
    summed = sorted(kernel.axes[i] for i in contracting if kind(kernel.axes[i]) != BATCH)
    sides = [[axis for axis in sorted(kernel.axes) if kind(axis) == side] for side in (IN, OUT)]
    if summed not in sides or any(kind(kernel.axes[i]) != BATCH for i in batch):
        return None
    shared = dict(zip((*x_contracting, *x_batch), (*contracting, *batch), strict=True))
    x_axes = [kernel.axes[shared[i]] if i in shared else TOKEN for i in range(x.ndim)]
    own = [axis for i, axis in enumerate(kernel.axes) if i not in shared.values()]
    tokens = [TOKEN] * x_axes.count(TOKEN)
    y_axes = [kernel.axes[i] for i in batch] + (own + tokens if kernel_first else tokens + own)
    layout = _Layout("".join(x_axes), "".join(y_axes), contracts_in=summed == sides[0])
    coordinates = varying_as(kernel.coordinates, x, kernel.array)
    return _product(dot, layout, x, kernel.array, kernel.vectors, coordinates)


def varying_as(array: jax.Array, *others: Any) -> jax.Array:
    """An array that shard_map's checks take for different on every device, as one of the others is.

    Of the same array a derivative is summed over the devices.
    """
    axes = [set(jax.typeof(one).manual_axis_type.varying) for one in (array, *others)]
    return lax.pcast(array, tuple(set().union(*axes) - axes[0]), to="varying")


class _Layout(NamedTuple):
    """The axes of x and of the result, and whether the product contracts the in side."""

    x_axes: str
    y_axes: str
    contracts_in: bool


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
    wide = [one.dtype if one.dtype.itemsize > 1 else jnp.float32 for one in (x, kernel)]
    dtype = jnp.promote_types(*wide)
    inner = _matrices(x.astype(dtype), layout.x_axes)
    outer = _matrices(upstream.astype(dtype), layout.y_axes)
    batch = "".join(sorted({*inner[1], *outer[1]}))  # Each is in x, in the result, or in both.
    rows, columns = (inner, outer) if layout.contracts_in else (outer, inner)
    if "left" in vectors:
        rows = _in_basis(*rows, vectors["left"], batch)
    if "right" in vectors:
        columns = _in_basis(*columns, vectors["right"], batch)
    # It contracts the tokens of both as they lie: of a transpose XLA would make the product
    # Pᵀ xᵀ, which takes twice the time on CPUs.
    coordinates = _einsum(f"{rows[1]}ta,{columns[1]}tc->{batch}ac", rows[0], columns[0])
    return dx, None, None, jnp.real(coordinates).astype(like.dtype)


_product.defvjp(_forward, _backward)


def _matrices(array: jax.Array, axes: str) -> tuple[jax.Array, str]:
    """An array as matrices of tokens, `(*batch, tokens, n)`, and the letters of its batch axes."""
    array = array.transpose(sorted(range(len(axes)), key=axes.__getitem__))
    batch = "".join(sorted(axis for axis in axes if axis < TOKEN))
    sizes, end = array.shape[len(batch) :], axes.count(TOKEN)
    shape = (*array.shape[: len(batch)], math.prod(sizes[:end]), math.prod(sizes[end:]))
    return array.reshape(shape), batch


def _in_basis(matrices: jax.Array, own: str, vectors: Any, batch: str) -> tuple[jax.Array, str]:
    vectors = dequantize(vectors).astype(matrices.dtype)
    product = _einsum(f"{own}tn,{batch}nr->{batch}tr", matrices, vectors)
    return product.astype(matrices.dtype), batch


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
