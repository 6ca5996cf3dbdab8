"""Gradients that are born projected: a product whose backward pass gives coordinates.

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

from galore_jax.projection import Projection, Side
from galore_jax.quantization import dequantize

# As `lax.dot_general` takes them: ((contracting of x, of the kernel), (batch of x, of the kernel)).
Axes = Sequence[int]
DimensionNumbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]
Dot = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class ProjectedKernel:
    """Stands in a loss's parameters where a kernel stood, so that its gradient is born projected.

    Flax's layers read it as the kernel (see linen.py). Elsewhere `x @ it` and `dot_general` take
    it; anything else refuses it, since it is no array.

    Attributes:
      kernel: the parameter.
      vectors: of its basis, by side, `projection.basis_shapes`.
      coordinates: `projection.coordinates_shape`; the loss does not depend on them, but their
        derivative is the gradient's coordinates.
      projection: static. Where a model slices layers or experts off the leading axes of the
        arrays, it still describes the whole parameter.
      intact: True, `(*batch,)`. A loss that maps its parameters before it uses them, other than to
        half precision, makes it another type, and the gradient is then not to be born projected.
      inside: None, or the kernel that products use in place of `kernel`; it tells the two apart
        when uses of a kernel are looked for.
    """

    kernel: Any
    vectors: dict[Side, Any]
    coordinates: Any
    projection: Projection = field(metadata={"static": True})
    intact: Any
    inside: Any = None

    # For numpy's arrays to leave `x @ it` to `__rmatmul__`.
    __array_ufunc__ = None

    def __rmatmul__(self, x: Any) -> jax.Array:
        """`x @ kernel`, (..., in) by (in, out)."""
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, self.kernel.dtype))
        return dot_general(x, self, (((x.ndim - 1,), (0,)), ((), ())))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self.projection.name} stands in the loss as a ProjectedKernel, which has no {name}: "
            "multiply by it as x @ kernel or by galore_jax.dot_general, or give it the rule None."
        )

    # What flax.core.meta.AxisMetadata asks of a box around a parameter.

    def unbox(self) -> Any:
        """The kernel."""
        return self.kernel

    def replace_boxed(self, val: Any) -> Any:
        """A new value of the parameter is a plain one."""
        return val

    def add_axis(self, index: int, params: Any) -> "ProjectedKernel":
        """Layers are stacked in the arrays alone."""
        del index, params
        return self

    def remove_axis(self, index: int, params: Any) -> "ProjectedKernel":
        """As `add_axis`."""
        del index, params
        return self


def dot_general(
    x: jax.Array, kernel: Any, dimension_numbers: DimensionNumbers, *args: Any, **kwargs: Any
) -> jax.Array:
    """`lax.dot_general`, of arrays or of a `ProjectedKernel`: for models that are not Linen's.

    Args:
      x: activations.
      kernel: a parameter, as a loss gets it from `value_and_grad` or as it is.
      dimension_numbers: as for `lax.dot_general`; they contract the whole in axis or out axis of
        the kernel's matrix view.
      *args: of `lax.dot_general`.
      **kwargs: of `lax.dot_general`.

    Returns:
      The product.

    Example:
      >>> import jax.numpy as jnp
      >>> from galore_jax import dot_general
      >>> x, params = jnp.ones((2, 8)), {"w": jnp.ones((8, 16))}
      >>> dot_general(x, params["w"], (((1,), (0,)), ((), ()))).shape
      (2, 16)
    """
    if not isinstance(kernel, ProjectedKernel):
        return lax.dot_general(x, kernel, dimension_numbers, *args, **kwargs)
    dot = lambda x, kernel, numbers: lax.dot_general(x, kernel, numbers, *args, **kwargs)  # noqa: E731
    return projected_dot(kernel, x, kernel.kernel, dimension_numbers, dot)


def projected_dot(
    projected: ProjectedKernel,
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: DimensionNumbers,
    dot: Dot,
) -> jax.Array:
    """`dot(x, kernel, dimension_numbers)`, whose backward pass gives dx and the coordinates.

    A product that does not contract a whole side of the kernel's matrix view, or whose parameters
    were mapped, is left to `dot`, and the kernel's gradient to JAX.

    Args:
      projected: what stands for the kernel in the parameters.
      x: activations.
      kernel: its kernel, perhaps in another dtype.
      dimension_numbers: of the product.
      dot: computes it; it is differentiated by x. The coordinates are those of the plain product,
        so it may differ from that by rounding alone.

    Returns:
      The product.
    """
    layout = _layout(projected.projection, x.ndim, kernel.ndim, dimension_numbers)
    if layout is None or projected.intact.dtype not in (jnp.bool_, jnp.bfloat16, jnp.float16):
        return dot(x, kernel, dimension_numbers)
    if projected.inside is not None:
        kernel = projected.inside.astype(kernel.dtype)
    product = lambda x, kernel: dot(x, kernel, dimension_numbers)  # noqa: E731
    return _product(product, layout, x, kernel, projected.vectors, projected.coordinates)


class _Layout(NamedTuple):
    """How activations and upstream gradients read as matrices of tokens, `(*batch, tokens, n)`.

    Attributes:
      x_axes: of x: batch, tokens, the contracted side of the kernel, each in the view's order.
      y_axes: of the product: batch, tokens, the other side of the kernel.
      batch: number of batch axes.
      tokens: number of token axes.
      contracts_rows: whether the contracted side is the in side of the view.
    """

    x_axes: tuple[int, ...]
    y_axes: tuple[int, ...]
    batch: int
    tokens: int
    contracts_rows: bool

    def matrices(self, array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        moved = array.transpose(axes)
        tokens = math.prod(moved.shape[self.batch : self.batch + self.tokens])
        return moved.reshape(*moved.shape[: self.batch], tokens, -1)


def _layout(
    projection: Projection, x_ndim: int, kernel_ndim: int, dimension_numbers: DimensionNumbers
) -> _Layout | None:
    (x_contracting, contracting), (x_batch, batch) = dimension_numbers
    view = projection.view
    # Leading batch axes of the parameter that a scan or a vmap has taken off.
    taken = len(view.shape) - kernel_ndim
    if view.batch_axes[:taken] != tuple(range(taken)):
        return None
    rows, columns, own_batch = (
        tuple(axis - taken for axis in axes)
        for axes in (view.in_axes, view.out_axes, view.batch_axes[taken:])
    )
    if set(batch) != set(own_batch) or set(contracting) not in (set(rows), set(columns)):
        return None
    contracts_rows = set(contracting) == set(rows)
    inner, outer = (rows, columns) if contracts_rows else (columns, rows)
    tokens = tuple(a for a in range(x_ndim) if a not in (*x_contracting, *x_batch))
    batch_order = tuple(tuple(batch).index(axis) for axis in own_batch)
    x_axes = (
        *(x_batch[i] for i in batch_order),
        *tokens,
        *(x_contracting[tuple(contracting).index(axis)] for axis in inner),
    )
    # The product has the batch axes, those of the tokens, then the kernel's others in order.
    start, kept = len(batch), sorted(outer)
    y_axes = (
        *batch_order,
        *range(start, start + len(tokens)),
        *(start + len(tokens) + kept.index(axis) for axis in outer),
    )
    return _Layout(x_axes, y_axes, len(batch), len(tokens), contracts_rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    product: Dot, layout: _Layout, x: jax.Array, kernel: jax.Array, vectors: Any, coordinates: Any
) -> jax.Array:
    del layout, vectors, coordinates
    return product(x, kernel)


def _forward(product, layout, x, kernel, vectors, coordinates):
    del layout
    return product(x, kernel), (x, kernel, vectors, jnp.zeros_like(coordinates, shape=()))


def _backward(product, layout, saved, upstream):
    x, kernel, vectors, like = saved
    (dx,) = jax.vjp(lambda x: product(x, kernel), x)[1](upstream)
    x, upstream = lax.optimization_barrier((x, upstream))
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    inner = layout.matrices(x.astype(dtype), layout.x_axes)
    outer = layout.matrices(upstream.astype(dtype), layout.y_axes)
    rows, columns = (inner, outer) if layout.contracts_rows else (outer, inner)
    if "left" in vectors:
        rows = _in_basis(rows, vectors["left"])
    if "right" in vectors:
        columns = _in_basis(columns, vectors["right"])
    # Contracting the tokens of both as they lie: of a transpose XLA would make the product Pᵀ xᵀ,
    # which takes twice the time on CPUs.
    batch = tuple(range(layout.batch))
    numbers = (((layout.batch,), (layout.batch,)), (batch, batch))
    coordinates = lax.dot_general(rows, columns, numbers, preferred_element_type=jnp.float32)
    return dx, None, None, coordinates.astype(like.dtype)


_product.defvjp(_forward, _backward)


def _in_basis(matrices: jax.Array, vectors: Any) -> jax.Array:
    vectors = dequantize(vectors).astype(matrices.dtype)
    product = jnp.matmul(matrices, vectors, preferred_element_type=jnp.float32)
    return product.astype(matrices.dtype)
