"""Full-rank Muon with 8-bit moments, against NumPy and the moments in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import galore_jax
from galore_jax.ops.quantization import Quantized

SHAPE = (64, 256)


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def steps(tx, gradients, params):
    """The parameters after one update for each of the gradients."""
    update, state = jax.jit(galore_jax.apply_gradients, static_argnums=0), tx.init(params)
    for gradient in gradients:
        params, state = update(tx, gradient, state, params)
    return params, state


def orthogonalised(matrix, scale=1.0):
    return scale * 0.2 * max(matrix.shape) ** 0.5 * reference.newton_schulz(np.float64(matrix))


def adam(gradient, eps=1e-6):
    """The first step."""
    return gradient / (np.abs(gradient) + eps)


def test_matrices_take_muons_step_and_the_rest_that_of_adam():
    params = {"kernel": jnp.zeros((2, *SHAPE)), "bias": jnp.zeros(256)}
    gradient = {"kernel": random((2, *SHAPE)), "bias": random((256,), 1)}
    after, _ = steps(galore_jax.muon8bit(0.1, 0.5, weight_decay=0.3), [gradient], params)
    # The first step is along the gradient itself, whatever the decay of the moment.
    expected = [-0.1 * orthogonalised(matrix, 0.5) for matrix in gradient["kernel"]]
    np.testing.assert_allclose(after["kernel"], np.stack(expected), atol=1e-5)
    np.testing.assert_allclose(after["bias"], -0.1 * adam(gradient["bias"]), atol=1e-6)


def test_it_decays_all_weights():
    params = {"kernel": random(SHAPE), "bias": random((256,), 1)}
    nothing = jax.tree.map(jnp.zeros_like, params)
    after, _ = steps(galore_jax.muon8bit(0.1, weight_decay=0.5), [nothing], params)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, 0.95 * old, 1e-6), after, params)


def test_the_moment_of_a_matrix_takes_a_byte_for_each_number():
    params = {"kernel": jnp.zeros(SHAPE), "head": jnp.zeros((64, 512))}
    state = galore_jax.muon8bit(0.1).init(params)
    is_moment = lambda leaf: isinstance(leaf, Quantized)
    moments = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_moment) if is_moment(leaf)]
    sizes = sorted(sum(leaf.nbytes for leaf in jax.tree.leaves(moment)) for moment in moments)
    kernel, head = (size * (1 + 4 / 256) for size in (64 * 256, 64 * 512))
    assert sizes == [kernel, head, head]  # one of Muon, two of AdamW


def test_it_stays_close_to_moments_in_float32():
    gradients = [{"kernel": random(SHAPE, seed)} for seed in range(5)]
    params = {"kernel": jnp.zeros(SHAPE)}
    exact = optax.chain(galore_jax.scale_by_muon(), optax.scale(-0.01))
    one, _ = steps(galore_jax.muon8bit(0.01), gradients, params)
    two, _ = steps(exact, gradients, params)
    error = np.linalg.norm(one["kernel"] - two["kernel"]) / np.linalg.norm(two["kernel"])
    # A code is off by up to 1/280 of the largest number of its block, which is about four times a
    # typical one; Newton–Schulz multiplies by up to the spread of singular values, for normal
    # numbers in this shape (16 + 8) / (16 − 8).
    assert 0 < error < 4 / 280 * 3


def test_a_kernel_of_several_axes_is_one_matrix():
    params, gradient = {"kernel": jnp.zeros((64, 4, 16))}, {"kernel": random((64, 4, 16))}
    numbers = optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    tx = galore_jax.muon8bit(1.0, weight_dimension_numbers=numbers)
    after, _ = steps(tx, [gradient], params)
    expected = -orthogonalised(gradient["kernel"].reshape(64, 64)).reshape(64, 4, 16)
    np.testing.assert_allclose(after["kernel"], expected, atol=1e-4)


def test_a_rule_of_none_leaves_a_matrix_to_adam():
    params = {"router": {"kernel": jnp.zeros(SHAPE)}, "up": {"kernel": jnp.zeros(SHAPE)}}
    gradient = {name: {"kernel": random(SHAPE)} for name in params}
    tx = galore_jax.muon8bit(0.1, rules={"router/*": None})
    after, _ = steps(tx, [gradient], params)
    expected = -0.1 * adam(gradient["router"]["kernel"])
    np.testing.assert_allclose(after["router"]["kernel"], expected, atol=1e-6)
    expected = -0.1 * orthogonalised(gradient["up"]["kernel"])
    np.testing.assert_allclose(after["up"]["kernel"], expected, atol=1e-5)


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="applies to no leaf"):
        galore_jax.muon8bit(0.1, rules={"rooter/*": None}).init({"kernel": jnp.zeros(SHAPE)})
