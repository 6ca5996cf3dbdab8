"""The kernels for NVIDIA GPUs: Pallas with the Triton backend, sm_80 and later.

Consumer cards are why it is Triton: the Mosaic backend compiles for sm_90 and later alone.
Triton's arrays have sides that are powers of two, so tiles reach over the edges and are masked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from galore_jax.ops import adam8bit, lift
from galore_jax.ops.quantization import BLOCK, Quantized

ADAM_ROWS = 8
# Of the lift: rows, columns and ranks. Of three stages two lie in shared memory, 64 KiB of it in
# float32, where a block of an RTX 4090 has 99 KiB.
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
    """`ops.adam8bit.adam_8bit` in one pass, in place where the moments are donated."""
    shape = gradient.shape
    gradient, flat_mu, flat_nu = adam8bit.as_rows((gradient, mu, nu))
    # The whole of a last axis below 256 is one block.
    lanes = pl.next_power_of_2(min(BLOCK, gradient.shape[-1]))
    tile, one = (pl.BlockSpec((ADAM_ROWS, size), lambda i, j: (i, j)) for size in (lanes, 1))
    moment = Quantized(tile, one, mu.code), Quantized(tile, one, nu.code)
    numbers = jnp.stack(adam8bit.factors(count, b1, b2, eps))
    update = jax.ShapeDtypeStruct(gradient.shape, jnp.float32)
    update, new_mu, new_nu = pl.pallas_call(
        functools.partial(_adam_kernel, shape=gradient.shape),
        out_shape=(update, *_shapes((flat_mu, flat_nu))),
        grid=(pl.cdiv(gradient.shape[0], ADAM_ROWS), flat_mu.scales.shape[1]),
        in_specs=(pl.BlockSpec(), tile, *moment),
        out_specs=(tile, *moment),
        input_output_aliases={2: 1, 3: 2, 4: 3, 5: 4},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="adam_8bit",
    )(numbers, gradient, flat_mu, flat_nu)
    back = lambda new, old: new.reshape(old.shape)
    return update.reshape(shape), jax.tree.map(back, new_mu, mu), jax.tree.map(back, new_nu, nu)


def _adam_kernel(numbers, gradient, mu, nu, new_update, new_mu, new_nu, *, shape):
    starts = tuple(pl.program_id(axis) * size for axis, size in enumerate(gradient.shape))
    inside = _inside(starts, gradient.shape, shape)
    row_inside = _inside((starts[0], 0), mu.scales.shape, shape)

    def read(moment: Quantized, zero: int) -> Quantized:
        codes = plgpu.load(moment.codes, mask=inside, other=zero)
        return Quantized(codes, plgpu.load(moment.scales, mask=row_inside, other=0.0), moment.code)

    def write(moment: Quantized, new: Quantized) -> None:
        plgpu.store(moment.codes, new.codes, mask=inside)
        plgpu.store(moment.scales, new.scales, mask=row_inside)

    update, m, v = adam8bit.step(
        plgpu.load(gradient, mask=inside, other=0.0),
        read(mu, 127),
        read(nu, 0),
        adam8bit.Factors(*(numbers[i] for i in range(len(adam8bit.Factors._fields)))),
    )
    plgpu.store(new_update, update, mask=inside)
    write(new_mu, m)
    write(new_nu, v)


def lift_and_add(
    weights: jax.Array,
    left: jax.Array,
    right: jax.Array,
    scale: Any,
    decay: Any,
    seed: jax.Array | None = None,
    *,
    right_is_transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """`ops.lift.lift_and_add`; the lifted update is never in memory.

    In place where the weights are donated, under `jax.vmap` over stacked matrices too; a loop over
    them would copy each out of the stack.
    """
    numbers = jnp.stack([jnp.asarray(number, jnp.float32) for number in (scale, decay)])
    return pl.pallas_call(
        functools.partial(_lift_kernel, right_is_transposed=right_is_transposed),
        out_shape=_shapes(weights),
        grid=tuple(map(pl.cdiv, weights.shape, LIFT_TILE)),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=LIFT_STAGES),
        interpret=interpret,
        name="lift_and_add",
    )(weights, left, right, numbers, seed)


def _lift_kernel(weights, left, right, numbers, seed, new, *, right_is_transposed):
    height, width, depth = LIFT_TILE
    row, column = pl.program_id(0) * height, pl.program_id(1) * width

    def add_ranks(i: jax.Array, lifted: jax.Array) -> jax.Array:
        rank = i * depth
        own_left = _read(left, (row, rank), (height, depth))
        if right_is_transposed:
            own_right = _read(right, (column, rank), (width, depth))
        else:
            own_right = _read(right, (rank, column), (depth, width))
        return lifted + lift.product(own_left, own_right, right_is_transposed)

    ranks = pl.cdiv(left.shape[1], depth)
    lifted = lax.fori_loop(0, ranks, add_ranks, jnp.zeros((height, width), jnp.float32))
    start, size = (row, column), (height, width)
    own = _read(weights, start, size)
    own = lift.add(own, lifted, numbers[0], numbers[1], seed, start)
    plgpu.store(_tile(new, start, size), own, mask=_inside(start, size, new.shape))


def _read(ref: Any, starts: tuple, sizes: tuple[int, int]) -> jax.Array:
    inside = _inside(starts, sizes, ref.shape)
    return plgpu.load(_tile(ref, starts, sizes), mask=inside, other=0.0)


def _tile(ref: Any, starts: tuple, sizes: tuple[int, int]) -> Any:
    return ref.at[tuple(map(pl.ds, starts, sizes))]


def _inside(starts: tuple, sizes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Which numbers of a tile are numbers of a matrix of this shape."""
    rows, columns = (
        start + lax.broadcasted_iota(jnp.int32, sizes, axis) for axis, start in enumerate(starts)
    )
    return (rows < shape[0]) & (columns < shape[1])


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
