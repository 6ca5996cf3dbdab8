"""Fira: GaLore with Adam, and a step along what the projection leaves out (arXiv 2410.01623)."""

from typing import Any

import jax
import optax

from galore_jax.ops.implementation import Implementation
from galore_jax.optim.aliases import choose_adam, with_settings_of_galore
from galore_jax.optim.chain import Chain, chain
from galore_jax.optim.channels import (
    channel_norms,
    limit_growth,
    norm_ratio,
    residual_norms,
    scale_channels,
)
from galore_jax.optim.galore import galore
from galore_jax.optim.weight_decay import decay_weights
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Coordinates
from galore_jax.subspace.rules import Rank
from galore_jax.types import Mask


@with_settings_of_galore
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    eight_bit: bool = False,
    implementation: Implementation = "xla",
    **settings: Any,
) -> Chain:
    """Fira: AdamW on the coordinates and a scaled step along the residual (arXiv 2410.01623).

    With a left basis P, the coordinates `R = PᵀG` and Adam's result N, the update of a projected
    leaf is `lr · scale · (P N + S)`. The step along the residual, `S = (G − P R) diag(φ)`, has one
    factor for each column, `φⱼ = ‖N[:, j]‖ / ‖R[:, j]‖`; where R is 0 it is 0. With a right basis
    rows take the place of columns. The norm-growth limiter scales S down until its norm is at most
    1.01 times that of the last step that was not zero. Each matrix of a stack has its own limiter,
    which a matrix that is skipped because its gradient is not finite leaves as it is. Other leaves
    get plain AdamW.

    The state is GaLore's and one number per matrix. No full-size array is stored between steps, and
    of a stack the residual of one matrix at a time exists. But Fira needs full gradients: those of
    `jax.value_and_grad`, or of `layerwise.make_step(…, projected=False)`.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: factor of both parts of the update; the paper's formula has none.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: as for `adamw`.
      mask: as for `adamw`.
      eight_bit: whether to keep 8-bit moments; see `scale_by_adam8bit`.
      implementation: of the update of 8-bit moments; see `scale_by_adam8bit`. The update of
        projected weights is always that of "xla".
      **settings: other arguments of `galore`.

    Returns:
      A `chain`. Put a clip in front with `chain(clip, fira(...))`; nothing may come after it.

    Raises:
      ValueError: at init, both sides of a leaf are projected; at an update, gradients that
        `galore_jax.value_and_grad` has projected; and as for `adamw`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> tx = galore_jax.fira(1e-2, rank=4)
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (4, 16)
      >>> grads = {"kernel": jnp.arange(128.0).reshape(8, 16)}
      >>> params, state = galore_jax.apply_gradients(tx, grads, state, params)
    """
    return chain(
        galore(rank, update_proj_gap, scale, **settings),
        choose_adam("fira", b1, b2, eps, eight_bit, implementation),
        scale_channels("fira", _step),
        optax.scale_by_learning_rate(learning_rate),
        decay_weights(learning_rate, weight_decay, mask),
    )


def _step(
    basis: Basis, result: jax.Array, coordinates: jax.Array, matrices: jax.Array, last: jax.Array
) -> tuple[Coordinates, jax.Array]:
    """`P N + S` as `P (N − R diag(φ)) + G diag(φ)`, with the limiter's factor in φ."""
    projection = basis.projection
    factors = norm_ratio(channel_norms(projection, result), channel_norms(projection, coordinates))
    limit, norm = limit_growth(factors * residual_norms(basis, coordinates, matrices), last)
    factors = limit * factors
    return Coordinates(result - factors * coordinates, projection, channels=factors), norm
