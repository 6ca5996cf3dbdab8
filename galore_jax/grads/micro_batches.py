"""Micro-batches: a batch split into equal parts, and the mean of a function over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.grads.projected_product import varying_as
from galore_jax.ops.partition import specs_of, with_auto_axes
from galore_jax.ops.precision import promoted
from galore_jax.types import PyTree


def mean_over(f: Callable[..., PyTree], micro_batches: int, *batch: Any) -> PyTree:
    """The mean of `f` over equal parts of the batch; for one part, `f(*batch)`.

    Means are float32, or have the dtype of the leaf if that is wider or complex. Leaves without a
    mean (see `has_mean`) are those of the last part.
    """
    if micro_batches == 1:
        return f(*batch)
    parts = split(batch, micro_batches)
    first = jax.tree.map(lambda rows: rows[0], parts)
    shapes, structure = jax.tree.flatten(jax.eval_shape(f, *first))
    averaged = [i for i, leaf in enumerate(shapes) if has_mean(leaf)]

    def add(total: dict[int, Any], part: Any) -> tuple[dict[int, Any], dict[int, Any]]:
        new = dict(enumerate(jax.tree.leaves(f(*part))))
        total = {i: total[i] + jnp.asarray(new.pop(i), total[i].dtype) for i in averaged}
        return total, new

    def zeros(leaf: Any) -> jax.Array:
        array = varying_as(jnp.zeros(leaf.shape, promoted(leaf.dtype, jnp.float32)), leaf)
        # The sum has the sharding type of the parts.
        return with_auto_axes(lambda array: array, array, out=lambda: specs_of(leaf))

    total, others = lax.scan(add, {i: zeros(shapes[i]) for i in averaged}, parts)
    means = {i: leaf / micro_batches for i, leaf in total.items()}
    found = means | {i: leaf[-1] for i, leaf in others.items()}
    return structure.unflatten([found[i] for i in range(len(shapes))])


def mean_of_stack(leaf: jax.Array) -> jax.Array:
    """The mean over the first axis, of parts, as `mean_over` gives it; or the last part."""
    if not has_mean(leaf):
        return leaf[-1]
    return jnp.mean(leaf, axis=0, dtype=promoted(leaf.dtype, jnp.float32))


def has_mean(leaf: Any) -> bool:
    """Whether a leaf is averaged; PRNG keys and unsigned integers, such as counts, are not."""
    dtype = jnp.result_type(leaf)
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return not (is_key or jnp.issubdtype(dtype, jnp.unsignedinteger))


def split(batch: Any, micro_batches: int) -> Any:
    """Splits arrays (B, …) into equal parts, (micro_batches, B / micro_batches, …).

    Part i has the rows i, i + micro_batches, …: every part of a batch that is divided over devices
    is divided over all of them.

    Raises:
      ValueError: as for `check_rows`.
    """
    check_rows(batch, micro_batches, "micro-batches")

    def parts(rows: Any) -> jax.Array:
        rows = jnp.asarray(rows)
        return rows.reshape(-1, micro_batches, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(parts, batch)


def check_rows(batch: Any, count: int, parts: str) -> None:
    """Raises a ValueError unless arrays (B, …) of a batch can be split into `count` equal parts."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    rows = {shape[:1] for shape in shapes}
    if len(rows) != 1 or rows == {()} or rows.pop()[0] % count:
        raise ValueError(
            f"a batch of arrays with the shapes {shapes} cannot be split into {count} {parts}: "
            "their first axes must have one size, a multiple of that number. Arguments passed by "
            "keyword are not split."
        )
