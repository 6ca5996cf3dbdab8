"""Whether a model's gradients can be born projected, and are then right."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.gradients import Loss, Objective
from galore_jax.projection import Basis
from galore_jax.rules import Rank
from galore_jax.state import map_bases
from galore_jax.transform import galore

PyTree = Any


def check_projection(
    loss: Loss,
    params: PyTree,
    *batch: Any,
    has_aux: bool = False,
    rank: Rank = 0.25,
    **settings: Any,
) -> dict[str, float]:
    """Compares gradients that are born projected with full ones, in random bases.

    Args:
      loss: as for `value_and_grad`.
      params: the parameters.
      *batch: the other arguments of the loss.
      has_aux: whether the loss returns a pair.
      rank: of the bases, as for `galore`.
      **settings: others of `galore` that say what is projected, such as `rules`.

    Returns:
      For each leaf whose gradient is born projected, by its path, the largest difference of its
      coordinates from those of the full gradient, over the largest of these.

    Raises:
      ValueError: a kernel that a layer multiplies by and that is also used elsewhere, so that its
        gradient has to be formed whole; or coordinates that differ by more than their dtype allows.
        It names the leaf.
    """
    objective = Objective(loss, params, {}, has_aux)
    state: Any = galore(rank, **settings).init(params)
    bases = state.bases
    multiplied, used_elsewhere = objective.uses(bases, *batch)
    if tied := sorted("/".join(path) for path in multiplied & used_elsewhere):
        raise ValueError(
            f"check_projection: {', '.join(tied)} is multiplied by in a layer and also used outside"
            " of it, so value_and_grad has to form its whole gradient: right, but not cheap. Use it"
            " in layers alone, or give it the rule None, which leaves it unprojected."
        )
    bases = objective.carried(bases, *batch)
    full = jax.grad(loss, has_aux=has_aux)(params, *batch)
    errors: dict[str, float] = {}

    def compare(basis: Basis, found: Any, gradient: jax.Array) -> None:
        wanted = basis.projection.project(basis.vectors, gradient)
        largest = jnp.maximum(jnp.max(jnp.abs(wanted)), jnp.finfo(jnp.float32).tiny)
        error = float(jnp.max(jnp.abs(found.value - wanted)) / largest)
        name = basis.projection.name
        errors[name] = error
        if not jnp.all(jnp.isfinite(gradient)):
            raise ValueError(f"check_projection: the gradient of {name} is not finite.")
        if not error <= float(jnp.finfo(gradient.dtype).eps) ** 0.5:
            raise ValueError(
                f"check_projection: the coordinates of {name} differ from those of its full "
                f"gradient by {error:.1e} of the largest: give it the rule None."
            )

    found = objective.coordinates(bases, *batch)
    map_bases(compare, bases, found, full[0] if has_aux else full, otherwise=bases)
    return errors
