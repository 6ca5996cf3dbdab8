"""Projected parameters inside a loss, and their products, whose backward pass gives coordinates.

For `y = x W` with W (in, out) and all tokens flattened, the gradient is `G = xᵀ dy`, and its
coordinates in a basis P are `PᵀG = (x P)ᵀ dy` (left) or `G P = xᵀ (dy P)` (right): exactly what
projecting G gives, up to rounding, for `tokens · r · (in + out)` multiplications in place of
`tokens · in · out`, and G is never formed.

The axes of a tracked array have letters, as in `jnp.einsum`: A, B, … are batch axes, a, b, … make
up the in side in this order, m, n, … the out side. Sorted by letter, the axes are a batch of
matrices. An operation that moves or selects whole matrices of the array does the same to the stacks
of basis vectors and coordinates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from galore_jax.ops.partition import explicit_mesh, specs_of, with_auto_axes
from galore_jax.ops.precision import promoted
from galore_jax.ops.quantization import dequantize
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Side

# The first letter of each kind of axis, and the mark of the axes of tokens in a product; in this
# order by character code, A < _ < a < m, by which the axes are sorted.
KINDS = BATCH, IN, OUT = "A", "a", "m"
TOKEN = "_"


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Tracked:
    """A projected parameter inside a loss.

    Attributes:
      array: the parameter at this point of the loss: cast, transposed, sliced.
      vectors: basis vectors by side, `(*batch, in or out, r)`, with the batch axes of `array`, and
        the rows for those of its rows or columns that are left.
      coordinates: zeros `(*batch, rows, columns)`, likewise. No value depends on them, but
        projected products declare the projected gradient to be their derivative.
      axes: static; the letters of the axes of `array`, batch axes in alphabetical order.
      path: static; the names of the parameter's path.
      divided: static; mesh axes over which a `shard_map` inside the loss may have divided it.
      uncast: None, or the array in another dtype, of which `array` is a cast.
    """

    array: Any
    vectors: dict[Side, Any]
    coordinates: Any
    axes: str = field(metadata={"static": True})
    path: tuple[str, ...] = field(metadata={"static": True})
    divided: tuple[str, ...] = field(default=(), metadata={"static": True})
    uncast: Any = None

    def with_array(self, array: Any, uncast: Any = None) -> "Tracked":
        """The same matrices, tracked as before, as another array."""
        return replace(self, array=array, uncast=uncast)

    def operand(self) -> jax.Array:
        """The array, for a product: on a TPU cast while it is read, rather than once for all.

        There XLA casts in the kernel of a product for nothing, and a backward pass needs no memory
        for the cast weights. Without the barrier, XLA would cast once for all after all.
        """
        array, uncast = self.array, self.uncast
        if uncast is None:
            return array
        cast_again = lambda array, uncast: lax.optimization_barrier(uncast).astype(array.dtype)
        first = lambda array, uncast: array
        return lax.platform_dependent(array, uncast, tpu=cast_again, default=first)


def track(array: Any, basis: Basis, coordinates: Any) -> Tracked:
    """A parameter as it enters the loss."""
    view = basis.projection.view
    sides = ((BATCH, view.batch_axes), (IN, view.in_axes), (OUT, view.out_axes))
    letters = {axis: chr(ord(kind) + i) for kind, axes in sides for i, axis in enumerate(axes)}
    axes = "".join(letters[axis] for axis in range(len(letters)))
    return Tracked(array, basis.vectors, coordinates, axes, basis.projection.path)


def kind(axis: str) -> str:
    """The kind of an axis, `BATCH`, `TOKEN`, `IN` or `OUT`, from its name."""
    return max(first for first in (BATCH, TOKEN, IN, OUT) if first <= axis)


def moved(
    value: Tracked, array: Any, axes: Sequence[str], change: Callable[[jax.Array], jax.Array]
) -> Tracked:
    """A tracked value after an operation.

    Args:
      value: before it.
      array: the result of the operation on `value.array`.
      axes: for each axis of the result a string that begins with a letter of its kind; the strings
        of a side, sorted, have the order of the axes in the matrix.
      change: what the operation does to stacks `(*batch, n, r)`.

    Returns:
      The tracked result, whose letters are consecutive again.
    """
    order = {i: (kind(axis), i if kind(axis) == BATCH else axis) for i, axis in enumerate(axes)}
    precedes = lambda i, j: order[j][0] == order[i][0] and order[j] < order[i]
    letters = [chr(ord(order[i][0]) + sum(precedes(i, j) for j in order)) for i in order]
    vectors, coordinates = jax.tree.map(change, (value.vectors, value.coordinates))
    axes = "".join(letters)
    value = value.with_array(array)
    return replace(value, vectors=vectors, coordinates=coordinates, axes=axes)


def projected_product(
    dot: Callable[..., jax.Array],
    x: jax.Array,
    parameter: Tracked,
    numbers: Any,
    parameter_first: bool,
    precision: Any,
) -> jax.Array | None:
    """`dot(x, parameter.array)`, whose backward pass gives dx and the coordinates.

    Args:
      dot: the product; it is differentiated with respect to x. The coordinates are those of the
        plain product, from which it may differ by rounding only.
      x: activations; the axes that the product neither contracts nor batches are tokens.
      parameter: the projected parameter.
      numbers: as for `lax.dot_general`, of x and the parameter.
      parameter_first: whether the axes of the parameter precede those of x in the result.
      precision: as for `lax.dot_general`.

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
    x_axes = [axes[shared[i]] if i in shared else f"{TOKEN}{i}" for i in range(x.ndim)]
    tokens = [axis for axis in x_axes if kind(axis) == TOKEN]
    kept = [axis for i, axis in enumerate(axes) if i not in shared.values()]
    y_axes = [axes[i] for i in batch] + (kept + tokens if parameter_first else tokens + kept)
    coordinates = varying_as(parameter.coordinates, x, parameter.array)
    is_explicit = explicit_mesh((x, parameter.array)) is not None
    layout = _Layout(
        x_axes=tuple(x_axes),
        y_axes=tuple(y_axes),
        contracts_in=contracted == sides[0],
        # An algorithm of another type than a precision is one for the types of this product.
        precision=precision if isinstance(precision, tuple) else None,
        coordinates=specs_of(coordinates) if is_explicit else None,
    )
    return _product(dot, layout, x, parameter, coordinates)


def ragged_product(
    dot: Callable[..., jax.Array],
    x: jax.Array,
    parameter: Tracked,
    sizes: jax.Array,
    numbers: Any,
    precision: Any,
) -> jax.Array | None:
    """`dot(x, parameter.array, sizes)`, as `lax.ragged_dot`, with the same backward pass.

    Args:
      dot: the product; it is differentiated with respect to x.
      x: activations, whose rows are tokens, in groups one after another.
      parameter: a matrix for each group.
      sizes: int32, numbers of tokens; those that are left belong to no group.
      numbers: as for `lax.ragged_dot_general`.
      precision: likewise.

    Returns:
      The product; None unless it contracts a whole side of the parameter, and all its batch axes,
      and those of x, are that of the groups and that of the tokens.
    """
    (x_contracting, contracting), (x_batch, _) = numbers.dot_dimension_numbers
    axes = parameter.axes
    kept = {*range(len(axes))} - {*contracting, *numbers.rhs_group_dimensions}
    sides = [{kind(axes[i]) for i in some} for some in (contracting, kept)]
    groups = [axes[i] for i in numbers.rhs_group_dimensions]
    if groups != [BATCH] or sides not in ([{IN}, {OUT}], [{OUT}, {IN}]):
        return None
    if x_batch or {*range(x.ndim)} - {*x_contracting} != {*numbers.lhs_ragged_dimensions}:
        return None
    shared = dict(zip(x_contracting, contracting, strict=True))
    layout = _Layout(
        x_axes=tuple(axes[shared[i]] if i in shared else TOKEN for i in range(x.ndim)),
        y_axes=(TOKEN, *(axes[i] for i in sorted(kept))),
        contracts_in=sides[0] == {IN},
        precision=precision if isinstance(precision, tuple) else None,
    )
    coordinates = varying_as(parameter.coordinates, x, parameter.array)
    return _product(dot, layout, x, parameter, coordinates, sizes)


def varying_as(array: jax.Array, *others: Any) -> jax.Array:
    """An array marked as varying over the mesh axes over which one of the others varies.

    Inside `jax.shard_map`, the derivative of an array that is marked as the same on all devices is
    summed over them.
    """
    axes = [set(jax.typeof(one).manual_axis_type.varying) for one in (array, *others)]
    return lax.pcast(array, tuple(set().union(*axes) - axes[0]), to="varying")


class _Layout(NamedTuple):
    """What the backward pass knows of a product.

    Attributes:
      x_axes: the names of the axes of x: letters of the parameter, and numbered tokens.
      y_axes: those of the result.
      contracts_in: whether the product contracts the in side.
      precision: for the coordinates.
      coordinates: their sharding type on a mesh with Explicit axes.
    """

    x_axes: tuple[str, ...]
    y_axes: tuple[str, ...]
    contracts_in: bool
    precision: tuple[Any, Any] | None
    coordinates: PartitionSpec | None = None


def _product(
    dot: Any, layout: _Layout, x: Any, parameter: Tracked, coordinates: Any, *groups: Any
) -> Any:
    # Outside of the derivative of our own, where a policy of `jax.checkpoint` sees the product.
    array = parameter.operand()
    y = dot(*lax.stop_gradient((x, array)), *groups)
    return _derived(dot, layout, y, x, array, parameter.vectors, coordinates, *groups)


# The value ignores the basis and the coordinates. The backward pass declares PᵀG to be the
# derivative by the coordinates, and that by the array, which would be G, to be none.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _derived(dot: Any, layout: _Layout, y: Any, *operands: Any) -> Any:
    del dot, layout, operands
    return y


def _forward(dot, layout, y, x, array, vectors, coordinates, *groups):
    del dot, layout
    return y, (x, array, vectors, groups, jnp.zeros_like(coordinates, shape=()))


def _backward(dot, layout, residuals, dy):
    x, array, vectors, groups, like = residuals
    coordinates = partial(_ragged_coordinates if groups else _coordinates, layout, array.dtype)
    # Without it, the compilers fuse and lay out the block around them worse. By their estimates for
    # 7B an h100 moves 9% more, and a v6e that computes dx from dy before it takes 7% longer.
    x, dy = lax.optimization_barrier((x, dy))
    out = lambda: (layout.coordinates, specs_of(dy))
    value, dy = with_auto_axes(coordinates, x, dy, vectors, *groups, out=out)
    (dx,) = jax.vjp(lambda x: dot(x, array, *groups), x)[1](dy)
    return None, dx, None, None, value.astype(like.dtype), *(None for _ in groups)


def product_dtype(dtype: Any) -> Any:
    """The dtype in which coordinates are computed from operands of this one.

    That is float32 for 8 bits, and for float16, in whose range neither every gradient nor every
    product with a basis is.
    """
    dtype = jnp.dtype(dtype)
    return jnp.float32 if dtype.itemsize == 1 or dtype == jnp.float16 else dtype


# Layers of equal shapes share one trace, which is inlined.
@partial(jax.jit, static_argnames=("layout", "dtype"), inline=True)
def _coordinates(
    layout: _Layout, dtype: Any, x: Any, dy: Any, vectors: Any
) -> tuple[jax.Array, jax.Array]:
    """The coordinates of the gradient `xᵀ dy`, or `dyᵀ x`, of a parameter with this dtype.

    Returns:
      The coordinates, and dy, from which dx is computed next.
    """
    dtype = promoted(product_dtype(x.dtype), product_dtype(dtype))

    def compute(x, dy, next_dy, vectors, *, of_matrices: bool, wait: bool):
        numbers = layout
        if of_matrices:
            sides = (IN, OUT) if layout.contracts_in else (OUT, IN)
            x, x_axes = _matrices(x, layout.x_axes, sides[0])
            dy, y_axes = _matrices(dy, layout.y_axes, sides[1])
            numbers = layout._replace(x_axes=x_axes, y_axes=y_axes)
        value, factors = _in_bases(numbers, x, dy, vectors)
        side_of_x = "left" if layout.contracts_in else "right"
        if wait and side_of_x not in vectors:
            next_dy, _ = lax.optimization_barrier((next_dy, factors))
        return value, next_dy

    # A TPU would copy x or dy for axes that are merged or moved where XLA keeps them in another
    # order. XLA's products on CPUs want matrices: of several axes of tokens in bfloat16 some fail.
    # For a GPU, XLA would compute dx and what follows from it before dy P, and keep a wide x for
    # xᵀ (dy P). If dx waited for the coordinates, it would also wait for their sum over devices.
    return lax.platform_dependent(
        *(x.astype(dtype), dy.astype(dtype), dy, vectors),
        tpu=partial(compute, of_matrices=False, wait=False),
        cuda=partial(compute, of_matrices=True, wait=True),
        default=partial(compute, of_matrices=True, wait=False),
    )


def _in_bases(
    layout: _Layout, x: jax.Array, dy: jax.Array, vectors: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`_coordinates` of operands with one dtype, whose axes stay where they are.

    Returns:
      The coordinates, and their factors: x and dy, multiplied by the bases.
    """
    dtype = x.dtype
    wide = promoted(dtype, jnp.float32)
    einsum = partial(jnp.einsum, precision=layout.precision, preferred_element_type=wide)
    sizes = dict(zip((*layout.x_axes, *layout.y_axes), (*x.shape, *dy.shape), strict=True))
    those = lambda wanted, axes: sorted(axis for axis in axes if kind(axis) == wanted)
    batch = those(BATCH, sizes)  # Each is in x, in the result, or in both.

    def in_basis(side: Side, array: jax.Array, axes: list[str]) -> tuple[jax.Array, list[str]]:
        if side not in vectors:
            return array, axes
        across = those(IN if side == "left" else OUT, axes)
        basis = dequantize(vectors[side]).astype(dtype)
        basis = basis.reshape(*basis.shape[:-2], *map(sizes.get, across), basis.shape[-1])
        # The name of the side is that of an in or an out axis.
        kept = [*batch, *(axis for axis in axes if kind(axis) == TOKEN), side]
        return einsum(array, axes, basis, [*batch, *across, side], kept).astype(dtype), kept

    inputs, outputs = (x, [*layout.x_axes]), (dy, [*layout.y_axes])
    rows, columns = (inputs, outputs) if layout.contracts_in else (outputs, inputs)
    rows, columns = in_basis("left", *rows), in_basis("right", *columns)
    in_axes, out_axes = those(IN, rows[1]), those(OUT, columns[1])
    # Both operands keep their tokens where they are: given a transpose, XLA would compute Pᵀ xᵀ,
    # which takes twice the time on CPUs.
    coordinates = jnp.real(einsum(*rows, *columns, [*batch, *in_axes, *out_axes]))
    shape, end = coordinates.shape, len(batch) + len(in_axes)
    matrix = math.prod(shape[len(batch) : end]), math.prod(shape[end:])
    return coordinates.reshape(*shape[: len(batch)], *matrix), (rows[0], columns[0])


def _matrices(
    array: jax.Array, axes: tuple[str, ...], side: str
) -> tuple[jax.Array, tuple[str, ...]]:
    """An array, of whose parameter it has one side, as matrices `(*batch, tokens, n)`.

    Returns:
      The matrices, and the names of their axes, the last of which is `side`.
    """
    order = sorted(range(len(axes)), key=axes.__getitem__)
    batch = sorted(axis for axis in axes if kind(axis) == BATCH)
    tokens = sum(kind(axis) == TOKEN for axis in axes)
    array = array.transpose(order)
    sizes = array.shape[len(batch) :]
    matrix = math.prod(sizes[:tokens]), math.prod(sizes[tokens:])
    return array.reshape(*array.shape[: len(batch)], *matrix), (*batch, TOKEN, side)


# The numbers of `xᵀ y` for each group of rows.
_GRADIENTS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _ragged_coordinates(
    layout: _Layout, dtype: Any, x: Any, dy: Any, vectors: Any, sizes: Any
) -> tuple[jax.Array, jax.Array]:
    """`_coordinates` of a parameter whose matrices are each one group's."""
    dtype = promoted(product_dtype(x.dtype), product_dtype(dtype))
    options = {
        "precision": layout.precision,
        "preferred_element_type": promoted(dtype, jnp.float32),
    }
    inputs, _ = _matrices(x.astype(dtype), layout.x_axes, IN)
    outputs, _ = _matrices(dy.astype(dtype), layout.y_axes, OUT)
    rows, columns = (inputs, outputs) if layout.contracts_in else (outputs, inputs)
    # JAX does not say what tokens of no group get; the kernel of a device need not write zeros.
    has_group = jnp.arange(rows.shape[0])[:, None] < sizes.sum()

    def in_basis(side: Side, matrix: jax.Array) -> jax.Array:
        if side not in vectors:
            return matrix
        basis = dequantize(vectors[side]).astype(dtype)
        product = lax.ragged_dot(matrix, basis, sizes, **options)
        return jnp.where(has_group, product, 0).astype(dtype)

    rows, columns = in_basis("left", rows), in_basis("right", columns)
    value = jnp.real(lax.ragged_dot_general(rows, columns, sizes, _GRADIENTS, **options))
    return value, dy


_derived.defvjp(_forward, _backward)
