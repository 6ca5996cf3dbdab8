"""Fira and APOLLO beyond their comparison with the oracle: what they need, store and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_layerwise import CONFIG, batch_of, loss_of, model_of, params_of
from trees import PLAIN, STACKED, max_difference, random_params

import galore_jax
from galore_jax import Rule, apply_gradients, layerwise
from galore_jax.optim.fira import limit_growth

MAKE = {"fira": galore_jax.fira, "apollo": galore_jax.apollo}
both = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
RANK = 4


def random_matrices(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@both
def test_a_kernel_of_many_axes_moves_like_its_matrix(make):
    gradient, updates = random_matrices(12, 2, 8), []
    as_heads = optax.contrib.GaLoreDimensionNumbers(0, (1, 2))
    for shape, numbers in (((12, 2, 8), as_heads), ((12, 16), None)):
        tx = make(0.1, RANK, weight_dimension_numbers=numbers)
        grads = {"w": gradient.reshape(shape)}
        updates.append(tx.update(grads, tx.init(grads), grads)[0]["w"].reshape(12, 16))
    np.testing.assert_allclose(*updates, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "last", "factor", "kept"),
    [
        (3, 0, 1, 3),
        (3, 2.5, 1.01 * 2.5 / 3, 1.01 * 2.5),
        (3, 2.98, 1, 3),
        (0, 2, 1, 2),
    ],
    ids=["first", "grown", "grown little", "zero"],
)
def test_a_step_is_limited_by_the_last_one_that_had_a_norm(norm, last, factor, kept):
    step = jnp.array([[0.6, 0.8]]) * norm
    limited, found = limit_growth(step, jnp.float32(last))
    np.testing.assert_allclose(limited, factor * step, rtol=1e-6)
    np.testing.assert_allclose(found, kept, rtol=1e-6)


@both
def test_they_have_no_galore_whose_coordinates_the_backward_pass_could_compute(make):
    tx, params, batch = make(0.1, RANK), params_of(CONFIG), batch_of(0)
    loss = lambda params, batch: loss_of(CONFIG, params, batch)
    state = galore_jax.init(tx, params)
    for use in (galore_jax.value_and_grad(loss), galore_jax.refresh(loss)):
        with pytest.raises(ValueError, match=r"with galore in it; use jax\.value_and_grad"):
            use(params, state, batch)
    step = galore_jax.make_step(model_of(CONFIG), tx, projected=True)
    with pytest.raises(ValueError, match=r"with galore in it; use jax\.value_and_grad"):
        step(params, layerwise.init(tx, params), batch)


@both
def test_rotated_moments_and_a_projection_of_both_sides_are_refused(make):
    with pytest.raises(ValueError, match='moments="rotate" is for galore alone: leave it out'):
        make(0.1, RANK, moments="rotate")
    with pytest.raises(ValueError, match=r'"full" projects both sides of .*/kernel and leaves no'):
        make(0.1, RANK, rules={"wide/*": Rule(proj_type="full")}).init(random_params(PLAIN))


@both
def test_bases_may_be_in_8_bits(make):
    params = {"kernel": random_matrices(2, 64, 300)}
    grads = {"kernel": random_matrices(2, 64, 300, seed=1)}
    results = []
    for settings in ({}, {"basis_dtype": jnp.int8}):
        tx = make(0.1, 32, refresh="svd", **settings)
        state = jax.jit(tx.init)(params)
        new, state = jax.jit(lambda g, s, p, tx=tx: apply_gradients(tx, g, s, p))(
            grads, state, params
        )
        results.append(new)
        codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int8]
        assert len(codes) == len(settings)
    # Numbers of a basis are off by up to 1/254 of the largest of 32, or 1/100 of their own length,
    # and where a coordinate is smaller than its error Adam's first update has the other sign.
    moved = jnp.linalg.norm(results[0]["kernel"] - params["kernel"])
    assert jnp.linalg.norm(results[0]["kernel"] - results[1]["kernel"]) < 0.1 * moved


@both
def test_the_state_is_that_of_galore_and_a_number_for_each_matrix(make):
    params = jax.eval_shape(lambda: random_params(STACKED))
    sizes = []
    for tx in (make(0.1, RANK), galore_jax.adamw(0.1, RANK)):
        state = jax.eval_shape(tx.init, params)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))
    # They have no count and seed of galore, nor a count of the decay.
    assert sizes[0] + 3 * 4 == sizes[1] + 4 * 3 * 3


@both
def test_nothing_of_the_size_of_a_stack_is_stored_besides_it_its_gradient_and_update(make):
    rows, columns, temporaries = 128, 192, []
    for layers in (8, 16):
        tx, shape = make(0.1, 2), (layers, rows, columns)
        params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(lambda p, s, g, tx=tx: apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
        compiled = step.lower(params, state, params).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    # The update, and a few stacks of coordinates, 2/128 of the weights each.
    assert temporaries[1] - temporaries[0] < 1.2 * 8 * rows * columns * 4


def test_the_scale_of_apollo_follows_its_rank_and_may_be_a_hyperparameter():
    gradient = {"kernel": random_matrices(12, 20)}
    for rank, scale in ((1, 128**0.5), (RANK, 1.0)):
        make = optax.inject_hyperparams(galore_jax.apollo, static_args="rank")
        updates = []
        for settings in ({}, {"scale": scale}):
            tx = make(0.1, rank, **settings)
            state = tx.init(gradient)
            assert ("scale" in state.hyperparams) == bool(settings)
            updates.append(tx.update(gradient, state, gradient)[0])
        assert max_difference(*updates) <= 1e-6


@both
def test_coordinates_in_place_of_full_gradients_are_refused(make):
    params, tx = {"kernel": jnp.ones((8, 16))}, make(0.1, RANK)
    loss = lambda params, x: jnp.sum(x @ params["kernel"])
    state = galore_jax.adamw(0.1, RANK).init(params)
    _, gradients = galore_jax.value_and_grad(loss)(params, state, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="needs full gradients"):
        tx.update(gradients, tx.init(params), params)
