"""Reports on projected gradients: what is projected, the memory that saves, and the exactness."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.grads.data_parallel import leaves_of
from galore_jax.grads.value_and_grad import Loss, Passes, Uses, bases_in
from galore_jax.ops.int8 import places_of, with_places
from galore_jax.optim.galore_state import bases_of, galore_states, map_bases
from galore_jax.optim.sharding import init
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.matrix_view import leaves_with_path, named_leaves
from galore_jax.subspace.projection import is_coordinates
from galore_jax.types import PyTree


@dataclass(frozen=True)
class Description:
    """What an optimizer does with each parameter; printed, it is a table.

    Attributes:
      table: as text, with a line for each leaf and a last one for the total.
      uses: how the loss, if there is one, uses each projected parameter, by a path such as
        "layers/mlp/kernel".
    """

    table: str
    uses: dict[str, Uses] = field(repr=False)

    def __str__(self) -> str:
        return self.table


def describe(
    params: PyTree,
    tx: optax.GradientTransformation,
    loss: Loss | None = None,
    *batch: Any,
    has_aux: bool = False,
    **unsplit: Any,
) -> Description:
    """What `tx` does with each parameter: its path, matrices, side, rank and the bytes saved.

    The bytes saved are two float32 moments of the parameter's shape, as Adam keeps, minus what the
    optimizer's state holds for it, bases and counters included. Nothing is computed.

    Args:
      params: the parameters or their shapes.
      tx: a transformation with galore in it.
      loss: if given, as for `value_and_grad`, another column shows how the gradient of each
        projected parameter is computed: "projected" in the backward pass, "partly" or "full"; the
        latter two with their reasons, primitives with their lines of the source.
      *batch: the other arguments of the loss, or their shapes.
      has_aux: whether the loss returns a pair.
      **unsplit: keyword arguments of the loss.

    Returns:
      A `Description`.

    Raises:
      ValueError: with a loss, as `value_and_grad`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"bias": jnp.zeros(256), "kernel": jnp.zeros((2, 64, 256))}
      >>> tx = galore_jax.chain(galore_jax.galore(8), optax.adam(1e-3))
      >>> print(galore_jax.describe(params, tx))
      path    matrices      side  rank  bytes saved
      bias    -             -        -            0
      kernel  2 x 64 x 256  left     8      225,212
      total                                 225,212
    """
    state = jax.eval_shape(lambda params: init(tx, params), params)
    bases = bases_of(galore_states(state, inside_chains=True))
    projections = {basis.projection.path: basis.projection for basis in bases}
    bytes_in_state = _bytes_in_state(tx, state, params)
    uses = {} if loss is None else _uses(loss, params, state, batch, unsplit, has_aux)
    gradients = {
        name: ": ".join(filter(None, (own.gradient, ", ".join(own.reasons))))
        for name, own in uses.items()
    }

    rows = [("path", "matrices", "side", "rank", "bytes saved", "gradient" if gradients else "")]
    total = 0
    for (names, leaf), used in zip(named_leaves(params), bytes_in_state, strict=True):
        saved = 2 * 4 * math.prod(jnp.shape(leaf)) - used
        total += saved
        sizes = side = rank = "-"
        if names in projections:
            view, rank = projections[names].view, str(projections[names].rank)
            sizes = " x ".join(str(size) for size in (*view.batch, view.rows, view.columns))
            side = "+".join(projections[names].sides)
        name = "/".join(names)
        rows.append((name, sizes, side, rank, f"{saved:,}", gradients.get(name, "")))
    rows.append(("total", "", "", "", f"{total:,}", ""))
    return Description(_table(rows), uses)


def _uses(
    loss: Loss, params: PyTree, state: PyTree, batch: Any, unsplit: Any, has_aux: bool
) -> dict[str, Uses]:
    """How the loss uses each projected parameter; its arguments may be shapes."""
    shapes, with_arrays = leaves_of(jax.ShapeDtypeStruct, batch)
    found: dict[str, Uses] = {}

    def trace(params: PyTree, state: PyTree, arrays: dict[int, jax.Array]) -> None:
        bases, batch = bases_in(params, state), with_arrays(arrays)
        passes = Passes(loss, params, bases, batch, unsplit, has_aux)
        found.update({"/".join(path): uses for path, uses in passes.find_uses().items()})

    jax.eval_shape(trace, params, state, shapes)
    return found


def _bytes_in_state(tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> list[int]:
    """For each parameter, the bytes that an optimizer's state holds for it."""
    used = {path: 0 for path, _ in leaves_with_path(params)}

    def count(copy: PyTree) -> PyTree:
        """Adds the bytes of a tree like the parameters."""
        pieces = jax.tree_util.tree_leaves_with_path(
            copy, is_leaf=lambda path, _: path in used, is_leaf_takes_path=True
        )
        for path, piece in pieces:
            used[path] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(piece))
        return copy

    optax.tree.map_params(tx, count, state, is_leaf=lambda _: True)
    return list(used.values())


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust]
    lines = [
        [align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def check_projection(loss: Loss, *, has_aux: bool = False) -> Callable[..., dict[str, float]]:
    """Compares the gradients of `value_and_grad` with full gradients, projected afterwards.

    Args:
      loss: as for `value_and_grad`.
      has_aux: whether it returns a pair.

    Returns:
      A function `(params, opt_state, *batch, **unsplit)`. It returns, for each parameter whose
      gradient is "projected" or "partly" projected in the backward pass, by path: the largest
      difference between its coordinates and those of the full gradient, divided by the largest of
      the latter.

    Raises:
      ValueError: when called: a gradient is not finite, or the relative difference is above the
        square root of the largest machine epsilon of the dtypes in which the loss computes, or of
        float32, in which coordinates are; the message names the leaf. And as for `value_and_grad`.
    """

    def run(params: PyTree, opt_state: PyTree, *batch: Any, **unsplit: Any) -> dict[str, float]:
        bases = bases_in(params, opt_state)
        passes = Passes(loss, params, bases, batch, unsplit, has_aux)
        _, gradients = passes.value_and_grad(bases)
        of_places = lambda places: loss(with_places(params, places), *batch, **unsplit)
        full = jax.grad(of_places, has_aux=has_aux)(places_of(params))
        tolerance = max(passes.eps, float(jnp.finfo(jnp.float32).eps)) ** 0.5
        errors: dict[str, float] = {}

        def compare(basis: Basis, ours: Any, gradient: jax.Array) -> None:
            name = basis.projection.name
            if not jnp.all(jnp.isfinite(gradient)):
                raise ValueError(f"check_projection: the gradient of {name} is not finite.")
            if not is_coordinates(ours):
                return
            expected = basis.projection.project(basis.vectors, gradient)
            largest = jnp.maximum(jnp.max(jnp.abs(expected)), jnp.finfo(jnp.float32).tiny)
            errors[name] = error = float(jnp.max(jnp.abs(ours.value - expected)) / largest)
            if not error <= tolerance:
                raise ValueError(
                    f"check_projection: the coordinates of {name} differ from those of its full "
                    f"gradient by {error:.1e} of the largest: give it the rule None."
                )

        map_bases(compare, bases, gradients, full[0] if has_aux else full, otherwise=bases)
        return errors

    return run
