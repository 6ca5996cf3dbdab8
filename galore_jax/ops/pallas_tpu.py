"""The kernels for TPUs, v5e and later: Pallas with the Mosaic backend.

A grid step works on a tile in VMEM, in chunks of rows that are small enough for the registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from galore_jax.ops import adam_step, lift
from galore_jax.ops.noise import noise
from galore_jax.ops.precision import round_with_noise
from galore_jax.ops.quantization import (
    BLOCK,
    Quantized,
    block_fractions,
    block_max,
    decode,
    encode,
)

# Rows and blocks of 256 columns of a tile of 8-bit Adam, and the rows of a chunk, or columns where
# a block is a part of a column: those of a tile of 8-bit codes in a TPU's memory.
ADAM_TILE = (256, 4)
ADAM_CHUNK, ADAM_CHUNK_BY_COLUMNS = 32, 128
# Rows and columns of a tile of the lift, of which so many rows are multiplied at once, and the
# largest rank: the factors of a tile have at most 2^21 elements each.
LIFT_ROWS, LIFT_COLUMNS = 2048, 512
LIFT_CHUNK, LIFT_RANKS = 512, 4096
# Rows that are added and rounded at a time.
ROWS_ADDED = 64
# Bytes of VMEM that a kernel may use; a TPU v4 has fewer.
VMEM = 64 * 2**20
FLOATS = (jnp.float32, jnp.bfloat16)


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
    inputs = gradient if gradient.dtype in FLOATS else gradient.astype(jnp.float32), mu, nu
    # View everything as a batch of matrices, whose blocks lie along the rows, or down the columns.
    is_transposed = gradient.ndim > 1 and _lies_by_columns(gradient)
    by_columns = is_transposed != (mu.axis == -2)
    if mu.axis == -1 and not is_transposed:
        to_matrices = lambda x: x[None]
        inputs = adam_step.as_rows(inputs)
    else:
        batch = lambda x: x.reshape(-1, *x.shape[-2:])
        to_matrices = (lambda x: batch(x).mT) if is_transposed else batch
    matrices, *moments = jax.tree.map(to_matrices, inputs)
    order = reversed if by_columns else iter
    others, width = order(matrices.shape[1:])
    _, blocks = order(moments[0].scales.shape[1:])

    # An axis shorter than 256 forms a single block.
    block_size = min(BLOCK, width)
    chunk = ADAM_CHUNK_BY_COLUMNS if by_columns else ADAM_CHUNK
    tile_others = min(ADAM_TILE[0], pl.cdiv(others, chunk) * chunk)
    tile_blocks = min(ADAM_TILE[1], blocks)
    tile = pl.BlockSpec(
        (None, *order((tile_others, tile_blocks * block_size))), lambda b, i, j: (b, *order((i, j)))
    )
    # The scales of whole rows, or columns, stay in VMEM until all their blocks are done.
    scale_tile = pl.BlockSpec(
        (None, *order((tile_others, blocks))), lambda b, i, j: (b, *order((i, 0)))
    )
    tiles = [Quantized(tile, scale_tile, moment.code, moment.axis) for moment in moments]

    # Codes and scales of the moments are overwritten.
    outputs = pl.pallas_call(
        functools.partial(
            _adam_kernel, width=width, block_size=block_size, chunk=chunk, by_columns=by_columns
        ),
        out_shape=(
            jax.ShapeDtypeStruct(matrices.shape, jnp.float32),
            *jax.eval_shape(list, moments),
        ),
        grid=(len(matrices), pl.cdiv(others, tile_others), pl.cdiv(blocks, tile_blocks)),
        in_specs=(pl.BlockSpec(memory_space=pltpu.SMEM), tile, *tiles),
        out_specs=(tile, *tiles),
        input_output_aliases={2: 1, 3: 2, 4: 3, 5: 4},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="adam_8bit",
    )(jnp.stack(adam_step.adam_scalars(count, b1, b2, eps)), matrices, *moments)
    outputs = jax.tree.map(lambda x: x.mT, outputs) if is_transposed else outputs
    return jax.tree.map(lambda new, old: new.reshape(old.shape), outputs, (gradient, mu, nu))


def _adam_kernel(
    scalars,
    gradient,
    mu,
    nu,
    new_update,
    new_mu,
    new_nu,
    *,
    width: int,
    block_size: int,
    chunk: int,
    by_columns: bool,
):
    order, along = (reversed, 0) if by_columns else (iter, 1)
    others, size = order(gradient.shape)
    blocks = size // block_size
    first_block = pl.program_id(2) * blocks
    values = tuple(scalars[i] for i in range(scalars.shape[0]))
    _, all_blocks = order(mu.scales.shape)
    scale_number = lax.broadcasted_iota(jnp.int32, tuple(order((chunk, all_blocks))), along)

    def step_block(i: jax.Array, block: Any) -> None:
        number, part = first_block + block, pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        here = tuple(order((part, pl.ds(block * block_size, block_size))))
        scales, is_own = tuple(order((part, slice(None)))), scale_number == number

        def load(moment: Quantized) -> jax.Array:
            codes = moment.codes[here].astype(jnp.int32)
            own = jnp.where(is_own, moment.scales[scales], 0)
            scale = jnp.sum(own, axis=along, keepdims=True)
            return decode(codes, signed=moment.code == "signed") * scale

        def store(moment: Quantized, new: jax.Array) -> None:
            if width % block_size:
                # What is beyond the edge does not belong to the block.
                place = number * block_size + lax.broadcasted_iota(jnp.int32, new.shape, along)
                new = jnp.where(place < width, new, 0)
            largest = block_max(new, axis=along)
            codes = encode(block_fractions(new, largest), signed=moment.code == "signed")
            moment.codes[here] = codes.astype(jnp.uint8)
            moment.scales[scales] = jnp.where(is_own, largest, moment.scales[scales])

        update, m, v = adam_step.adam_formula(gradient[here], load(mu), load(nu), values)
        new_update[here] = update
        store(new_mu, m)
        store(new_nu, v)

    def step_chunk(i: jax.Array, _: None) -> None:
        if by_columns:  # A block of 128 columns is large enough to hide latencies.
            lax.fori_loop(0, blocks, lambda block, _: step_block(i, block), None)
        else:
            for block in range(blocks):
                step_block(i, block)

    lax.fori_loop(0, others // chunk, step_chunk, None)


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
    """`ops.lift.lift_and_add` without ever storing the lifted update in the device's memory.

    Works in place if the weights are donated. For stacked matrices use `jax.vmap`, which keeps this
    property. What the kernel does not cover is left to `ops.lift`: weights of other dtypes than
    float32 and bfloat16, ranks above 4,096, and parts of a matrix whose width is not a multiple of
    four, since random bits are drawn for four columns at once.
    """
    is_aligned = weights.shape[1] % 4 == 0 or (isinstance(start[1], int) and start[1] % 4 == 0)
    if weights.dtype not in FLOATS or left.shape[1] > LIFT_RANKS or not is_aligned:
        plain = lift.one_after_another(right_is_transposed=right_is_transposed, start=start)
        return plain(weights, left, right, scale, decay, seed)
    by_columns = _lies_by_columns(weights)
    if by_columns:
        factors, right_is_transposed = (right if right_is_transposed else right.T, left), True
    else:
        factors = left, right
    matrix = weights.T if by_columns else weights
    (height, width), rank = matrix.shape, left.shape[1]
    tiles = pl.cdiv(height, min(LIFT_ROWS, LIFT_RANKS // rank * LIFT_CHUNK))
    rows = pl.cdiv(height, tiles * LIFT_CHUNK) * LIFT_CHUNK
    tile = pl.BlockSpec((rows, LIFT_COLUMNS), lambda i, j: (i, j))
    left_tile = pl.BlockSpec((rows, rank), lambda i, j: (i, 0))
    if right_is_transposed:
        right_tile = pl.BlockSpec((LIFT_COLUMNS, rank), lambda i, j: (j, 0))
    else:
        right_tile = pl.BlockSpec((rank, LIFT_COLUMNS), lambda i, j: (0, j))
    scalars = jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in (scale, decay)])
    places = jnp.stack([jnp.asarray(place, jnp.int32) for place in start])
    # Matrices of one row, of which whole blocks remain where `jax.vmap` adds an axis.
    numbers = [x[None] for x in (scalars, places, seed) if x is not None]
    new = pl.pallas_call(
        functools.partial(
            _lift_kernel, right_is_transposed=right_is_transposed, by_columns=by_columns
        ),
        out_shape=jax.ShapeDtypeStruct(matrix.shape, matrix.dtype),
        grid=(tiles, pl.cdiv(width, LIFT_COLUMNS)),
        in_specs=(
            *(tile, left_tile, right_tile),
            *(pl.BlockSpec(x.shape, lambda i, j: (0, 0), memory_space=pltpu.SMEM) for x in numbers),
        ),
        out_specs=tile,
        scratch_shapes=(pltpu.VMEM((LIFT_CHUNK, LIFT_COLUMNS), jnp.float32),),
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="lift_and_add",
    )(matrix, *(x if x.dtype in FLOATS else x.astype(jnp.float32) for x in factors), *numbers)
    return new.T if by_columns else new


def _lift_kernel(
    weights, left, right, scalars, places, *refs, right_is_transposed: bool, by_columns: bool
):
    *seeds, new_weights, lifted = refs
    is_rounded = bool(seeds) and weights.dtype == jnp.bfloat16
    height, width = weights.shape
    tile_start = pl.program_id(0) * height, pl.program_id(1) * width

    def lift_rows(i: jax.Array, _: None) -> None:
        left_rows = left[pl.ds(i * LIFT_CHUNK, LIFT_CHUNK), :]
        lifted[...] = lift.product(left_rows, right[...], right_is_transposed)

        def add_rows(j: jax.Array, _: None) -> None:
            first = i * LIFT_CHUNK + j * ROWS_ADDED
            here = pl.ds(first, ROWS_ADDED), slice(None)
            old, update = weights[here], lifted[pl.ds(j * ROWS_ADDED, ROWS_ADDED), :]
            scale, decay = scalars[0, 0], scalars[0, 1]
            new = lift.add(old.astype(jnp.float32), update, scale, decay, None, (0, 0))
            if is_rounded:
                seed = seeds[0][0, 0], seeds[0][0, 1]
                start = tile_start[0] + first, tile_start[1]
                row, column = reversed(start) if by_columns else start
                place = places[0, 0] + row, places[0, 1] + column
                bits = noise(seed, *place, new.shape, transposed=by_columns)
                new = round_with_noise(new, bits)
            new_weights[here] = new.astype(weights.dtype)

        lax.fori_loop(0, LIFT_CHUNK // ROWS_ADDED, add_rows, None)

    lax.fori_loop(0, height // LIFT_CHUNK, lift_rows, None)


def _lies_by_columns(array: jax.Array) -> bool:
    """Whether XLA lays out the matrices of an array by columns, so that tiles of 8 × 128 fit them.

    The transpose, a matrix by rows, then costs nothing, while the array by rows would be a copy.
    """
    rows, columns = array.shape[-2:]
    return rows % 128 == 0 and columns % 128 != 0
