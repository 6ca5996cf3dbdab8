"""Block-wise codes against a table computed from their definition, and stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_jax.ops.precision import stochastic_round
from galore_jax.ops.quantization import (
    Quantized,
    decode,
    dequantize,
    encode,
    quantize,
    stored_like,
    zeros_like,
)

CODES = ("signed", "unsigned", "int8", "int4")


def table(code):
    """The values of a code in ascending order, from arXiv 2110.02861's description, in float64."""
    if code in ("int8", "int4"):
        largest = 127 if code == "int8" else 7
        return np.arange(-largest, largest + 1) / largest
    values = [0.0, 1.0]
    for decade in range(7):
        number = 2**decade if code == "signed" else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1, number + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *(-middles if code == "signed" else [])]
    return np.sort(values)


def samples(code, number=20_000):
    generator = np.random.default_rng(0)
    sizes = np.concatenate(
        [generator.uniform(0, 1, number), 10 ** generator.uniform(-9, 0, number)]
    )
    signs = 1 if code == "unsigned" else generator.choice([-1, 1], sizes.size)
    return (sizes * signs).astype(np.float32)


@pytest.mark.parametrize("code", ["signed", "unsigned"])
def test_the_dynamic_codes_have_the_values_of_their_definition(code):
    values = decode(jnp.arange(256), signed=code == "signed")
    assert len(table(code)) == 256
    # The values are the result of three operations in float32.
    np.testing.assert_allclose(values, table(code), rtol=4 * 2**-24, atol=0)
    np.testing.assert_array_equal(encode(values, signed=code == "signed"), np.arange(256))


@pytest.mark.parametrize("code", CODES)
def test_a_number_gets_the_nearest_value(code):
    fractions = samples(code)
    # Each row is a block whose first number is the largest.
    scale = 3.7
    blocks = np.concatenate([np.ones((len(fractions) // 250, 1)), fractions.reshape(-1, 250)], 1)
    found = np.asarray(dequantize(quantize(jnp.asarray(blocks * scale), code)), np.float64)
    distances = np.abs(blocks[..., None] - table(code))
    if code == "unsigned":  # Only zero becomes zero.
        distances[blocks > 0, 0] = np.inf
    nearest = distances.min(axis=-1)
    # Rounding of the fraction decides for numbers near the midpoint of two values.
    assert (np.abs(found / scale - blocks) - nearest <= 2**-21 * np.abs(blocks)).all()


@settings(max_examples=40, deadline=None)
@given(
    code=st.sampled_from(CODES),
    shape=st.sampled_from([(), (2, 2)]),
    length=st.sampled_from([1, 256, 600]),
    exponent=st.integers(-30, 37),  # Fractions of smaller numbers are subnormal.
    seed=st.integers(0, 2**31),
)
def test_a_round_trip_keeps_shape_zeros_signs_and_the_bound_of_its_error(
    code, shape, length, exponent, seed
):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(*shape, length)) * generator.integers(0, 2, (*shape, length))
    x = np.asarray((np.abs(x) if code == "unsigned" else x) * 10.0**exponent, np.float32)
    quantized = quantize(jnp.asarray(x), code)
    found = np.asarray(dequantize(quantized))
    assert quantized.shape == found.shape == x.shape
    assert quantized.codes.dtype == (jnp.int8 if code == "int8" else jnp.uint8)
    if code == "int4":  # Two share a byte, in whole blocks.
        size = min(length, 256)
        assert quantized.codes.shape == (*shape, -(-length // size) * -(-size // 2))
    else:
        assert quantized.codes.shape == x.shape
    assert quantized.scales.shape == (*shape, -(-length // 256))
    assert (found[x == 0] == 0).all()
    assert (found * np.sign(x) >= 0).all()
    for start in range(0, length, 256):
        block, back = x[..., start : start + 256], found[..., start : start + 256]
        largest = np.abs(block).max(axis=-1, keepdims=True).astype(np.float64)
        # Half the largest distance between values: 0.9 / 64 in the seventh decade of "signed".
        halves = {"signed": 0.45 / 64, "unsigned": 0.45 / 128, "int8": 0.5 / 127, "int4": 0.5 / 7}
        bound = (halves[code] + 1e-6) * largest
        assert (np.abs(back - block.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("code", CODES)
def test_a_block_with_a_number_that_is_not_finite_becomes_nan_and_the_others_do_not_change(code):
    for bad in (np.nan, np.inf):
        x = np.ones((2, 600), np.float32)
        x[1, 300] = bad
        found = np.array(dequantize(quantize(jnp.asarray(x), code)))
        assert np.isnan(found[1, 256:512]).all()
        found[1, 256:512] = 1
        np.testing.assert_array_equal(found, np.ones((2, 600)))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(600, 33), (2, 3, 256, 5), (7, 4)])
def test_blocks_down_the_columns_are_those_of_the_transpose(shape, code):
    x = jnp.abs(jax.random.normal(jax.random.key(0), shape))
    found, transposed = quantize(x, code, axis=-2), quantize(x.mT, code)
    assert found.shape == x.shape
    np.testing.assert_array_equal(found.codes, transposed.codes.mT)
    np.testing.assert_array_equal(found.scales, transposed.scales.mT)
    np.testing.assert_array_equal(dequantize(found), dequantize(transposed).mT)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 300), -1), ((70,), -1), ((2, 0), -1), ((0, 5), -1), ((300, 3), -2), ((0, 5), -2)],
)
def test_zeros_and_empty_arrays_have_codes(shape, axis, code):
    found, wanted = zeros_like(jnp.ones(shape), code, axis), quantize(jnp.zeros(shape), code, axis)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(dequantize(found), jnp.zeros(shape), strict=True)


def test_an_array_is_stored_as_another_one_is():
    x = jnp.linspace(-1, 1, 300).reshape(2, 150)
    stored = stored_like(x, quantize(jnp.zeros((2, 150)), "int8", axis=-2))
    assert isinstance(stored, Quantized)
    assert (stored.code, stored.axis) == ("int8", -2)
    assert stored_like(x, jnp.zeros((), jnp.bfloat16)).dtype == jnp.bfloat16


def test_numbers_that_bfloat16_represents_and_nan_are_unchanged():
    x = jax.random.normal(jax.random.key(0), (1000,)).astype(jnp.bfloat16)
    x = jnp.concatenate([x, jnp.array([0.0, -0.0, jnp.inf, -jnp.inf], jnp.bfloat16)])
    rounded = stochastic_round(x.astype(jnp.float32), jax.random.key(1))
    np.testing.assert_array_equal(rounded.view(jnp.uint16), x.view(jnp.uint16))
    assert bool(jnp.isnan(stochastic_round(jnp.array([jnp.nan]), jax.random.key(0))).all())


def test_a_number_goes_to_one_of_its_two_neighbours():
    x = jax.random.normal(jax.random.key(0), (10_000,))
    rounded = stochastic_round(x, jax.random.key(1)).astype(jnp.float32)
    # The spacing of bfloat16 is 2^-7 times the largest power of two that is at most |x|.
    spacing = 2.0 ** (jnp.floor(jnp.log2(jnp.abs(x))) - 7)
    assert bool((jnp.abs(rounded - x) < spacing).all())


def test_the_mean_is_the_number():
    # 0.3 of the way from 1 to its neighbour 1 + 2^-7; 200,000 draws: standard error 0.46/447.
    x = jnp.full(200_000, 1 + 0.3 * 2.0**-7)
    for sign in (1, -1):
        up = stochastic_round(sign * x, jax.random.key(0)).astype(jnp.float32) * sign > 1
        assert abs(float(up.mean()) - 0.3) < 5 * 0.46 / 447
