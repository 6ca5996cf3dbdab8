"""Muon on coordinates and on whole matrices, against NumPy and the length of its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import galore_jax
from galore_jax import apply_gradients, scale_by_muon
from galore_jax.ops.newton_schulz import iterate, newton_schulz
from galore_jax.ops.quantization import Quantized


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (3, 2, 5, 8)])
def test_newton_schulz_agrees_with_the_iteration_on_the_matrix_itself(shape):
    matrices = random(shape)
    expected = np.reshape(matrices, (-1, *shape[-2:]))
    expected = [reference.newton_schulz(np.float64(matrix)) for matrix in expected]
    result = newton_schulz(matrices).reshape(-1, *shape[-2:])
    np.testing.assert_allclose(result, np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("shape", [(96, 96), (128, 512)])
@pytest.mark.parametrize("spectrum", ["flat", "of three decades", "of low rank", "random"])
def test_newton_schulz_as_on_tpus_and_gpus_is_close_for_any_singular_values(shape, spectrum):
    x = random(shape)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = {
        "flat": np.ones(shape[0]),
        "of three decades": np.logspace(0, -3, shape[0]),
        "of low rank": np.where(np.arange(shape[0]) < 6, 1, 1e-3),
        "random": values,
    }[spectrum]
    matrix = (left * values) @ right
    expected = reference.newton_schulz(np.float64(matrix))
    result = iterate(jnp.float32(matrix / np.linalg.norm(matrix)), jnp.bfloat16)
    # 2^-9 is the rounding of bfloat16.
    assert np.linalg.norm(result - expected) < 32 * 2**-9 * np.linalg.norm(expected)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30, 8e37])
def test_newton_schulz_brings_singular_values_close_to_one_whatever_the_scale(factor):
    values = np.linalg.svd(jax.jit(newton_schulz)(factor * random((16, 40))))[1]
    assert 0.6 < values.min() <= values.max() < 1.3
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((2, 3, 5))), 0)


@pytest.mark.parametrize(("shape", "rank"), [((32, 32), 2), ((24, 80), 8), ((3, 80, 24), 16)])
def test_lifted_updates_have_the_singular_values_of_full_rank_muon_at_any_rank(shape, rank):
    params, tx = {"kernel": jnp.zeros(shape)}, galore_jax.muon(1.0, rank)
    after, _ = apply_gradients(tx, {"kernel": random(shape)}, tx.init(params), params)
    values = np.linalg.svd(after["kernel"])[1] / (0.2 * max(shape[-2:]) ** 0.5)
    assert np.all((values[..., :rank] > 0.6) & (values[..., :rank] < 1.3))
    np.testing.assert_allclose(values[..., rank:], 0, atol=1e-5)


def test_without_galore_it_is_muon_of_optax_with_a_consistent_root_mean_square():
    # optax corrects the bias of the Nesterov average, which is gone after the first few hundred
    # steps: 0.95^300 = 2e-7.
    numbers = {"kernel": optax.contrib.MuonDimensionNumbers()}
    other = optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=numbers)
    tx, params = scale_by_muon(), {"kernel": jnp.zeros((8, 20))}

    def step(states, seed):
        gradient = {"kernel": jax.random.normal(jax.random.key(seed), (8, 20))}
        one, state = tx.update(gradient, states[0])
        two, other_state = other.update(gradient, states[1])
        return (state, other_state), (one["kernel"], two["kernel"])

    starts = tx.init(params), other.init(params)
    _, (one, two) = jax.lax.scan(step, starts, jnp.arange(300))
    np.testing.assert_allclose(one[-1], 0.2 * 20**0.5 * two[-1], atol=1e-5)


def test_it_keeps_one_moment_of_the_coordinates():
    state = galore_jax.muon(0.1, 4).init({"kernel": jnp.ones((8, 16))})
    matrices = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert sorted(matrices) == [(4, 16), (8, 4)]  # the moment and the basis


def test_eight_bit_moments_change_the_update_by_no_more_than_their_rounding():
    params = {"kernel": jnp.zeros((64, 256))}
    grads = [{"kernel": random((64, 256), seed)} for seed in range(3)]
    after = []
    for eight_bit in (False, True):
        tx = galore_jax.muon(0.01, 32, eight_bit=eight_bit)
        tree, state = params, tx.init(params)
        step = jax.jit(functools.partial(apply_gradients, tx))
        for grad in grads:
            tree, state = step(grad, state, tree)
        after.append(tree["kernel"])
    kinds = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Quantized))
    assert any(isinstance(node, Quantized) for node in kinds)
    difference = jnp.linalg.norm(after[1] - after[0]) / jnp.linalg.norm(after[0])
    # A code is off by up to 1/280 of the largest number of its block, which is about four times a
    # typical one; Newton–Schulz multiplies by up to 1.2 / 0.3, the spread of singular values.
    assert 0 < difference < 4 / 280 * 4


def test_vectors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layer/bias is float32\[8\].*use galore_jax.muon"):
        scale_by_muon().init({"layer": {"bias": jnp.ones(8)}})
