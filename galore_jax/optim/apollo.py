"""APOLLO: the gradient itself, scaled per channel by a low-rank Adam (arXiv 2412.05270)."""

import math
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.implementation import Implementation
from galore_jax.optim.aliases import choose_adam, with_settings_of_galore
from galore_jax.optim.chain import Chain, chain
from galore_jax.optim.channels import channel_norms, limit_growth, norm_ratio, scale_channels
from galore_jax.optim.galore import galore
from galore_jax.optim.weight_decay import decay_weights
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Coordinates
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
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    eight_bit: bool = False,
    implementation: Implementation = "xla",
    refresh: str = "random",
    **settings: Any,
) -> Chain:
    """APOLLO: SGD with learning rates per channel, from Adam in a random subspace (2412.05270).

    With the coordinates `R = PᵀG` of a random projection and Adam's result N, the update of a
    projected leaf is `lr · scale · G diag(s)` (algorithm 1), with one factor for each column,
    `sⱼ = ‖N[:, j]‖ / ‖R[:, j]‖`. With a right basis rows take the place of columns: the channels
    are on the side that is not projected, by default the larger one. A leaf of rank 1 has a single
    factor for the whole matrix, `s = ‖N‖ / ‖R‖`: this is APOLLO-Mini (section 4.2). The norm-growth
    limiter (equation 4) scales the step `G diag(s)` down until its norm is at most 1.01 times that
    of the last step that was not zero. Each matrix of a stack has its own limiter, which a matrix
    that is skipped because its gradient is not finite leaves as it is. Other leaves get plain
    AdamW.

    The entries of the paper's projection have the variance 1 / rank, so that the columns of R are
    about as long as those of the gradient. With our orthonormal basis they are shorter by the
    factor `√(rank / size)`, where size is that of the projected side, and Adam's result is the
    same, up to `eps`. With `refresh="random"` s is therefore multiplied by `√(rank / size)`, so
    that learning rates and scales are the paper's. The other methods, the paper's "APOLLO with
    SVD", need no such factor. The paper draws its projection anew from a seed at every step; ours
    is stored, `rank · size` numbers.

    APOLLO needs full gradients: those of `jax.value_and_grad`, or of
    `layerwise.make_step(…, projected=False)`.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`. The paper takes a quarter or an eighth of the smaller side, 256 for 7B;
        1 is APOLLO-Mini.
      update_proj_gap: as for `galore`; 200 in the paper.
      scale: factor of the update, the paper's α. None: the paper's, √128 for `rank=1`, otherwise 1.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: as for `adamw`.
      mask: as for `adamw`.
      eight_bit: whether to keep 8-bit moments; see `scale_by_adam8bit`.
      implementation: of the update of 8-bit moments; see `scale_by_adam8bit`.
      refresh: as for `galore`, but random by default.
      **settings: other arguments of `galore`.

    Returns:
      A `chain`. Put a clip in front with `chain(clip, apollo(...))`; nothing may come after it.

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
      >>> params, state = galore_jax.apply_gradients(tx, grads, state, params)
    """
    if scale is None:
        number: Any = rank
        scale = MINI_SCALE if isinstance(number, Integral) and number == 1 else 1.0
    return chain(
        galore(rank, update_proj_gap, scale, refresh=refresh, **settings),
        choose_adam("apollo", b1, b2, eps, eight_bit, implementation),
        scale_channels("apollo", _step),
        optax.scale_by_learning_rate(learning_rate),
        decay_weights(learning_rate, weight_decay, mask),
    )


def _step(
    basis: Basis, result: jax.Array, coordinates: jax.Array, matrices: jax.Array, last: jax.Array
) -> tuple[Coordinates, jax.Array]:
    """`G diag(s)`, with the limiter's factor in s."""
    projection = basis.projection
    norms = [channel_norms(projection, array) for array in (result, coordinates)]
    if projection.rank == 1:
        norms = [jnp.sqrt(jnp.sum(each**2, axis=(-2, -1), keepdims=True)) for each in norms]
    factors = norm_ratio(*norms)
    if basis.method == "random":
        ((*_, size, rank),) = projection.basis_shapes.values()
        factors *= math.sqrt(rank / size)
    lengths = channel_norms(projection, matrices)
    limit, norm = limit_growth(factors * lengths, last)
    channels = jnp.broadcast_to(limit * factors, lengths.shape)
    return Coordinates(None, projection, channels=channels), norm
