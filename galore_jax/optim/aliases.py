"""Ready-made optimizers: GaLore with AdamW, Muon, Adafactor and Lion."""

from typing import Any

import jax
import optax

from galore_jax.ops.implementation import Implementation
from galore_jax.optim.adam8bit import ScaleByAdam8bitState, scale_by_adam8bit
from galore_jax.optim.chain import Chain, chain
from galore_jax.optim.clipping import clip_by_matrix_rms
from galore_jax.optim.factored_rms import scale_by_factored_rms
from galore_jax.optim.galore import galore
from galore_jax.optim.galore_settings import with_settings_of_galore
from galore_jax.optim.muon import scale_by_muon
from galore_jax.optim.weight_decay import add_decayed_full_weights
from galore_jax.subspace.projection import is_coordinates
from galore_jax.subspace.rules import Rank
from galore_jax.types import Mask, PyTree


@with_settings_of_galore
def adamw(
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
    """AdamW on the coordinates, with weight decay in the full space (arXiv 2403.03507, section 4).

    Projected leaves are updated by `lr · scale · lift(Adam(R))`, all others by `lr · Adam(G)`; then
    every weight is multiplied by `1 − lr · weight_decay`. The defaults are the reference's; `eps`
    is added after the bias correction, as in optax, while the reference adds it before.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: as for `galore`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      weight_decay: decoupled weight decay, a number or a schedule, multiplied by the learning rate
        but not by `scale`.
      mask: which leaves decay, as for `optax.adamw`: a tree of booleans, or a function from the
        parameters (their shapes) to one; None: all.
      eight_bit: whether to keep 8-bit moments; see `scale_by_adam8bit`.
      implementation: of 8-bit moments and of the lift, "xla" or "pallas"; see `galore`.
      **settings: other arguments of `galore`: `proj_type`, `refresh`, `rules`, `moments`, …

    Returns:
      A `chain`. Put a clip in front with `chain(clip, adamw(...))`; nothing may come after it.

    Raises:
      ValueError: as for `galore`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp
      >>> tx = galore_jax.adamw(1e-2, rank=4, weight_decay=0.1)
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
    """
    return chain(
        galore(rank, update_proj_gap, scale, implementation=implementation, **settings),
        _adam(b1, b2, eps, eight_bit, implementation),
        optax.scale_by_learning_rate(learning_rate),
        add_decayed_full_weights(learning_rate, weight_decay, mask),
    )


def _adam(
    b1: float, b2: float, eps: float, eight_bit: bool, implementation: Implementation
) -> optax.GradientTransformation:
    """Adam with float32 or 8-bit moments."""
    if eight_bit:
        return scale_by_adam8bit(b1, b2, eps, implementation=implementation)
    adam: Any = optax.scale_by_adam(b1, b2, eps)

    def update(updates: PyTree, state: Any, params: PyTree = None):
        if isinstance(state, ScaleByAdam8bitState):
            raise ValueError(
                "this optimizer's state has moments in 8 bits: use the optimizer that it was "
                "started with (eight_bit=True), or start anew."
            )
        return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


@with_settings_of_galore
def muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    *,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    eight_bit: bool = False,
    implementation: Implementation = "xla",
    **settings: Any,
) -> Chain:
    """Muon on the coordinates, which keeps one moment in place of two; AdamW for everything else.

    Projected leaves are updated by `lr · scale · lift(0.2 √max(in, out) · O)`, where O is the
    orthogonalised momentum of the coordinates: see `scale_by_muon`, which derives the factor.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: as for `galore`.
      beta: decay of the moment of projected leaves.
      b1: decay of the first moment of the other leaves.
      b2: decay of their second moment.
      eps: added to the square root of their second moment.
      weight_decay: as for `adamw`.
      mask: as for `adamw`.
      eight_bit: whether to keep 8-bit moments, of all leaves; see `scale_by_adam8bit`.
      implementation: of AdamW's 8-bit moments and of the lift, "xla" or "pallas"; see `galore`.
      **settings: other arguments of `galore`.

    Returns:
      A `chain`.

    Raises:
      ValueError: as for `adamw`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp
      >>> tx = galore_jax.muon(1e-3, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)})
    """

    def labels(tree: PyTree) -> PyTree:
        label = lambda leaf: "coordinates" if is_coordinates(leaf) else "unprojected"
        return jax.tree.map(label, tree, is_leaf=is_coordinates)

    by_label: dict[Any, optax.GradientTransformation] = {
        "coordinates": scale_by_muon(beta, eight_bit=eight_bit),
        "unprojected": _adam(b1, b2, eps, eight_bit, implementation),
    }
    return chain(
        galore(rank, update_proj_gap, scale, implementation=implementation, **settings),
        optax.partition(by_label, labels),
        optax.scale_by_learning_rate(learning_rate),
        add_decayed_full_weights(learning_rate, weight_decay, mask),
    )


@with_settings_of_galore
def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    b1: float | None = 0.9,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    **settings: Any,
) -> Chain:
    """Adafactor on the coordinates, as in the reference code (arXiv 2403.03507).

    The second moment of the coordinates is factored into rows and columns (arXiv 1804.04235). The
    update is clipped by its root mean square and, after the learning rate is applied, averaged over
    time. The learning rate is absolute, not relative to the size of the weights.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: as for `galore`.
      b1: decay of the first moment; None: no first moment.
      decay_rate: see `scale_by_factored_rms`.
      eps: added to the squared gradient.
      clipping_threshold: root mean square to which the update of a matrix is scaled down.
      weight_decay: as for `adamw`.
      mask: as for `adamw`.
      **settings: other arguments of `galore`.

    Returns:
      A `chain`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp
      >>> tx = galore_jax.adafactor(1e-2, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
    """
    return chain(
        galore(rank, update_proj_gap, scale, **settings),
        scale_by_factored_rms(decay_rate, eps),
        clip_by_matrix_rms(clipping_threshold),
        optax.scale_by_learning_rate(learning_rate),
        optax.identity() if b1 is None else optax.ema(b1, debias=False),
        add_decayed_full_weights(learning_rate, weight_decay, mask),
    )


@with_settings_of_galore
def lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    **settings: Any,
) -> Chain:
    """Lion (arXiv 2302.06675) on the coordinates: the sign of a first moment, no second moment.

    Args:
      learning_rate: a number, or a schedule of the update count.
      rank: as for `galore`.
      update_proj_gap: as for `galore`.
      scale: as for `galore`.
      b1: weight of the moment in the update.
      b2: decay of the moment.
      weight_decay: as for `adamw`.
      mask: as for `adamw`.
      **settings: other arguments of `galore`.

    Returns:
      A `chain`.

    Examples:
      >>> import galore_jax, jax.numpy as jnp
      >>> tx = galore_jax.lion(1e-4, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
    """
    return chain(
        galore(rank, update_proj_gap, scale, **settings),
        optax.scale_by_lion(b1=b1, b2=b2),
        optax.scale_by_learning_rate(learning_rate),
        add_decayed_full_weights(learning_rate, weight_decay, mask),
    )
