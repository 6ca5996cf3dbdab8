"""Batches split into equal parts, over which a function is averaged."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.grads.projected_product import varying_as
from galore_jax.types import PyTree


def check_micro_batches(micro_batches: Any) -> None:
    """Raises a ValueError unless it is a whole number of at least 1."""
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, Integral):
        raise ValueError(f"micro_batches must be a whole number, not {micro_batches!r}.")
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, not {micro_batches}.")


def mean_over(f: Callable[..., PyTree], micro_batches: int, *batch: Any) -> PyTree:
    """`f(*batch)`, or over equal parts of the batch the mean of what `f` returns, in float32."""
    if micro_batches == 1:
        return f(*batch)
    parts = split(batch, micro_batches)
    shapes = jax.eval_shape(f, *first_part(batch, micro_batches))

    def add(total: PyTree, part: Any) -> tuple[PyTree, None]:
        return jax.tree.map(
            lambda old, new: old + jnp.asarray(new, jnp.float32), total, f(*part)
        ), None

    zeros = jax.tree.map(lambda leaf: varying_as(jnp.zeros(leaf.shape, jnp.float32), leaf), shapes)
    total, _ = lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / micro_batches, total)


def first_part(batch: Any, micro_batches: int) -> Any:
    """The first of the equal parts of a batch; of one part the batch, whatever it holds."""
    if micro_batches == 1:
        return batch
    return jax.tree.map(lambda parts: parts[0], split(batch, micro_batches))


def split(batch: Any, micro_batches: int) -> Any:
    """A batch of arrays (B, …) as equal parts, (micro_batches, B / micro_batches, …).

    Raises:
      ValueError: an array cannot be split so.
    """

    def parts(rows: Any) -> jax.Array:
        rows = jnp.asarray(rows)
        if rows.ndim == 0 or rows.shape[0] % micro_batches:
            raise ValueError(
                f"an array of the batch, shape {rows.shape}, cannot be split into "
                f"{micro_batches} micro-batches: its first axis must be a multiple of them; what "
                "is not to be split goes by keyword."
            )
        return rows.reshape(micro_batches, -1, *rows.shape[1:])

    return jax.tree.map(parts, batch)
