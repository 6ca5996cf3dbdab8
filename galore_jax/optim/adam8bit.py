"""Adam with 8-bit moments (arXiv 2110.02861), with or without GaLore."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from galore_jax.ops.adam_step import adam_8bit
from galore_jax.ops.implementation import (
    Implementation,
    check_implementation,
    use_implementation,
)
from galore_jax.ops.quantization import BLOCK, Code, Quantized, zeros_like
from galore_jax.subspace.projection import is_coordinates
from galore_jax.types import PyTree

# Smaller leaves keep float32 moments, as in the implementation of arXiv 2110.02861, and so do those
# with a shorter last axis, whose scales would use up what the codes save.
MIN_QUANTIZED_SIZE, MIN_QUANTIZED_WIDTH = 4096, 16


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`.

    Attributes:
      count: int32 scalar, number of updates so far.
      mu: first moments, `Quantized` with "signed" codes; float32 arrays for small leaves.
      nu: second moments, likewise with "unsigned" codes.
    """

    count: jax.typing.ArrayLike
    mu: PyTree
    nu: PyTree


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, implementation: Implementation = "xla"
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in block-wise dynamic 8-bit codes (arXiv 2110.02861).

    Blocks of 256 numbers lie along the last axis; of `Coordinates` with at least 256 rows, down the
    columns. Updates are computed from the moments in float32, before they are rounded to codes. The
    two moments take 2.03 bytes per parameter instead of 8 (2.5 if the last axis is as short as 16).
    Leaves with fewer than 4,096 elements or with a last axis shorter than 16 keep float32 moments.
    It is not for complex parameters.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment, after the bias correction.
      implementation: "xla", or "pallas" for a kernel on TPUs and NVIDIA GPUs, which nobody has run
        on a device yet; see `galore`.

    Returns:
      An optax transformation.

    Raises:
      ValueError: an unknown implementation; at an update, a state without 8-bit moments.

    Examples:
      >>> import jax.numpy as jnp
      >>> from galore_jax import scale_by_adam8bit
      >>> state = scale_by_adam8bit().init({"kernel": jnp.ones((64, 512)), "bias": jnp.ones(512)})
      >>> state.mu["kernel"].codes.dtype, state.mu["kernel"].scales.shape, state.mu["bias"].dtype
      (dtype('uint8'), (64, 2), dtype('float32'))
    """

    check_implementation(implementation)

    def init_fn(params: PyTree) -> ScaleByAdam8bitState:
        zeros = lambda code: jax.tree.map(
            lambda param: zero_moment(param, code), params, is_leaf=is_coordinates
        )
        return ScaleByAdam8bitState(jnp.zeros([], jnp.int32), zeros("signed"), zeros("unsigned"))

    def update_fn(updates: PyTree, state: Any, params: PyTree = None):
        del params
        if not isinstance(state, ScaleByAdam8bitState):
            raise ValueError(
                f"scale_by_adam8bit: the moments of this {type(state).__name__} are not in 8 bits: "
                "use the optimizer that it was started with (eight_bit=False), or start anew."
            )
        count = optax.safe_increment(state.count)

        def at_leaf(update: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
            if isinstance(mu, Quantized):
                # Bound here, so that 1 − b2 is computed before b2 is rounded to float32.
                bound = lambda adam, *arrays: adam(*arrays, b1=b1, b2=b2, eps=eps)
                step = partial(use_implementation, implementation, adam_8bit, bound)
                new, mu, nu = _on_parts(step, update, mu, nu, count)
                return new.astype(update.dtype), mu, nu
            adam: Any = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
            state_of_leaf = optax.ScaleByAdamState(state.count, mu, nu)
            new, kept = adam.update(update.astype(jnp.float32), state_of_leaf)
            return new.astype(update.dtype), kept.mu, kept.nu

        leaves, tree = jax.tree.flatten(updates)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        results = [at_leaf(*parts) for parts in zip(leaves, *moments, strict=True)]
        new, mu, nu = (jax.tree.unflatten(tree, [parts[i] for parts in results]) for i in range(3))
        return new, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def zero_moment(param: Any, code: Code | None, *, is_matrix: bool = False) -> Any:
    """A moment of zeros, in 8-bit codes if a code is given and the array is large enough.

    Args:
      param: an array, or `Coordinates`.
      code: of the moment, None for float32.
      is_matrix: whether the last two axes of the array are those of matrices, as in `Coordinates`.
    """
    if is_coordinates(param):
        return replace(param, value=zero_moment(param.value, code, is_matrix=True))
    shape = jnp.shape(param)
    too_small = jnp.size(param) < MIN_QUANTIZED_SIZE or shape[-1] < MIN_QUANTIZED_WIDTH
    if code is None or too_small:
        return jnp.zeros_like(param, jnp.float32)
    # A TPU reads blocks down the columns without laying out anything anew. Other arrays may be
    # vectors stacked by layer, or an embedding, whose rows have gradients of different sizes.
    by_columns = is_matrix and shape[-2] >= BLOCK
    return zeros_like(param, code, -2 if by_columns else -1)


def _on_parts(
    step: Callable[..., Any], update: jax.Array, mu: Quantized, nu: Quantized, count: Any
) -> tuple[jax.Array, Quantized, Quantized]:
    """A step on the part of the moments that each device has, which consists of whole blocks."""
    if mu.partition is None:
        return step(update, mu, nu, count)
    partition = mu.partition.trailing(update.ndim)
    spec = partition.spec
    bare = [replace(moment, partition=None) for moment in (mu, nu)]
    on_parts = partition.map_parts(step, (spec, spec, spec, PartitionSpec()), (spec, spec, spec))
    update, *new = on_parts(update, *bare, count)
    mu, nu = (replace(moment, partition=mu.partition) for moment in new)
    return update, mu, nu
