"""The clip by the norm of finite gradients: of what it counts, and what it leaves finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import apply_gradients, chain, clip_by_finite_norm, galore
from galore_jax.optim.clipping import finite_squares

squares_of = jax.jit(finite_squares)  # Compiled, for XLA rearranges formulas.


@jax.jit
def clipped(grads):
    clip = clip_by_finite_norm(1.0)
    return clip.update(grads, clip.init(grads))[0]


def test_real_and_imaginary_parts_count_alike():
    grads = {"phase": jnp.array([3 + 4j, 12j]), "bias": jnp.array([84.0])}
    # 3² + 4² + 12² + 84² = 85²
    found = clipped(grads)
    np.testing.assert_allclose(found["phase"], np.array([3 + 4j, 12j]) / 85, rtol=1e-6)
    np.testing.assert_allclose(found["bias"], 84 / 85, rtol=1e-6)
    np.testing.assert_allclose(squares_of(grads), 85**2, rtol=1e-6)


def test_a_complex_number_counts_only_if_both_its_parts_are_finite():
    found = clipped({"phase": jnp.array([complex(jnp.nan, 1e9), 3 + 4j])})
    np.testing.assert_allclose(found["phase"][1], 0.6 + 0.8j, rtol=1e-6)
    assert jnp.isnan(found["phase"][0])


@pytest.mark.parametrize("size", [2.0**39, 2.0**40, 1e13, 1e20, 1e30, 5e37])
def test_finite_numbers_of_any_size_are_clipped_as_float64_would(size):
    grads = {"bias": jnp.array([size, -size / 2, 1.0, 0.0]), "kernel": jnp.full((3, 4), 0.1)}
    found = clipped(grads)
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in grads.items()}
    norm = np.sqrt(sum((leaf**2).sum() for leaf in exact.values()))
    for name, leaf in exact.items():
        np.testing.assert_allclose(found[name], leaf / norm, rtol=1e-6, atol=1e-37)


def test_where_the_factor_leaves_float32_the_clipped_numbers_are_zero_but_finite():
    assert jnp.isfinite(clipped({"bias": jnp.full(12, 3e38)})["bias"]).all()


def test_a_huge_number_beside_one_that_is_not_finite_stays_finite():
    found = clipped({"bias": jnp.array([1e20, jnp.inf, jnp.nan, 1.0])})["bias"]
    np.testing.assert_allclose(found[0], 1, rtol=1e-6)
    assert jnp.isfinite(found).tolist() == [True, False, False, True]


def test_a_huge_gradient_of_an_unprojected_leaf_does_not_spoil_it_for_ever():
    params = {"kernel": jnp.ones((8, 12)), "bias": jnp.zeros(12)}
    tx = chain(clip_by_finite_norm(1.0), galore(4), optax.adam(0.1))
    state = tx.init(params)
    for size in (1e20, 1.0, 1.0):
        grads = {"kernel": jnp.ones((8, 12)), "bias": jnp.full(12, size)}
        before, (params, state) = params, apply_gradients(tx, grads, state, params)
        assert jnp.isfinite(params["bias"]).all()
        assert (params["bias"] != before["bias"]).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("size", [2.0**39, 2.0**40, 1e20, 3e38])
def test_the_sum_of_squares_is_finite_and_so_is_that_over_many_layers(size):
    squares = squares_of({"kernel": jnp.full((8, 12), size)})
    assert squares == 2.0**80
    assert jnp.isfinite(1000 * squares)
    # What is scaled down by this norm still has squares in float32.
    assert float(squares) ** -1 > jnp.finfo(jnp.float32).tiny
