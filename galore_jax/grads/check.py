"""Checks of projected gradients: how a loss uses its parameters, and whether they are right."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.grads.data_parallel import leaves_of
from galore_jax.grads.value_and_grad import Loss, Uses, bases_in, tracer
from galore_jax.optim.galore import galore
from galore_jax.optim.state import map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import is_coordinates
from galore_jax.subspace.rules import Rank
from galore_jax.types import PyTree


def projection_report(
    loss: Loss,
    params: PyTree,
    opt_state: PyTree,
    *batch: Any,
    has_aux: bool = False,
    **unsplit: Any,
) -> dict[str, Uses]:
    """How `value_and_grad` computes the gradient of each projected parameter.

    Args:
      loss: as for `value_and_grad`.
      params: the parameters or their shapes.
      opt_state: of an optimizer with galore, or its shapes.
      *batch: as for `value_and_grad`, or shapes.
      has_aux: as for `value_and_grad`.
      **unsplit: keyword arguments of the loss.

    Returns:
      A dictionary from the path of each projected parameter, such as "layers/mlp/kernel", to its
      `Uses`, which say whether the gradient is "projected" in the backward pass, "partly" or
      "full", and which primitives, with their lines of the source, are the reason.

    Raises:
      ValueError: as `value_and_grad`.
    """
    shapes, with_arrays = leaves_of(jax.ShapeDtypeStruct, batch)
    report: dict[str, Uses] = {}

    def trace(params: PyTree, opt_state: PyTree, arrays: dict[int, jax.Array]) -> None:
        bases = bases_in(params, opt_state)
        traced = tracer(loss, has_aux)(params, bases, with_arrays(arrays), unsplit)
        report.update({"/".join(path): uses for path, uses in traced.uses.items()})

    jax.eval_shape(trace, params, opt_state, shapes)
    return report


def check_projection(
    loss: Loss,
    params: PyTree,
    *batch: Any,
    has_aux: bool = False,
    rank: Rank = 0.25,
    **settings: Any,
) -> dict[str, float]:
    """Compares the gradients of `value_and_grad` with full gradients, in random bases.

    Args:
      loss: as for `value_and_grad`; with keyword arguments, a `functools.partial` of it.
      params: the parameters.
      *batch: the other arguments of the loss.
      has_aux: whether the loss returns a pair.
      rank: of the bases, as for `galore`.
      **settings: other arguments of `galore` that choose what is projected, such as `rules`.

    Returns:
      For each parameter whose gradient is "projected" or "partly" projected in the backward pass,
      by path: the largest difference between its coordinates and those of the full gradient,
      divided by the largest of the latter.

    Raises:
      ValueError: a gradient is not finite, or the relative difference is above the square root of
        the largest machine epsilon of the dtypes in which the loss computes, or of float32, in
        which coordinates are; the message names the leaf.
    """
    state: Any = galore(rank, **settings).init(params)
    traced = tracer(loss, has_aux)(params, state.bases, batch, {})
    _, gradients = traced.value_and_grad()
    full = jax.grad(loss, has_aux=has_aux)(params, *batch)
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
        if not error <= max(traced.eps, float(jnp.finfo(jnp.float32).eps)) ** 0.5:
            raise ValueError(
                f"check_projection: the coordinates of {name} differ from those of its full "
                f"gradient by {error:.1e} of the largest: give it the rule None."
            )

    map_bases(compare, state.bases, gradients, full[0] if has_aux else full, otherwise=state.bases)
    return errors
