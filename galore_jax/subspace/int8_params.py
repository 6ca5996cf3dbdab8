"""Which parameters are stored in 8 bits."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.ops.int8 import is_int8, quantized, worth_int8
from galore_jax.subspace.matrix_view import is_vector, named_leaves, unboxed
from galore_jax.types import PyTree


def to_int8(params: PyTree) -> PyTree:
    """Parameters with matrices in 8 bits: kernels, embeddings and heads, also stacks of them.

    They take a quarter of the memory of float32. Biases, scales and norms, recognised by name, stay
    as they are, and so do matrices with rows of fewer than 32 numbers. The result goes wherever
    this package takes parameters, on one device: `init`, `value_and_grad`, `refresh`,
    `apply_gradients`, `make_step`. Pass a key to the last two: without stochastic rounding, updates
    of less than half the distance between two codes, 1/254 of the largest magnitude in a row, are
    lost. `optax.apply_updates` does not take them.

    Flax modules take such parameters as they are, and dequantise each where they read it. In other
    losses call `to_arrays`, best for one layer at a time, and also before anything that maps over
    the leaves, such as a penalty or a cast. Under `jax.checkpoint`, `nn.remat` or in layer-wise
    steps the backward pass dequantises again; otherwise it keeps the arrays.

    Args:
      params: arrays, in any tree; boxes of Flax and others are taken off.

    Returns:
      The tree, with `galore_jax.ops.int8.Int8` nodes for matrices, rounded to nearest: the error is
      at most 1/254 of the largest magnitude in the row, and that of the array's dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from galore_jax import to_arrays, to_int8
      >>> params = to_int8({"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)})
      >>> params["kernel"].codes.dtype, params["kernel"].scales.shape, params["bias"].dtype
      (dtype('int8'), (64, 1), dtype('float32'))
      >>> to_arrays(params)["kernel"].dtype
      dtype('float32')
    """
    params = unboxed(params)

    def at_leaf(names: tuple[str, ...], leaf: Any) -> Any:
        if is_int8(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        if is_vector(names) or not worth_int8(jnp.shape(leaf)):
            return leaf
        return quantized(jnp.asarray(leaf))

    new = [at_leaf(*named) for named in named_leaves(params)]
    return jax.tree.structure(params, is_leaf=is_int8).unflatten(new)
