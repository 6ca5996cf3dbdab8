"""Random directions outside the subspace: their distribution and their step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from test_layerwise import CONFIG, Ordinary, batch_of, layerwise_steps, params_of
from trees import max_difference

import galore_jax
from galore_jax import apply_gradients, chain, galore
from galore_jax.optim.state import bases_of, galore_states
from galore_jax.subspace.complement import draw_directions

EPS = 0.01  # Large enough for coordinates near 0 to have a well-conditioned step.
SHAPES = {"left": (3, 12, 20), "right": (3, 20, 12)}


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def basis_of(tx, params):
    (basis,) = bases_of(galore_states(tx.init(params), inside_chains=True))
    return basis


def products(params, x):
    return jnp.sum(jnp.sin(jnp.einsum("ti,lio->lto", x, params["kernel"])))


@pytest.fixture(params=SHAPES)
def params(request):
    return {"kernel": random(SHAPES[request.param])}


def test_directions_are_orthonormal_outside_the_subspace_and_new_for_each_update(params):
    basis = basis_of(galore_jax.muon(0.1, 4, complement=3), params)
    ((side, vectors),) = basis.vectors.items()
    first, second = (draw_directions(basis, seed=0, count=count)[side] for count in (0, 1))
    for directions in (first, second):
        assert directions.shape == (3, 12, 3)
        gram = directions.mT @ directions
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-5)
        np.testing.assert_allclose(vectors.mT @ directions, 0, atol=1e-5)
    matrices = [*first, *second]
    for i, one in enumerate(matrices):
        for other in matrices[:i]:
            assert reference.largest_angle(one, other) > 0.1


def test_with_all_directions_sgd_is_sgd_of_full_gradients(params):
    gradients = {"kernel": random(params["kernel"].shape, 1)}
    tx = chain(galore(4, scale=1.0, complement=8), optax.sgd(0.1))
    after, _ = apply_gradients(tx, gradients, tx.init(params), params)
    expected = params["kernel"] - 0.1 * gradients["kernel"]
    np.testing.assert_allclose(after["kernel"], expected, atol=1e-5)


def test_the_mean_update_of_sgd_over_the_directions_is_that_of_full_gradients():
    params, gradients = {"kernel": jnp.zeros((6, 8))}, {"kernel": random((6, 8), 1)}
    tx = chain(galore(2, scale=1.0, complement=1, refresh="svd"), optax.sgd(1.0))
    _, state = tx.update(gradients, tx.init(params), params)

    def update(count):
        inner = (state.inner_states[0]._replace(count=count), *state.inner_states[1:])
        return tx.update(gradients, state._replace(inner_states=inner), params)[0]["kernel"]

    updates = jax.vmap(update)(jnp.arange(1, 4001))
    # The mean of 4,000 has a 63rd of the standard deviation; six of them in 48 numbers.
    bounds = 6 * np.std(updates, axis=0) / 4000**0.5 + 1e-5
    assert np.all(np.abs(np.mean(updates, axis=0) + gradients["kernel"]) < bounds)


def first_step_of(optimizer, coordinates, size):
    if optimizer == "muon":
        return 0.2 * max(size) ** 0.5 * reference.newton_schulz(coordinates)
    if optimizer == "adamw":
        return coordinates / (np.abs(coordinates) + EPS)
    return np.sign(coordinates)


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [("adamw", "keep"), ("lion", "rotate"), ("muon", "rotate"), ("muon", "keep")],
)
def test_the_complement_takes_the_first_step_of_the_optimizer_at_the_current_rate(
    params, optimizer, moments
):
    schedule = lambda count: 0.1 / (1 + count)
    settings = {"moments": moments, "weight_decay": 0.2}
    if optimizer == "adamw":
        settings["eps"] = EPS
    make = functools.partial(getattr(galore_jax, optimizer), schedule, 4, 2, 0.5, **settings)
    plain, with_complement = make(), make(complement=3)
    state, other = plain.init(params), with_complement.init(params)
    step = jax.jit(lambda tx, g, s, p: apply_gradients(tx, g, s, p), static_argnums=0)
    for count in range(4):
        gradients = {"kernel": random(params["kernel"].shape, count + 1)}
        after, state = step(plain, gradients, state, params)
        wanted, other = step(with_complement, gradients, other, params)
        (basis,) = bases_of(galore_states(other, inside_chains=True))
        ((side, directions),) = draw_directions(basis, seed=0, count=count).items()
        for i, matrix in enumerate(np.asarray(gradients["kernel"], np.float64)):
            bases = {side: np.asarray(directions[i], np.float64)}
            value = 8 / 3 * reference.project(matrix, bases)  # 3 of 8 directions, unbiased
            first = reference.lift(first_step_of(optimizer, value, matrix.shape), bases)
            moved = -0.5 * schedule(count) * (1 - 0.2 * schedule(count)) * first
            np.testing.assert_allclose(wanted["kernel"][i], after["kernel"][i] + moved, atol=1e-5)
        # Both go on from the same weights.
        params = after


@pytest.mark.parametrize("make", [galore_jax.adamw, galore_jax.muon])
def test_the_backward_pass_computes_the_coordinates_of_the_complement(params, make):
    x = random((7, params["kernel"].shape[1]), 5)
    tx = make(0.1, 4, complement=3)
    state = galore_jax.refresh(products)(params, tx.init(params), x)
    _, gradients = galore_jax.value_and_grad(products)(params, state, x)
    one, _ = apply_gradients(tx, gradients, state, params)
    two, _ = apply_gradients(tx, jax.grad(products)(params, x), state, params)
    assert max_difference(one, two) < 1e-5


def test_a_step_draws_its_directions_once(params):
    """Although the backward pass and the update both ask for them."""
    tx = galore_jax.muon(0.1, 4, complement=3)

    def step(params, state, x):
        _, gradients = galore_jax.value_and_grad(products)(params, state, x)
        return apply_gradients(tx, gradients, state, params)

    x = random((7, params["kernel"].shape[1]), 5)
    lowered = jax.jit(step).lower(params, galore_jax.init(tx, params), x)
    assert lowered.as_text().count("erf_inv") == 2
    # Of (12, 3) by (3, 3): the polar factor, and two in the last step of its computation.
    products_in = lambda text: len(re.findall(r"f32\[3,12,3\]\S* dot\(", text))
    assert products_in(lowered.compile().as_text()) == 3


def test_a_clip_counts_the_coordinates_in_the_basis_alone_and_scales_all(params):
    tx = galore_jax.muon(0.1, 4, complement=3)
    gradients_of = galore_jax.value_and_grad(products)
    gradient = gradients_of(params, tx.init(params), random((5, params["kernel"].shape[1])))[1]
    clip = galore_jax.clip_by_finite_norm(0.5)
    clipped, _ = clip.update(gradient, clip.init(gradient))
    factor = 0.5 / jnp.linalg.norm(gradient["kernel"].value)
    for part in ("value", "complement"):
        found, expected = (getattr(tree["kernel"], part) for tree in (clipped, gradient))
        np.testing.assert_allclose(found, factor * expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_layerwise_steps_take_the_same_directions(clip):
    settings = {"rank": 8, "update_proj_gap": 5, "complement": 4}
    tx = galore_jax.muon(0.003, **settings)
    ordinary_tx = tx
    if clip:
        ordinary_tx = chain(galore_jax.clip_by_finite_norm(clip), tx)
    ordinary, params = Ordinary(ordinary_tx, projected=True), params_of(CONFIG)
    steps = layerwise_steps(tx, clip_norm=clip)
    state, other = ordinary_tx.init(params), galore_jax.layerwise.init(tx, params)
    after = params
    for seed in range(3):
        params, state, _, due = ordinary.step(params, state, batch_of(seed))
        after, other, *_ = steps[due](after, other, batch_of(seed))
    assert max_difference(params, after) < 1e-5


def test_a_matrix_that_is_skipped_stays_as_it_is(params):
    tx = galore_jax.muon(0.1, 4, complement=3, weight_decay=0.1)
    gradients = {"kernel": random(params["kernel"].shape).at[1, 0, 0].set(jnp.nan)}
    after, _ = apply_gradients(tx, gradients, tx.init(params), params)
    np.testing.assert_array_equal(after["kernel"][1], params["kernel"][1])
    assert np.all(np.any(after["kernel"][::2] != params["kernel"][::2], axis=(1, 2)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"complement": 9}, "a basis of 4 in 12 dimensions leaves 8: choose a smaller"),
        ({"complement": 0.9}, "asks for 11 directions"),
        ({"complement": 1, "proj_type": "full"}, "use another proj_type, or complement=0"),
        ({"complement": -1}, "complement must be a whole number of at least 0"),
        ({"complement": 1.5}, "or a fraction below 1, not 1.5"),
    ],
)
def test_a_complement_that_does_not_fit_is_refused(params, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        galore_jax.muon(0.1, 4, **settings).init(params)


@pytest.mark.parametrize("make", [galore_jax.fira, galore_jax.apollo])
def test_fira_and_apollo_have_no_use_for_it(params, make):
    with pytest.raises(ValueError, match="already leaves the subspace of kernel"):
        make(0.1, 4, complement=2).init(params)


def test_a_complement_that_is_a_hyperparameter_is_refused_with_the_remedy(params):
    tx = optax.inject_hyperparams(galore_jax.muon, static_args="rank")(0.1, 4, complement=2)
    with pytest.raises(ValueError, match='add "complement" to the static_args of optax'):
        tx.init(params)


def test_accumulation_after_galore_is_refused(params):
    accumulated = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    with pytest.raises(ValueError, match="put MultiSteps around the chain"):
        chain(galore(4, complement=3), accumulated).init(params)


def test_a_stock_chain_is_refused(params):
    tx = optax.chain(galore(4, complement=2), optax.adam(0.1))
    with pytest.raises(ValueError, match=r"complement needs galore_jax\.chain"):
        galore_jax.init(tx, params)
    with pytest.raises(ValueError, match=r"complement=2 needs low-.* place of optax\.chain\.$"):
        tx.update({"kernel": params["kernel"]}, tx.init(params), params)
