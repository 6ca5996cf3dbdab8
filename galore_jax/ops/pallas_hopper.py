"""The kernels for Hopper cards (sm_90): Pallas with the Mosaic GPU backend, from JAX 0.12 on.

What the kernels do not cover is left to plain JAX: they have no masks, so that blocks, or tiles of
an asynchronous copy, must fill the arrays.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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

# Its interface is another one in older versions, against which types may be checked.
plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")

# The warps of a thread block, and the threads of a warp.
WARPS, THREADS = 4, 32
# Rows and columns of a tile of the lift, of which so many columns are added at once; ranks per step
# of the pipeline, whose factors are copied so many steps ahead.
LIFT_TILE, LIFT_CHUNK = (128, 128), 32
LIFT_RANKS, LIFT_STEPS = 32, 4
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
    """`ops.adam_step.adam_8bit` in one pass over memory, in place if the moments are donated.

    It covers blocks along rows, of 256 numbers or the whole row of 32, 64 or 128, in arrays with a
    number of rows that is a multiple of four.
    """
    inputs = gradient if gradient.dtype in FLOATS else gradient.astype(jnp.float32), mu, nu
    rows, *moments = adam_step.as_rows(inputs)
    height, width = rows.shape
    block_size = min(BLOCK, width)
    covered = height % WARPS == 0 and width % block_size == 0 and block_size in (32, 64, 128, 256)
    if mu.axis == -2 or not covered:
        return adam_step.adam_8bit(gradient, mu, nu, count, b1=b1, b2=b2, eps=eps)
    tile_rows = next(rows for rows in (16, 8, 4) if height % rows == 0)
    scalars = jnp.stack(adam_step.adam_scalars(count, b1, b2, eps))
    # Codes and scales of the moments are overwritten.
    refs = jax.tree.map(jax.new_ref, moments)
    update = plgpu.kernel(
        functools.partial(_adam_kernel, tile_rows=tile_rows, block_size=block_size),
        out_type=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        grid=(height // tile_rows, width // block_size),
        grid_names=("rows", "blocks"),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(scalars, rows, *refs)
    outputs = update, *jax.tree.map(jax.freeze, refs)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), outputs, inputs)


def _adam_kernel(scalars, gradient, mu, nu, update, *, tile_rows: int, block_size: int):
    block, shape = lax.axis_index("blocks"), (tile_rows, block_size)
    rows = pl.ds(lax.axis_index("rows") * tile_rows, tile_rows)
    here = rows, pl.ds(block * block_size, block_size)
    # A warp has whole rows, so that the largest number of a block is found without shared memory.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS, block_size), (block_size // THREADS,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    across = lambda column: lax.broadcast_in_dim(column, shape, (0,))

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref.at[here], layout=layout, optimized=False)

    def load_moment(moment: Quantized) -> jax.Array:
        scales = moment.scales.at[rows, block]
        scale = plgpu.load(scales, layout=layout.reduce(1), optimized=False)
        codes = load(moment.codes).astype(jnp.int32)
        return decode(codes, signed=moment.code == "signed") * across(scale)

    def store(moment: Quantized, new: jax.Array) -> None:
        largest = block_max(new, keepdims=False)
        codes = encode(block_fractions(new, across(largest)), signed=moment.code == "signed")
        plgpu.store(moment.codes.at[here], codes.astype(jnp.uint8), optimized=False)
        plgpu.store(moment.scales.at[rows, block], largest, optimized=False)

    values = tuple(scalars[i] for i in range(scalars.shape[0]))
    old = load_moment(mu), load_moment(nu)
    new_update, m, v = adam_step.adam_formula(load(gradient), *old, values)
    plgpu.store(update.at[here], new_update, optimized=False)
    store(mu, m)
    store(nu, v)


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
    property. It covers weights in float32 and bfloat16 whose rows are a multiple of 8 and columns
    of 16, and ranks that are multiples of 32. Products are those of TF32, whose instruction takes
    factors by rows of ranks: a right factor that is not transposed is transposed first.
    """
    rows, columns = weights.shape
    covered = rows % 8 == 0 and columns % 16 == 0 and left.shape[1] % LIFT_RANKS == 0
    if weights.dtype not in FLOATS or not covered:
        plain = lift.one_after_another(right_is_transposed=right_is_transposed, start=start)
        return plain(weights, left, right, scale, decay, seed)
    factors = left, right if right_is_transposed else right.T
    scalars = jnp.stack([jnp.asarray(scalar, jnp.float32) for scalar in (scale, decay)])
    places = jnp.stack([jnp.asarray(place, jnp.int32) for place in start])
    transforms = _transforms(32, weights.dtype)
    ref = jax.new_ref(weights)
    plgpu.kernel(
        _lift_kernel,
        grid=(pl.cdiv(rows, LIFT_TILE[0]), pl.cdiv(columns, LIFT_TILE[1])),
        grid_names=("rows", "columns"),
        scratch_types=(
            plgpu.SMEM(LIFT_TILE, weights.dtype, transforms=transforms),
            plgpu.Barrier(),
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        *(x.astype(jnp.float32) for x in factors),
        scalars,
        places,
        *([] if seed is None else [seed]),
        ref,
    )
    return jax.freeze(ref)


def _lift_kernel(left, right, scalars, places, *refs):
    *seeds, weights, tile, arrived = refs
    (height, width), ranks = LIFT_TILE, LIFT_RANKS
    i, j = lax.axis_index("rows"), lax.axis_index("columns")
    here = weights.at[pl.ds(i * height, height), pl.ds(j * width, width)]
    plgpu.copy_gmem_to_smem(here, tile, arrived)

    def product(sum_of_products: Any) -> jax.Array:
        def add_ranks(_: Any, left_tile: Any, right_tile: Any) -> None:
            plgpu.wgmma(sum_of_products, left_tile, right_tile.T)
            plgpu.wgmma_wait(1)

        block = functools.partial(
            plgpu.BlockSpec, transforms=_transforms(128, left.dtype), delay_release=1
        )
        plgpu.emit_pipeline(
            add_ranks,
            grid=(left.shape[1] // ranks,),
            in_specs=[
                block((height, ranks), lambda k: (i, k)),
                block((width, ranks), lambda k: (j, k)),
            ],
            max_concurrent_steps=LIFT_STEPS,
        )(left, right)
        return sum_of_products[...]

    lifted = pl.run_scoped(product, plgpu.ACC(LIFT_TILE, jnp.float32))
    plgpu.barrier_wait(arrived)
    row, column = places[0] + i * height, places[1] + j * width
    for first in range(0, width, LIFT_CHUNK):
        chunk = tile.at[:, pl.ds(first, LIFT_CHUNK)]
        old = plgpu.load(chunk, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
        update = lifted[:, first : first + LIFT_CHUNK]
        new = lift.add(old, update, scalars[0], scalars[1], None, (0, 0))
        if seeds and weights.dtype == jnp.bfloat16:
            seed = seeds[0][0], seeds[0][1]
            new = round_with_noise(new, noise(seed, row, column + first, (height, LIFT_CHUNK)))
        plgpu.store(chunk, new.astype(weights.dtype), optimized=False)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, here)
    plgpu.wait_smem_to_gmem(0)


def _transforms(swizzle: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile lies in shared memory, so that threads read different banks: swizzled bytes."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return tiling, plgpu.SwizzleTransform(swizzle)
