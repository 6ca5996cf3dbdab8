"""`make_step`: a complete training step."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import optax

from galore_jax.grads.layerwise import ClipBy, LayeredModel, layerwise_step
from galore_jax.grads.refresh import refreshed
from galore_jax.grads.value_and_grad import (
    Loss,
    Passes,
    bases_in,
    no_bases,
    takes_coordinates,
)
from galore_jax.ops.partition import AxisNames
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.clipping import clip_by_finite_norm
from galore_jax.types import PyTree


class Step(NamedTuple):
    """What a step returns: the new parameters and state, and the value of the loss."""

    params: PyTree
    state: PyTree
    value: Any


def make_step(
    loss: Loss | LayeredModel,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
    data_axes: AxisNames = (),
    projected: bool | None = None,
    refreshes: bool | None = None,
    clip_norm: float = 0.0,
    clip_by: ClipBy = "this_step",
) -> Callable[..., Step]:
    """A complete training step: new bases where they are due, gradients, and the update.

    It is `refresh`, `value_and_grad` and `apply_gradients` in one. Call it under `jax.jit`, with
    the parameters and the state donated. A step of an optimizer without galore is an ordinary one.

    With a `LayeredModel` in place of the loss it goes layer by layer, so that the gradient and the
    update of only one layer exist at a time (see `docs/low-memory.md`). Up to rounding that is the
    same step for optimizers that treat each number or matrix separately, such as everything in
    `galore_jax.adamw`. Operations in `tx` that combine layers or leaves act within one layer there:
    clip by `clip_norm`, and select leaves in masks by name, because the layer axis is absent.

    Args:
      loss: as for `value_and_grad`, or a `LayeredModel`.
      tx: any optax transformation.
      has_aux: whether the loss returns a pair, the second part of which is not differentiated. For
        a `LayeredModel`, whether the step returns the second part too.
      micro_batches: as for `value_and_grad`. For a `LayeredModel` the sums have the dtype of
        bfloat16 parameters, and bases are refreshed from the first micro-batch.
      data_axes: as for `value_and_grad`; not for a `LayeredModel`.
      projected: whether the backward pass projects gradients; None: where the optimizer allows it.
      refreshes: with projected gradients, whether to refresh the bases that are due. None: the step
        branches on whether any is. To avoid the branch, compile one step with True, for when
        `refresh_due(state)` is true, and one with False. (Full gradients refresh in every update.)
      clip_norm: gradients are scaled down to this global norm of their finite elements, of
        coordinates where they are projected; 0: no clipping.
      clip_by: how the norm is known before the first layer of a `LayeredModel` is updated, if there
        are no micro-batches. "this_step": the gradients of all layers are kept until it is, as
        coordinates where they are projected. "previous_step": the norm of the previous step is used
        instead, at no cost; the first step is not clipped, and an outlier clips the step after it.

    Returns:
      A function `(params, state, *batch, rounding_key=None, **unsplit)` that returns the new
      parameters, the new state and the loss (with has_aux the pair), a `Step`. The state is that of
      `galore_jax.init(tx, params)`. For a `LayeredModel` it is that of `galore_jax.layerwise.init`,
      and the function takes one batch and no other keyword arguments. With a `rounding_key`,
      parameters in bfloat16 and in 8 bits are rounded stochastically.

    Raises:
      ValueError: an unknown `clip_by`; data axes of a `LayeredModel`. When the step is called: as
        for `value_and_grad` and `refresh`; of a `LayeredModel`, also leaves of blocks, or arrays in
        the state, that are not stacked by layer, a projection across layers, or an `embed` whose
        second result depends on parameters.

    Examples:
      >>> import galore_jax, jax, jax.numpy as jnp
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
      >>> tx = galore_jax.adamw(1e-2, rank=2)
      >>> state = tx.init(params)
      >>> step = jax.jit(galore_jax.make_step(loss, tx), donate_argnums=(0, 1))
      >>> params, state, value = step(params, state, x)
    """
    if clip_by not in get_args(ClipBy):
        raise ValueError(f"make_step: clip_by must be one of {get_args(ClipBy)}, not {clip_by!r}.")
    if isinstance(loss, LayeredModel):
        if data_axes:
            raise ValueError(
                "make_step: data_axes need the gradients of all layers at once, which a "
                "LayeredModel does not have: leave them out, or pass a loss."
            )
        by_layer = layerwise_step(
            loss,
            tx,
            micro_batches=micro_batches,
            projected=projected,
            refreshes=refreshes,
            clip_norm=clip_norm,
            clip_by=clip_by,
        )

        def step_by_layer(
            params: PyTree, state: PyTree, batch: Any, *, rounding_key: jax.Array | None = None
        ) -> Step:
            params, state, pair = by_layer(params, state, batch, rounding_key)
            return Step(params, state, pair if has_aux else pair[0])

        return step_by_layer

    clip = clip_by_finite_norm(clip_norm) if clip_norm else optax.identity()

    def step(
        params: PyTree,
        state: PyTree,
        *batch: Any,
        rounding_key: jax.Array | None = None,
        **unsplit: Any,
    ) -> Step:
        is_projected = takes_coordinates(state) if projected is None else projected
        bases = bases_in(params, state) if is_projected else no_bases(params)
        passes = Passes(loss, params, bases, batch, unsplit, has_aux, micro_batches, data_axes)
        if is_projected and refreshes is not False:
            state = refreshed(passes, state, when_due=refreshes is None)
            bases = bases_in(params, state)
        value, grads = passes.value_and_grad(bases)
        grads, _ = clip.update(grads, clip.init(params))
        params, state = apply_gradients(tx, grads, state, params, key=rounding_key)
        return Step(params, state, value)

    return step
