"""APOLLO: the gradient itself, scaled per channel by a low-rank Adam (arXiv 2412.05270)."""

import math
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.optim.fira import channel_norms, in_subspaces, norm_ratio
from galore_jax.optim.galore_settings import Settings, with_settings_of_galore
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.rules import Rank
from galore_jax.types import Mask

# The scale of APOLLO-Mini: arXiv 2412.05270, section 4.2.
MINI_SCALE = math.sqrt(128)


@with_settings_of_galore
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    refresh: str = "random",
    **settings: Any,
) -> optax.GradientTransformation:
    """APOLLO: SGD with learning rates per channel, from Adam in a random subspace (2412.05270).

    With the coordinates `R = PᵀG` of a random projection and Adam's result N, the update of a
    projected leaf is `lr · scale · G diag(s)` (algorithm 1), with one factor for each column,
    `sⱼ = ‖N[:, j]‖ / ‖R[:, j]‖`. With a right basis rows take the place of columns: the channels
    are on the side that is not projected, by default the larger one. A leaf of rank 1 has a single
    factor for the whole matrix, `s = ‖N‖ / ‖R‖`: this is APOLLO-Mini (section 4.2). The norm-growth
    limiter (equation 4) scales the step `G diag(s)` down until its norm is at most 1.01 times that
    of the last step that was not zero. Each matrix of a stack has its own limiter. Other leaves get
    plain AdamW.

    The entries of the paper's projection have the variance 1 / rank, so that the columns of R are
    about as long as those of the gradient. With our orthonormal basis they are shorter by the
    factor `√(rank / size)`, where size is that of the projected side, and Adam's result is the
    same, up to `eps`. With `refresh="random"` s is therefore multiplied by `√(rank / size)`, so
    that learning rates and scales are the paper's. The other methods, the paper's "APOLLO with
    SVD", need no such factor. The paper draws its projection anew from a seed at every step; ours
    is stored, `rank · size` numbers.

    It takes full gradients: those of `jax.value_and_grad`, or of `make_step`, layer by layer too. A
    gradient that is not finite is not skipped: put `optax.apply_if_finite` around it.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`. The paper takes a quarter or an eighth of the smaller side, 256 for 7B;
        1 is APOLLO-Mini.
      update_proj_gap: as for `galore`; 200 in the paper.
      scale: factor of the update, the paper's α. None: the paper's, √128 for `rank=1`, otherwise 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: as for `optax.adamw`.
      mask: as for `optax.adamw`.
      refresh: as for `galore`, but random by default.
      **settings: other arguments of `galore`, but not `moments`, which are kept.

    Returns:
      An optax transformation.

    Raises:
      ValueError: as for `fira`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> tx = galore_jax.apollo(1e-2, rank=1)  # APOLLO-Mini
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].value.shape
      (1, 16)
      >>> grads = {"kernel": jnp.arange(128.0).reshape(8, 16)}
      >>> updates, state = tx.update(grads, state, params)
    """
    return optax.chain(
        scale_by_apollo(
            rank, update_proj_gap, scale, b1=b1, b2=b2, eps=eps, refresh=refresh, **settings
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_apollo(
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    refresh: str = "random",
    **settings: Any,
) -> optax.GradientTransformation:
    """The step of `apollo`, without its learning rate and decay, for chains of your own."""
    if scale is None:
        number: Any = rank
        scale = MINI_SCALE if isinstance(number, Integral) and number == 1 else 1.0
    where = Settings(rank, update_proj_gap, scale, refresh=refresh, **settings)
    return in_subspaces("apollo", where, optax.scale_by_adam(b1, b2, eps), _direction)


def _direction(
    basis: Basis, coordinates: jax.Array, result: jax.Array, gradient: jax.Array
) -> tuple[float, jax.Array]:
    """0 and `G diag(s)`, all of which is limited."""
    projection = basis.projection
    norms = [channel_norms(projection, array) for array in (result, coordinates)]
    if projection.rank == 1:
        norms = [jnp.linalg.norm(each, keepdims=True) for each in norms]
    factors = norm_ratio(*norms)
    if basis.method == "random":
        ((*_, size, rank),) = projection.basis_shapes.values()
        factors *= math.sqrt(rank / size)
    return 0.0, gradient * factors
