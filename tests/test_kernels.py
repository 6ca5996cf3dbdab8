"""The kernels, interpreted on the CPU, and plain JAX, all against formulas in float64."""

import functools
import itertools
from dataclasses import replace
from importlib.util import find_spec
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis import compile_targets
from compile_kernels import kernels
from pairwise import pairwise

from galore_jax.ops import adam_step, lift, pallas_hopper, pallas_tpu, pallas_triton
from galore_jax.ops.noise import noise
from galore_jax.ops.precision import round_with_noise
from galore_jax.ops.quantization import decode, dequantize, quantize

FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16
# Dyadic fractions, whose powers float32 represents almost exactly.
B1, B2, EPS, COUNT = 0.875, 0.96875, 1e-8, 10
SEED = jnp.array([3, 5], jnp.uint32)

adam_plain = jax.jit(functools.partial(adam_step.adam_8bit, b1=B1, b2=B2, eps=EPS))
adam_triton, adam_tpu, adam_hopper = (
    jax.jit(functools.partial(module.adam_8bit, b1=B1, b2=B2, eps=EPS, interpret=True))
    for module in (pallas_triton, pallas_tpu, pallas_hopper)
)
lift_plain = jax.jit(lift.lift_and_add, static_argnames="right_is_transposed")


def branch_on(platform):
    """In place of `lax.platform_dependent`: what it would run on this platform."""

    def run(*arguments, default, **others):
        return others.get(platform, default)(*arguments)

    return run


def lift_plain_on(platform):
    @functools.partial(jax.jit, static_argnames="right_is_transposed")
    def run(*arguments, **options):
        branch = mock.patch.object(jax.lax, "platform_dependent", branch_on(platform))
        # By default products on TPUs round their factors to bfloat16.
        with branch, jax.default_matmul_precision("float32"):
            return lift.lift_and_add(*arguments, **options)

    return run


lift_triton, lift_tpu, lift_hopper = (
    jax.jit(
        functools.partial(module.lift_and_add, interpret=True),
        static_argnames="right_is_transposed",
    )
    for module in (pallas_triton, pallas_tpu, pallas_hopper)
)
on_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the kernels for Hopper cards need JAX 0.12"
)
ADAMS = {"plain": adam_plain, "triton": adam_triton, "tpu": adam_tpu}
LIFTS = {
    "plain": lift_plain,
    "plain-gpu": lift_plain_on("cuda"),
    "plain-tpu": lift_plain_on("tpu"),
    "triton": lift_triton,
    "tpu": lift_tpu,
}
every_adam = pytest.mark.parametrize("step", ADAMS.values(), ids=ADAMS)
every_lift = pytest.mark.parametrize("add", LIFTS.values(), ids=LIFTS)


def float64(x):
    return np.asarray(x, np.float32).astype(np.float64)


def gradient_and_moments(shape, dtype, axis=-1):
    gradient, mu, nu = jax.random.normal(jax.random.key(0), (3, *shape))
    return gradient.astype(dtype), quantize(mu, "signed", axis), quantize(nu**2, "unsigned", axis)


def assert_nearest_codes(moment, numbers, terms):
    """Asserts that each number has the code of the nearest value.

    Args:
      moment: the quantised moment.
      numbers: the exact moment, float64.
      terms: for each number, the sum of the magnitudes of its terms. A number may be past the
        midpoint to the next value by 1e-6 of it.
    """
    values = float64(decode(jnp.arange(256), signed=moment.code == "signed"))
    size = min(256, numbers.shape[-1])
    for block in range(moment.scales.shape[-1]):
        index = (..., slice(block * size, (block + 1) * size))
        largest = np.abs(numbers[index]).max(axis=-1, keepdims=True)
        np.testing.assert_allclose(moment.scales[..., block : block + 1], largest, rtol=1e-6)
        codes = np.asarray(moment.codes[index], np.int64)
        middle = (values[1:] + values[:-1]) / 2
        above = np.append(middle, np.inf)[codes] * largest
        below = np.append(-np.inf, middle)[codes] * largest
        slack = 1e-6 * (terms[index] + largest * np.abs(values[codes]))
        assert (numbers[index] <= above + slack).all()
        assert (numbers[index] >= below - slack).all()


@every_adam
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1,), FLOAT32),
        ((70,), BFLOAT16),
        ((7, 256), BFLOAT16),
        ((130, 70), FLOAT32),
        ((2, 3, 300), FLOAT32),
    ],
)
def test_adam_is_its_formula_and_codes_are_the_nearest(step, shape, dtype):
    gradient, mu, nu = gradient_and_moments(shape, dtype)
    update, new_mu, new_nu = step(gradient, mu, nu, jnp.int32(COUNT))
    g, old_m, old_v = map(float64, (gradient, dequantize(mu), dequantize(nu)))
    m, v = B1 * old_m + (1 - B1) * g, B2 * old_v + (1 - B2) * g**2
    expected = m / (1 - B1**COUNT) / (np.sqrt(v / (1 - B2**COUNT)) + EPS)
    assert update.dtype == FLOAT32
    np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert_nearest_codes(new_mu, m, np.abs(B1 * old_m) + np.abs((1 - B1) * g))
    assert_nearest_codes(new_nu, v, v)


def assert_equal_steps(found, expected):
    """Equal but for rounding: the code of a number at a midpoint depends on the last bit."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-7)
    for moment, other in zip(found[1:], expected[1:], strict=True):
        assert moment.codes.dtype == jnp.uint8
        codes = np.asarray(moment.codes, np.int32) - np.asarray(other.codes, np.int32)
        assert np.count_nonzero(codes) <= 1e-3 * codes.size
        assert np.abs(codes).max() <= 1
        np.testing.assert_allclose(moment.scales, other.scales, rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype"),
    [
        *itertools.product([adam_triton, adam_tpu], [(3, 1100)], [BFLOAT16]),
        *itertools.product([adam_triton, adam_tpu], [(2, 3, 70)], [FLOAT32]),
        # On a TPU laid out by columns.
        (adam_tpu, (2, 128, 300), BFLOAT16),
        # Of other shapes plain JAX takes care.
        pytest.param(adam_hopper, (24, 512), BFLOAT16, marks=on_mosaic_gpu),
        pytest.param(adam_hopper, (2, 2, 64), FLOAT32, marks=on_mosaic_gpu),
        pytest.param(adam_hopper, (3, 300), FLOAT32, marks=on_mosaic_gpu),
    ],
)
def test_an_adam_kernel_has_the_codes_of_plain_jax(kernel, shape, dtype):
    arguments = (*gradient_and_moments(shape, dtype), jnp.int32(COUNT))
    assert_equal_steps(kernel(*arguments), adam_plain(*arguments))


@every_adam
@pytest.mark.parametrize(
    ("shape", "dtype"),
    # On a TPU the third is laid out by columns, so that blocks lie along the rows.
    [((600, 33), FLOAT32), ((2, 512, 300), BFLOAT16), ((256, 70), FLOAT32), ((2, 300, 9), FLOAT32)],
)
def test_adam_with_blocks_down_the_columns_is_that_of_the_transpose(step, shape, dtype):
    gradient, mu, nu = gradient_and_moments(shape, dtype, axis=-2)
    found = step(gradient, mu, nu, jnp.int32(COUNT))
    transposed = [replace(moment, axis=-1) for moment in (mu, nu)]
    arguments = jax.tree.map(lambda x: x.mT, (gradient, *transposed))
    expected = adam_plain(*arguments, jnp.int32(COUNT))
    assert [moment.axis for moment in found[1:]] == [-2, -2]
    assert_equal_steps(found, jax.tree.map(lambda x: x.mT, expected))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((131, 70), -1), ((128, 70), -1), ((3, 43, 70), -1), ((2560,), -1), ((2, 512, 70), -2)],
)
@pytest.mark.parametrize("device", ["CPU", "TPU"])
def test_adam_on_chunks_of_rows_equals_adam_on_the_array(monkeypatch, shape, axis, device):
    arguments = (*gradient_and_moments(shape, FLOAT32, axis), jnp.int32(COUNT))
    expected = adam_plain(*arguments)
    for limit in ("MAX_CHUNK", "MAX_CHUNK_ON_TPU", "MAX_WHOLE_ON_TPU"):
        monkeypatch.setattr(adam_step, limit, 1000)
    if device == "TPU":
        monkeypatch.setattr(jax.lax, "platform_dependent", branch_on("tpu"))
    step = functools.partial(adam_step.adam_8bit, b1=B1, b2=B2, eps=EPS)
    assert "scan" in str(jax.make_jaxpr(step)(*arguments))
    found = jax.jit(step)(*arguments)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert_equal_steps(found, expected)


@every_adam
def test_adam_leaves_zeros_at_zero(step):
    zeros = jnp.zeros((3, 300))
    mu, nu = quantize(zeros, "signed"), quantize(zeros, "unsigned")
    update, mu, nu = step(zeros, mu, nu, jnp.int32(1))
    for array in (update, dequantize(mu), dequantize(nu)):
        np.testing.assert_array_equal(array, zeros)


@every_adam
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_number_that_is_not_finite_spoils_the_moments_of_its_block_alone(step, bad):
    gradient, mu, nu = gradient_and_moments((3, 300), FLOAT32)
    _, mu, nu = step(gradient.at[1, 270].set(bad), mu, nu, jnp.int32(COUNT))
    spoiled = np.zeros((3, 300), bool)
    spoiled[1, 256:] = True
    for moment in (mu, nu):
        np.testing.assert_array_equal(np.isnan(dequantize(moment)), spoiled)


def matrices(m, n, r, transposed, dtype):
    """Weights, and the two factors of an update, with the dtypes of a basis and of coordinates."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (m, n), dtype)
    left = jax.random.normal(keys[1], (m, r), FLOAT32 if transposed else BFLOAT16)
    right = jax.random.normal(
        keys[2], (n, r) if transposed else (r, n), BFLOAT16 if transposed else FLOAT32
    )
    return weights, left, right


@pytest.mark.parametrize(
    ("add", "dtype", "transposed", "shape", "seed"),
    [
        *pairwise(
            *(LIFTS.values(), (FLOAT32, BFLOAT16), (False, True)),
            # On a TPU the weights of the second shape are laid out by columns.
            *([(130, 70, 33), (128, 301, 7), (1, 1, 1)], (None, (3, 5))),
        ),
        pytest.param(lift_hopper, BFLOAT16, False, (136, 144, 64), (3, 5), marks=on_mosaic_gpu),
        pytest.param(lift_hopper, FLOAT32, True, (136, 144, 64), None, marks=on_mosaic_gpu),
        pytest.param(lift_hopper, BFLOAT16, True, (130, 70, 33), (3, 5), marks=on_mosaic_gpu),
    ],
)
def test_the_lift_is_its_formula_and_rounded_once(add, dtype, transposed, shape, seed):
    weights, left, right = matrices(*shape, transposed, dtype)
    seed = seed and jnp.array(seed, jnp.uint32)
    scale, decay = 0.25, 0.125
    new = add(weights, left, right, scale, decay, seed, right_is_transposed=transposed)
    lifted = float64(left) @ (float64(right).T if transposed else float64(right))
    expected = (1 - decay) * float64(weights) + scale * lifted
    slack = 1e-6 * np.abs(expected).max()

    def rounded(number):
        number = jnp.asarray(number, FLOAT32)
        if dtype == BFLOAT16 and seed is not None:
            number = round_with_noise(number, noise(seed, 0, 0, weights.shape))
        return float64(number.astype(dtype))

    assert new.dtype == dtype
    # Rounding is monotonic.
    assert (float64(new) >= rounded(expected - slack)).all()
    assert (float64(new) <= rounded(expected + slack)).all()


@pytest.mark.parametrize("rows", [128, 131])
def test_a_lift_on_chunks_of_rows_equals_that_of_the_matrix(monkeypatch, rows):
    arguments = (*matrices(rows, 70, 9, False, BFLOAT16), 0.25, 0.125, SEED)
    expected = lift_plain(*arguments)
    monkeypatch.setattr(lift, "MAX_CHUNK", 1000)
    chunked = jax.jit(functools.partial(lift.lift_and_add))(*arguments)
    # Products of fewer rows may be summed in another order, and then round to a neighbour.
    spacings = expected.view(jnp.int16).astype(int) - chunked.view(jnp.int16).astype(int)
    assert np.abs(spacings).max() <= 1
    assert (spacings != 0).mean() <= 1e-3


@every_lift
def test_weights_stay_as_they_are_or_decay_to_nothing(add):
    weights, left, right = matrices(40, 50, 8, False, FLOAT32)
    np.testing.assert_array_equal(add(weights, left, 0 * right, 1.0, 0.0), weights)
    expected = float64(left) @ float64(right)
    new = add(weights, left, right, 1.0, 1.0)
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@every_lift
def test_a_lift_of_two_factors_in_bfloat16_adds_up_in_float32(add):
    weights, left, right = matrices(40, 50, 300, False, FLOAT32)
    new = add(weights, left, right.astype(BFLOAT16), 1.0, 0.0)
    expected = float64(weights) + float64(left) @ float64(right.astype(BFLOAT16))
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kernel",
    [lift_triton, lift_tpu, pytest.param(lift_hopper, marks=on_mosaic_gpu)],
    ids=["triton", "tpu", "hopper"],
)
def test_a_lift_kernel_runs_over_stacked_matrices(kernel):
    weights, left, right = matrices(8, 80, 32, False, BFLOAT16)
    stacked = [jnp.stack([x, -2 * x]) for x in (weights, left, right)]
    seeds = jnp.stack([SEED, SEED + 1])
    new = jax.vmap(kernel, (0, 0, 0, None, None, 0))(*stacked, 0.25, 0.125, seeds)
    for i in range(2):
        expected = kernel(*(x[i] for x in stacked), 0.25, 0.125, seeds[i])
        np.testing.assert_array_equal(new[i], expected)


@every_lift
@pytest.mark.parametrize("width", [36, 37])
def test_a_lift_of_a_part_equals_that_part_of_the_lift(add, width):
    # Parts start at any column.
    weights = jax.random.normal(jax.random.key(0), (136, 2 * width)).astype(BFLOAT16)
    left, right = jnp.ones((136, 4)), jax.random.normal(jax.random.key(1), (4, 2 * width))
    whole = add(weights, left, right, 0.01, 0.1, SEED)
    start = jnp.int32(8), jnp.int32(width)
    part = add(weights[8:, width:], left[8:], right[:, width:], 0.01, 0.1, SEED, start=start)
    np.testing.assert_array_equal(float64(part), float64(whole[8:, width:]))


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install galore-jax[tpu]"
)
def test_kernels_compile_for_a_tpu_and_need_no_memory_of_their_own():
    with compile_targets.target("v5e") as sharding:
        for _, _, _, kernel, arguments, donated in kernels():
            function = jax.jit(kernel, donate_argnums=donated)
            compiled = function.lower(*compile_targets.place(arguments, sharding)).compile()
            assert "tpu_custom_call" in compiled.as_text()
            assert compiled.memory_analysis().temp_size_in_bytes < 1000


@pytest.mark.parametrize("module", [pallas_triton, pallas_tpu], ids=["triton", "tpu"])
def test_every_operation_of_a_kernel_has_a_form_for_its_platform(module):
    # Which an interpreter does not tell.
    if module is pallas_triton and jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12 lowers kernels for a GPU only where it finds one")
    platform = "tpu" if module is pallas_tpu else "cuda"
    weights, left, right = matrices(256, 512, 64, False, BFLOAT16)
    adam = functools.partial(module.adam_8bit, b1=B1, b2=B2, eps=EPS)
    for kernel, arguments in (
        (adam, (*gradient_and_moments((256, 512), FLOAT32), jnp.int32(COUNT))),
        (module.lift_and_add, (weights, left, right, 0.5, 0.25, SEED)),
    ):
        lowered = jax.jit(kernel).trace(*arguments).lower(lowering_platforms=(platform,))
        assert "custom_call" in lowered.as_text()
