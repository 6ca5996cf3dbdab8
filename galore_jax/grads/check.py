"""A check of projected gradients against full ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.grads.value_and_grad import Loss, bases_in, tracer
from galore_jax.optim.galore_state import map_bases
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import is_coordinates
from galore_jax.types import PyTree


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
        traced = tracer(loss, has_aux)(params, bases, batch, unsplit)
        _, gradients = traced.value_and_grad(bases)
        full = jax.grad(loss, has_aux=has_aux)(params, *batch, **unsplit)
        tolerance = max(traced.eps, float(jnp.finfo(jnp.float32).eps)) ** 0.5
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
