"""What the optimizer makes of unusual gradients and parameters: it works, or says what is wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from trees import PLAIN, random_params

import galore_jax
from galore_jax import apply_gradients, chain, clip_by_finite_norm, galore, init

ADAM = chain(galore(4), optax.adam(0.1))
STOCK = optax.chain(galore(4), optax.adam(0.1))
both = pytest.mark.parametrize("tx", [ADAM, STOCK], ids=["chain", "stock"])


def replaced(tree, name, leaf):
    return tree | {name: dict.fromkeys(tree[name], leaf)}


@both
def test_gradients_of_another_structure_are_refused_with_the_difference(tx):
    params = random_params(PLAIN)
    grads = {name: leaf for name, leaf in params.items() if name != "bias"}
    with pytest.raises(ValueError, match=r"structure .*\(only one of them has bias/bias\)"):
        apply_gradients(tx, grads, init(tx, params), params)


@both
@pytest.mark.parametrize(
    ("name", "gradient", "sentence"),
    [
        ("wide", jnp.ones((20, 12)), r"gradient of wide/kernel has the shape .* \(12, 20\)"),
        ("wide", jnp.ones(12), r"gradient of wide/kernel has the shape .* \(12, 20\)"),
        ("tall", None, r"gradient of tall/kernel, which is projected, is None"),
    ],
    ids=["transposed", "a vector", "none"],
)
def test_a_gradient_that_does_not_fit_its_parameter_is_refused_by_name(
    tx, name, gradient, sentence
):
    params = random_params(PLAIN)
    grads, state = replaced(params, name, gradient), init(tx, params)
    for take_step in (apply_gradients, lambda tx, *rest: tx.update(*rest)):
        with pytest.raises(ValueError, match=sentence):
            take_step(tx, grads, state, params)


@both
def test_coordinates_of_another_rank_are_refused_by_name(tx):
    params = random_params(PLAIN)
    other = chain(galore(6), optax.identity())
    grads, *_ = other.update_coordinates(params, other.init(params))
    with pytest.raises(ValueError, match=r"square/kernel has the shape \(6, 16\) instead of \(4,"):
        apply_gradients(tx, grads, init(tx, params), params)


@pytest.mark.parametrize("make", [galore_jax.adamw, galore_jax.muon, galore_jax.fira])
def test_an_unprojected_leaf_may_have_no_gradient_if_the_state_has_no_place_for_it(make):
    params = random_params(PLAIN)
    grads, tx = replaced(params, "bias", None), make(0.1, 4)
    found, _ = apply_gradients(tx, grads, tx.init(grads), params)
    np.testing.assert_array_equal(found["bias"]["bias"], params["bias"]["bias"])


def test_trees_like_an_equinox_model_are_no_functions():
    model = eqx.nn.MLP(8, 8, 16, depth=1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    numbers = jax.tree.map(
        lambda leaf: contrib.GaLoreDimensionNumbers(1, 0) if leaf.ndim == 2 else None, params
    )
    settings = {"weight_dimension_numbers": numbers, "weight_decay": 0.5}
    plain = galore_jax.adamw(0.1, 2, weight_dimension_numbers=numbers)
    decayed = galore_jax.adamw(0.1, 2, mask=mask, **settings)
    one, other = (
        galore_jax.apply_gradients(tx, params, tx.init(params), params)[0]
        for tx in (plain, decayed)
    )
    for before, after in zip(one.layers, other.layers, strict=True):
        np.testing.assert_allclose(after.weight, 0.95 * before.weight, atol=1e-6)
        np.testing.assert_array_equal(after.bias, before.bias)


@pytest.mark.parametrize(
    "tx",
    [
        ADAM,
        chain(clip_by_finite_norm(1.0), galore(4), optax.adamw(0.1)),
        galore_jax.adamw(0.1, 4, weight_decay=0.1),
        galore_jax.lion(0.1, 4, weight_decay=0.1),
        galore_jax.adafactor(0.1, 4, weight_decay=0.1),
    ],
    ids=["adam", "clip", "adamw", "lion", "adafactor"],
)
def test_a_whole_equinox_model_with_its_functions_may_stand_for_its_parameters(tx):
    model = eqx.nn.MLP(8, 12, 16, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)

    @eqx.filter_grad
    def gradients(model):
        return jnp.sum(jax.vmap(model)(jnp.ones((3, 8))) ** 2)

    grads, state = gradients(model), tx.init(params)
    updates, _ = tx.update(grads, state, model)
    wanted, _ = tx.update(grads, state, params)
    assert eqx.tree_equal(updates, wanted)
    updated = eqx.apply_updates(model, updates)
    applied, _ = apply_gradients(tx, grads, state, model)
    assert applied.activation is model.activation
    for one, other in zip(
        *(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (applied, updated)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
@pytest.mark.parametrize("rank", [4, 0.5, lambda shape: shape[0] // 2])
def test_matrices_without_numbers_are_left_whole(name, rank):
    shapes = {"wide": (12, 20), "rows": (0, 8), "columns": (8, 0), "layers": (0, 12, 20)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    tx = getattr(galore_jax, name)(0.1, rank)
    new, _ = apply_gradients(tx, params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, new) == shapes


@pytest.mark.parametrize("tx", [ADAM, STOCK, galore_jax.adamw(0.1, 4, moments="rotate")])
def test_an_optimizer_starts_from_the_shapes_of_the_parameters_alone(tx):
    params = random_params(PLAIN)
    shapes = jax.eval_shape(lambda: params)
    assert eqx.tree_equal(init(tx, shapes), init(tx, params))


@pytest.mark.parametrize(
    "inner",
    [
        contrib.cocob(),
        contrib.dog(),
        contrib.dowg(),
        optax.scale_by_distance_over_gradients(),
        contrib.madgrad(0.1),
        contrib.mechanize(optax.sgd(0.1)),
        contrib.prodigy(),
        contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
        contrib.schedule_free(optax.sgd(0.1), 0.1),
    ],
    ids=[
        *("cocob", "dog", "dowg", "ldog", "madgrad", "mechanic", "prodigy", "sam"),
        "schedule_free",
    ],
)
def test_what_keeps_copies_of_the_parameters_is_warned_of_after_galore(inner):
    for tx in (chain(galore(4), inner), optax.chain(galore(4), inner)):
        with pytest.warns(UserWarning, match="keeps a copy of the parameters.* around the whole"):
            init(tx, random_params(PLAIN))


def test_moments_that_a_compiled_function_starts_are_no_copies():
    adam = optax.adam(1e-3)
    compiled = optax.GradientTransformation(jax.jit(adam.init), adam.update)
    init(chain(galore(4), compiled), random_params(PLAIN))


def test_moments_of_full_size_in_front_of_galore_are_warned_of():
    with pytest.warns(UserWarning, match="put galore in front of it"):
        init(chain(optax.adam(1e-3), galore(4)), random_params(PLAIN))


def test_numbers_of_numpy_are_numbers():
    params = random_params({"wide": (12, 20)})
    axes = optax.contrib.GaLoreDimensionNumbers(np.int64(1), np.int64(0))
    tx = galore(np.float32(0.25), np.int32(7), weight_dimension_numbers=axes)
    state = tx.init(params)
    basis = state.bases["wide"]["kernel"]
    assert (basis.projection.rank, basis.projection.view.rows) == (3, 20)
    assert basis.interval == 7
