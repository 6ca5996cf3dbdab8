"""The dtypes in which this package computes, whatever `jax_numpy_dtype_promotion` is."""

from typing import Any

import jax
import jax.numpy as jnp


def promoted(one: Any, other: Any) -> Any:
    """The dtype to which JAX by default promotes two others, of which float8 counts as float32."""

    def known(dtype: Any) -> Any:
        is_float8 = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1
        return jnp.float32 if is_float8 else dtype

    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(known(one), known(other))


def widened(array: Any) -> jax.Array:
    """An array, or a number, in float32 or in its own dtype if that is wider or complex."""
    array = jnp.asarray(array)
    return array.astype(promoted(array.dtype, jnp.float32))
