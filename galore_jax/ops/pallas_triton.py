"""The kernels for NVIDIA GPUs that `pallas_hopper` does not reach: Pallas with the Triton backend.

JAX has deprecated this backend, and warns where it is used, but Mosaic GPU compiles for sm_90 and
later only. The sides of Triton's arrays are powers of two, so tiles reach past the edges of a
matrix and are masked there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from galore_jax.ops import adam_step, lift
from galore_jax.ops.quantization import (
    BLOCK,
    Quantized,
    block_fractions,
    block_max,
    decode,
    encode,
    zero_code,
)

ADAM_ROWS = 8
# Rows, columns and ranks per tile of the lift. Two of the three pipeline stages reside in shared
# memory: 64 KiB in float32, below the 99 KiB that a thread block has on an RTX 4090.
LIFT_TILE = (128, 128, 32)
LIFT_STAGES = 3


def adam_8bit(
    gradient: jax.Array,
    mu: Quantized,
    nu: Quantized,
    count: Any,
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    interpret: bool = False,
) -> tuple[jax.Array, Quantized, Quantized]:
    """`ops.adam_step.adam_8bit` in one pass over memory, in place if the moments are donated."""
    # View everything as matrices, and divide them into tiles of one block per row, or per column.
    inputs = gradient, mu, nu
    by_columns = mu.axis == -2
    order = reversed if by_columns else iter
    if by_columns and gradient.ndim > 2 and gradient.shape[-2] % BLOCK:
        return adam_step.adam_8bit(gradient, mu, nu, count, b1=b1, b2=b2, eps=eps)
    stacked = lambda x: x.reshape(-1, x.shape[-1])
    matrix, *moments = jax.tree.map(stacked, inputs) if by_columns else adam_step.as_rows(inputs)
    others, _ = order(matrix.shape)
    _, blocks = order(moments[0].scales.shape)
    # An axis shorter than 256 forms a single block.
    block_size = pl.next_power_of_2(min(BLOCK, gradient.shape[mu.axis]))
    tile, scale_tile = (
        pl.BlockSpec(tuple(order((ADAM_ROWS, size))), lambda i, j: tuple(order((i, j))))
        for size in (block_size, 1)
    )
    tiles = [Quantized(tile, scale_tile, moment.code, moment.axis) for moment in moments]

    # Codes and scales of the moments are overwritten.
    outputs = pl.pallas_call(
        functools.partial(_adam_kernel, shape=matrix.shape, by_columns=by_columns),
        out_shape=(jax.ShapeDtypeStruct(matrix.shape, jnp.float32), *jax.eval_shape(list, moments)),
        grid=(pl.cdiv(others, ADAM_ROWS), blocks),
        in_specs=(pl.BlockSpec(), tile, *tiles),
        out_specs=(tile, *tiles),
        input_output_aliases={2: 1, 3: 2, 4: 3, 5: 4},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="adam_8bit",
    )(jnp.stack(adam_step.adam_scalars(count, b1, b2, eps)), matrix, *moments)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), outputs, inputs)


def _adam_kernel(scalars, gradient, mu, nu, new_update, new_mu, new_nu, *, shape, by_columns: bool):
    order, along = (reversed, 0) if by_columns else (iter, 1)
    others, block_size = order(gradient.shape)
    first = pl.program_id(0) * others
    mask = _in_bounds(tuple(order((first, pl.program_id(1) * block_size))), gradient.shape, shape)
    scale_mask = _in_bounds(tuple(order((first, 0))), mu.scales.shape, shape)

    def load(moment: Quantized) -> jax.Array:
        codes = plgpu.load(moment.codes, mask=mask, other=zero_code(moment.code))
        scale = plgpu.load(moment.scales, mask=scale_mask, other=0.0)
        return decode(codes.astype(jnp.int32), signed=moment.code == "signed") * scale

    def store(moment: Quantized, new: jax.Array) -> None:
        largest = block_max(new, axis=along)
        codes = encode(block_fractions(new, largest), signed=moment.code == "signed")
        plgpu.store(moment.codes, codes.astype(jnp.uint8), mask=mask)
        plgpu.store(moment.scales, largest, mask=scale_mask)

    values = tuple(scalars[i] for i in range(scalars.shape[0]))
    numbers = plgpu.load(gradient, mask=mask, other=0.0)
    update, m, v = adam_step.adam_formula(numbers, load(mu), load(nu), values)
    plgpu.store(new_update, update, mask=mask)
    store(new_mu, m)
    store(new_nu, v)


def lift_and_add(
    weights: jax.Array,
    left: jax.Array,
    right: jax.Array,
    scale: Any,
    decay: Any,
    seed: jax.Array | None = None,
    *,
    right_is_transposed: bool = False,
    start: tuple[Any, Any] = (0, 0),
    interpret: bool = False,
) -> jax.Array:
    """`ops.lift.lift_and_add` without ever storing the lifted update in global memory.

    Works in place if the weights are donated. For stacked matrices use `jax.vmap`, which keeps this
    property; a loop over them would copy each out of the stack.
    """
    places = jnp.stack([jnp.asarray(place, jnp.int32) for place in start])
    scalars = jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in (scale, decay)])
    return pl.pallas_call(
        functools.partial(_lift_kernel, right_is_transposed=right_is_transposed),
        out_shape=jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        grid=tuple(map(pl.cdiv, weights.shape, LIFT_TILE)),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=LIFT_STAGES),
        interpret=interpret,
        name="lift_and_add",
    )(weights, left, right, scalars, places, seed)


def _lift_kernel(weights, left, right, scalars, places, seed, new_weights, *, right_is_transposed):
    height, width, depth = LIFT_TILE
    row, column = pl.program_id(0) * height, pl.program_id(1) * width

    def add_ranks(i: jax.Array, lifted: jax.Array) -> jax.Array:
        rank = i * depth
        left_tile = _load(left, (row, rank), (height, depth))
        if right_is_transposed:
            right_tile = _load(right, (column, rank), (width, depth))
        else:
            right_tile = _load(right, (rank, column), (depth, width))
        return lifted + lift.product(left_tile, right_tile, right_is_transposed)

    rank_tiles = pl.cdiv(left.shape[1], depth)
    lifted = lax.fori_loop(0, rank_tiles, add_ranks, jnp.zeros((height, width), jnp.float32))
    start, size = (row, column), (height, width)
    tile = _load(weights, start, size)
    place = places[0] + row, places[1] + column
    tile = lift.add(tile, lifted, scalars[0], scalars[1], seed, place)
    mask = _in_bounds(start, size, new_weights.shape)
    plgpu.store(_tile_ref(new_weights, start, size), tile, mask=mask)


def _load(ref: Any, starts: tuple, sizes: tuple[int, int]) -> jax.Array:
    mask = _in_bounds(starts, sizes, ref.shape)
    return plgpu.load(_tile_ref(ref, starts, sizes), mask=mask, other=0.0)


def _tile_ref(ref: Any, starts: tuple, sizes: tuple[int, int]) -> Any:
    return ref.at[tuple(map(pl.ds, starts, sizes))]


def _in_bounds(starts: tuple, sizes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Which elements of a tile are within a matrix of this shape, a boolean mask."""
    rows, columns = (
        start + lax.broadcasted_iota(jnp.int32, sizes, axis) for axis, start in enumerate(starts)
    )
    return (rows < shape[0]) & (columns < shape[1])
