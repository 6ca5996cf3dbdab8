"""Fira and APOLLO: steps along the full gradient, scaled per channel, and their limiter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_layerwise import CONFIG, batch_of, loss_of, model_of, params_of
from trees import PLAIN, STACKED, gradients, max_difference, random_params

import galore_jax
from galore_jax import Rule, apply_gradients, layerwise
from galore_jax.optim.fira import limit_growth

MAKE = {"fira": galore_jax.fira, "apollo": galore_jax.apollo}
both = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
RANK = 4


def random_matrices(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def first_update(tx, gradient):
    """The update of a single kernel by its first gradient, the basis, and Adam's result."""
    params = {"kernel": jnp.zeros(gradient.shape)}
    updates, state = tx.update({"kernel": gradient}, tx.init(params), params)
    (state, *_) = getattr(state, "inner_states", state)
    (vectors,) = state.bases["kernel"].vectors.values()
    return updates["kernel"], vectors


# What they do


@pytest.mark.parametrize(("shape", "axis"), [((12, 20), 0), ((20, 12), 1)], ids=["left", "right"])
def test_fira_adds_to_adamw_the_residual_with_the_factors_of_the_coordinates(shape, axis):
    gradient = random_matrices(*shape)
    options = {"learning_rate": 1.0, "rank": RANK, "scale": 1.0}
    update, basis = first_update(galore_jax.fira(**options), gradient)
    lifted, _ = first_update(galore_jax.adamw(**options), gradient)
    project = lambda matrix: basis @ (basis.T @ matrix) if axis == 0 else matrix @ basis @ basis.T
    step = update - lifted
    np.testing.assert_allclose(project(step), 0, atol=1e-5)
    norms = [jnp.linalg.norm(m, axis=axis) for m in (lifted, project(gradient))]
    residual = gradient - project(gradient)
    factors = jnp.expand_dims(norms[0] / norms[1], axis)
    np.testing.assert_allclose(step, -residual * factors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize(("shape", "axis"), [((12, 20), 0), ((20, 12), 1)], ids=["left", "right"])
def test_apollo_scales_each_channel_of_the_gradient_and_apollo_mini_all_of_it(shape, axis, rank):
    gradient = random_matrices(*shape)
    update, _ = first_update(galore_jax.apollo(1.0, rank), gradient)
    factors = -update / gradient
    assert (factors > 0).all()
    one = factors.mean(axis=axis if rank > 1 else None, keepdims=True)
    np.testing.assert_allclose(factors, jnp.broadcast_to(one, shape), rtol=1e-4)
    assert rank == 1 or factors.std() > 0.1 * factors.mean()


def test_the_random_basis_of_apollo_counts_as_the_projection_of_the_paper():
    rows, columns, rank = 64, 400, 16
    gradient = random_matrices(rows, columns)
    # Adam's first result consists of signs, and the paper's projection keeps lengths on average.
    update, _ = first_update(galore_jax.apollo(1.0, rank), gradient)
    lengths = np.linalg.norm(update, axis=0)
    np.testing.assert_allclose(np.median(lengths), rank**0.5, rtol=0.1)
    # Of Gaussian gradients the one coordinate of 400 columns has a norm known to 3.5%.
    update, _ = first_update(galore_jax.apollo(1.0, 1), gradient)
    np.testing.assert_allclose(np.linalg.norm(update), (128 * columns) ** 0.5, rtol=0.15)
    # Without chance no such factor is due.
    exact, basis = first_update(galore_jax.apollo(1.0, rank, refresh="svd"), gradient)
    expected = rank**0.5 * jnp.linalg.norm(gradient, axis=0)
    expected /= jnp.linalg.norm(basis.T @ gradient, axis=0)
    # A coordinate near eps, of Adam, is not quite a sign.
    np.testing.assert_allclose(jnp.linalg.norm(exact, axis=0), expected, rtol=0.01)


@both
def test_leaves_that_are_not_projected_get_adamw(make):
    params = random_params(PLAIN)
    grads = gradients(params, jax.tree.map(jnp.zeros_like, params))
    results = []
    for tx in (make(0.1, RANK, weight_decay=0.1), optax.adamw(0.1, eps=1e-6, weight_decay=0.1)):
        new, _ = apply_gradients(tx, grads, tx.init(params), params)
        results.append(new["bias"])
    assert max_difference(*results) == 0


# The limiter


def test_the_norm_of_a_step_grows_by_at_most_one_percent_in_each_matrix_of_a_stack():
    # Multiples of one residual, while the coordinates, and so Adam's result, stay as they are.
    left, right = (jnp.linalg.qr(random_matrices(n, n))[0] for n in (12, 20))
    inside = 10 * left[:, :RANK] @ right[:RANK]
    outside = left[:, RANK:] @ right[RANK:12]
    multiples = jnp.array([[1, 2, 2, 0.5, 0.5], [1, 0.5, 0.505, 0.6, 0]])
    expected = jnp.array(
        [[1, 1.01, 1.01**2, 0.5, 0.5], [1, 0.5, 0.505, 0.505 * 1.01, 0.505 * 1.01]]
    )
    params = {"kernel": jnp.zeros((2, 12, 20))}
    tx = galore_jax.fira(1.0, RANK, scale=1.0, refresh="svd")
    state, update, lengths, norms = tx.init(params), jax.jit(tx.update), [], []
    for multiple in multiples.T[..., None, None]:
        grads = {"kernel": jnp.where(multiple > 0, inside + multiple * outside, 0)}
        updates, state = update(grads, state, params)
        basis = state[0].bases["kernel"].vectors["left"]
        step = updates["kernel"] - basis @ (basis.mT @ updates["kernel"])
        lengths.append(jnp.linalg.norm(step, axis=(1, 2)))
        norms.append(state[0].norm["kernel"].value)
    first = norms[0][:, None]
    np.testing.assert_allclose(jnp.stack(norms, axis=1) / first, expected, rtol=1e-4)
    # A gradient of zero leaves the norm that limits the next step.
    expected = expected.at[1, -1].set(0)
    np.testing.assert_allclose(jnp.stack(lengths, axis=1) / first, expected, rtol=1e-4, atol=1e-5)


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


# What they need


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
def test_moments_that_follow_the_basis_are_refused(make):
    with pytest.raises(ValueError, match='moments="rotate" is for galore alone: leave it out'):
        make(0.1, RANK, moments="rotate")


@both
@pytest.mark.parametrize(
    "settings", [{"proj_type": "full"}, {"rules": {"wide/*": Rule(proj_type="full")}}], ids=str
)
def test_a_projection_of_both_sides_is_refused(make, settings):
    with pytest.raises(ValueError, match=r'"full" projects both sides of .*/kernel and leaves no'):
        make(0.1, RANK, **settings).init(random_params(PLAIN))


# What they work with


@both
def test_bases_may_be_in_8_bits(make):
    params = {"kernel": random_matrices(2, 64, 300)}
    grads = {"kernel": random_matrices(2, 64, 300, seed=1)}
    results = []
    for settings in ({}, {"basis_dtype": jnp.int8}):
        tx = make(0.1, 32, refresh="svd", **settings)
        new, state = apply_gradients(tx, grads, tx.init(params), params)
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
