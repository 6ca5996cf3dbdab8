"""Parameters in 8 bits, against numpy and against plain arrays of the same values."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from test_layerwise import CONFIG, OTHER_MODEL, batch_of, loss_of, model_of

import galore_jax
from galore_jax import layerwise, to_arrays, to_int8
from galore_jax.models.llama import Llama
from galore_jax.ops.int8 import is_int8, quantized

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


def by_numpy(x, added=0.5):
    """Codes and scales from the definition, in float64."""
    largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    fractions = x / np.where(largest > 0, largest, 1)
    return np.floor(fractions * 127 + added).astype(np.int8), largest


# The numbers themselves.


def test_codes_are_the_nearest_fractions_of_the_largest_number_of_a_row():
    x = normal(7, 300) * 10.0 ** GENERATOR.integers(-30, 30, (7, 1))
    x[3] = 0
    one = quantized(jnp.asarray(x))
    codes, scales = by_numpy(x)
    np.testing.assert_array_equal(one.scales, scales.astype(np.float32))
    # Another code where float32 rounds a fraction across the middle between two.
    assert np.abs(np.int32(one.codes) - codes).max() <= 1
    assert (one.codes != codes).mean() < 1e-3
    assert (np.abs(one.float32() - x) <= scales * (0.5 / 127 + 1e-6)).all()
    assert not np.asarray(one.codes)[3].any()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_number_that_is_not_finite_is_nan_and_no_other(number):
    x = normal(3, 40)
    x[1, 5] = number
    array = np.asarray(quantized(jnp.asarray(x)).unbox())
    assert np.isnan(array[1]).all()
    assert np.isfinite(array[[0, 2]]).all()


def test_numbers_at_the_ends_of_float32_stay_finite():
    largest = np.finfo(np.float32).max
    x = np.array([[largest, -largest, largest / 3], [3e-36, -3e-36, 2e-36]], np.float32)
    array = np.asarray(quantized(jnp.asarray(x)).float32())
    np.testing.assert_allclose(array, x, rtol=1e-2)


def test_stochastic_rounding_is_unbiased_to_neighbouring_codes_and_saturates_nothing():
    x = jnp.asarray(normal(4, 200))
    seeds = jax.random.bits(jax.random.key(0), (4000, 2), np.uint32)
    codes = jax.vmap(lambda seed: quantized(x, None, seed).codes)(seeds).astype(np.float32)
    exact = np.asarray(x / jnp.max(jnp.abs(x), axis=-1, keepdims=True) * 127, np.float64)
    assert np.abs(codes - exact).max() < 1 + 1e-4
    at_end = np.abs(exact) > 127 - 1e-4
    assert at_end.sum() == 4
    assert (np.abs(codes[:, at_end]) == 127).all()
    # Each mean of 4000 is off by at most 0.5 / √4000 in the standard deviation: six of them.
    assert np.abs(np.mean(codes, axis=0) - exact).max() < 6 * 0.5 / 4000**0.5


# Which parameters.


def test_matrices_are_stored_in_8_bits_and_vectors_and_short_rows_stay():
    params = {
        "embed": {"embedding": normal(50, 64)},
        "layers": {"mlp": {"kernel": normal(2, 64, 96)}, "norm": {"scale": normal(2, 64)}},
        "head": {"kernel": normal(64, 31), "bias": normal(64)},
        "step": np.int32(3),
    }
    new = to_int8(params)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves_of(new) if is_int8(leaf)}
    assert [leaf.shape for leaf in found.values()] == [(50, 64), (2, 64, 96)]
    assert new["head"]["kernel"] is params["head"]["kernel"]
    assert jax.tree.structure(to_arrays(new)) == jax.tree.structure(params)
    bytes_of = lambda tree: sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of(found) == 50 * (64 + 4) + 2 * 64 * (96 + 4)
    assert jax.tree.structure(to_int8(new)) == jax.tree.structure(new)


def leaves_of(params):
    return jax.tree_util.tree_leaves_with_path(params, is_leaf=is_int8)


@functools.cache
def small(config):
    """A model in 8 bits whose hidden size makes all its matrices worth it."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    config = dataclasses.replace(config, weights="int8")
    return jax.jit(lambda: Llama(config).init(jax.random.key(0), tokens)["params"])()


@pytest.mark.parametrize("config", [CONFIG, OTHER_MODEL])
def test_a_model_with_weights_in_8_bits_starts_as_a_plain_one_quantised(config):
    tokens = jnp.zeros((1, 4), jnp.int32)
    plain = jax.jit(lambda: to_int8(Llama(config).init(jax.random.key(0), tokens)["params"]))()
    assert any(is_int8(leaf) for _, leaf in leaves_of(plain))
    jax.tree.map(np.testing.assert_array_equal, small(config), plain)


# Gradients and updates.


def plain_loss(params, x):
    """Uses that are projected, partly projected and not at all, and one that has no rule."""
    params = to_arrays(params)
    hidden = jnp.tanh(x @ params["projected"])
    partly = jnp.tanh(hidden @ params["partly"]) + jnp.sin(params["partly"]).sum()
    unknown = jax.custom_vjp(lambda a, w: a @ w)
    unknown.defvjp(lambda a, w: (a @ w, (a, w)), lambda r, dy: (dy @ r[1].T, 2 * r[0].T @ dy))
    found = params["table"][jnp.arange(len(x)) % 7] * unknown(partly, params["unknown"])
    return jnp.mean(found**2) + jnp.sum(params["whole"][0] ** 2)


PARAMS = {
    "projected": normal(40, 48),
    "partly": normal(48, 48),
    "unknown": normal(48, 48),
    "table": normal(36, 48),
    "whole": normal(33, 40),
}


@pytest.mark.parametrize("config", [CONFIG, OTHER_MODEL])
def test_gradients_of_a_flax_model_are_those_of_the_arrays_it_stands_for(config):
    loss, params, batch = functools.partial(loss_of, config), small(config), batch_of(1)
    tx = galore_jax.adamw(0.01, rank=6)
    state = galore_jax.init(tx, params)
    uses = galore_jax.describe(params, tx, loss, batch).uses
    assert {own.gradient for own in uses.values()} == {"projected"}
    assert_equal_gradients(loss, state, params, batch)


def test_gradients_of_every_other_use_are_those_of_the_arrays_too():
    params, x = to_int8(PARAMS), jnp.asarray(normal(10, 40))
    tx = galore_jax.adamw(0.01, rank=6)
    state = galore_jax.init(tx, params)
    uses = galore_jax.describe(params, tx, plain_loss, x).uses
    gradients = ["projected", "partly", "full", "full", "full"]
    assert [uses[name].gradient for name in PARAMS] == gradients
    assert_equal_gradients(plain_loss, state, params, x)


def assert_equal_gradients(loss, state, params, *batch):
    gradients = jax.jit(galore_jax.value_and_grad(loss))
    ours = gradients(params, state, *batch)
    theirs = gradients(to_arrays(params), state, *batch)
    # The same program but for what makes the arrays.
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("make", [galore_jax.adamw, galore_jax.muon, galore_jax.fira, "adam"])
def test_an_update_adds_in_float32_and_rounds_to_a_neighbour_without_bias(make):
    params, batch = small(CONFIG), batch_of(2)
    loss = functools.partial(loss_of, CONFIG)
    tx = optax.adamw(0.01) if make == "adam" else make(0.01, rank=6, weight_decay=0.1)
    step = jax.jit(galore_jax.make_step(loss, tx))
    exact = step(to_arrays(params), galore_jax.init(tx, to_arrays(params)), batch)
    state = galore_jax.init(tx, params)
    rounded = jax.jit(
        jax.vmap(lambda key: step(params, state, batch, rounding_key=key).params),
    )(jax.random.split(jax.random.key(1), 32))

    def check(new, wanted):
        if not is_int8(new):
            return np.testing.assert_allclose(new[0], wanted, atol=1e-6)
        errors = (new.float32() - wanted) / (new.scales / 127)
        assert np.abs(errors).max() < 1.001
        # The mean of errors whose standard deviation is at most 0.5.
        assert np.abs(np.mean(errors)) < 6 * 0.5 / errors.size**0.5
        return None

    jax.tree.map(check, rounded, exact.params, is_leaf=is_int8)
    nearest = step(params, state, batch).params
    distance = lambda new, wanted: np.abs(new.float32() - wanted) / (new.scales / 127)
    far = jax.tree.map(
        lambda new, wanted: float(distance(new, wanted).max()) if is_int8(new) else 0.0,
        *(nearest, exact.params),
        is_leaf=is_int8,
    )
    assert max(jax.tree.leaves(far)) < 0.501


def test_without_a_key_small_updates_are_lost_and_with_one_they_are_not():
    params = to_int8({"kernel": jnp.asarray(normal(64, 64))})
    tx = optax.sgd(1.0)
    gradient = {"kernel": jnp.full((64, 64), 1e-4)}

    @jax.jit
    def train(params, key):
        def one(n, params):
            folded = None if key is None else jax.random.fold_in(key, n)
            return galore_jax.apply_gradients(tx, gradient, tx.init(None), params, key=folded)[0]

        return lax.fori_loop(0, 100, one, params)

    def moved(key):
        return np.mean(train(params, key)["kernel"].float32() - params["kernel"].float32())

    # Rows have their largest number, which is not rounded, on either side.
    assert abs(moved(None)) < 0.001
    np.testing.assert_allclose(moved(jax.random.key(0)), -0.01, rtol=0.05)


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_stacks_and_other_layouts_are_updated_matrix_by_matrix(batch_axis):
    weights = normal(40, 3, 64).swapaxes(0, 1) if batch_axis == 0 else normal(40, 3, 64)
    params = to_int8({"w": jnp.asarray(weights)})
    numbers = types.SimpleNamespace(reduction_axis=1 - batch_axis, output_axis=2)
    tx = galore_jax.adamw(0.1, rank=4, weight_dimension_numbers=numbers)
    gradient = {"w": jnp.asarray(normal(*weights.shape))}
    update = jax.jit(functools.partial(galore_jax.apply_gradients, tx))
    new, _ = update(gradient, galore_jax.init(tx, params), params)
    arrays = to_arrays(params)
    wanted, _ = update(gradient, galore_jax.init(tx, arrays), arrays)
    errors = np.abs(new["w"].float32() - wanted["w"]) / (new["w"].scales / 127)
    assert errors.max() < 0.501
    assert np.abs(wanted["w"] - arrays["w"]).max() > 0.01


@pytest.mark.parametrize("stack", [2, 3])
def test_a_vmap_over_another_axis_gives_the_gradients_of_the_arrays(stack):
    # It moves the axis to the front of the array, but not of what the derivative belongs to.
    params = to_int8({"w": jnp.asarray(normal(3, stack, 40, 48))})
    x = jnp.asarray(normal(3, stack, 10, 40))

    def loss(params, x):
        of_one = lambda params, x: jnp.tanh(jnp.einsum("ati,aio->ato", x, to_arrays(params)["w"]))
        return jnp.mean(jax.vmap(of_one, in_axes=(1, 1))(params, x) ** 2)

    state = galore_jax.init(galore_jax.adamw(0.1, rank=4), params)
    _, gradients = jax.jit(galore_jax.value_and_grad(loss))(params, state, x)
    full = jax.jit(jax.grad(loss))(to_arrays(params), x)
    np.testing.assert_allclose(gradients["w"], full["w"], rtol=1e-5, atol=1e-8)


def test_check_projection_takes_them():
    params, x = to_int8({"w": jnp.asarray(normal(40, 48))}), jnp.asarray(normal(10, 40))
    state = galore_jax.init(galore_jax.adamw(0.1, rank=4), params)
    loss = lambda params, x: jnp.mean(jnp.tanh(x @ to_arrays(params)["w"]) ** 2)
    assert galore_jax.check_projection(loss)(params, state, x)["w"] < 1e-5


def test_codes_that_were_cast_are_refused_in_a_sentence():
    params = to_int8({"w": jnp.asarray(normal(40, 48))})
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for changed in (narrow, optax.tree.scale(2.0, params)):
        with pytest.raises(TypeError, match=r"call galore_jax\.to_arrays before"):
            to_arrays(changed)


# Layer-wise steps.


@pytest.mark.parametrize("config", [CONFIG, OTHER_MODEL])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_layerwise_step_equals_an_ordinary_one_up_to_codes_at_ties(config, micro_batches):
    tx = galore_jax.adamw(0.01, rank=6)
    params, batch = small(config), batch_of(3)
    loss = functools.partial(loss_of, config)
    settings = {"refreshes": True, "micro_batches": micro_batches}
    if micro_batches > 1:  # Rows of equal numbers of targets, and the bases of all of them.
        batch = jax.tree.map(lambda rows: jnp.concatenate([rows[:1]] * 4), batch)
    ours = jax.jit(galore_jax.make_step(model_of(config), tx, **settings))
    theirs = jax.jit(galore_jax.make_step(loss, tx, **settings))
    one = ours(params, layerwise.init(tx, params), batch)
    other = theirs(params, galore_jax.init(tx, params), batch)
    np.testing.assert_allclose(one.value, other.value, rtol=1e-5)

    def compare(new, wanted):
        if not is_int8(new):
            return np.testing.assert_allclose(new, wanted, rtol=1e-4, atol=1e-5)
        differ = np.abs(np.int32(new.codes) - np.int32(wanted.codes))
        assert differ.max() <= 1
        assert (differ > 0).mean() < 0.01
        return np.testing.assert_allclose(new.scales, wanted.scales, rtol=1e-4)

    jax.tree.map(compare, one.params, other.params, is_leaf=is_int8)


def test_the_compiled_step_holds_no_other_copy_of_the_weights():
    config = dataclasses.replace(CONFIG, num_layers=5, hidden_size=64, intermediate_size=88)
    tx = galore_jax.muon(0.01, rank=8, eight_bit=True, basis_dtype="int8")
    params, batch = small(config), batch_of(0)
    state = layerwise.init(tx, params)
    step = galore_jax.make_step(model_of(config), tx, refreshes=False)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile().as_text()
    stacks = {
        ",".join(map(str, leaf.shape))
        for path, leaf in leaves_of(params["layers"])
        if is_int8(leaf)
    }
    assert stacks == {"5,64,32", "5,64,64", "5,64,88", "5,88,64"}
    found = {(dtype, shape) for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", text)}
    assert {dtype for dtype, shape in found if shape in stacks} == {"s8"}


# What is refused.


def test_a_chain_of_optax_is_refused():
    params = to_int8({"kernel": jnp.ones((64, 128))})
    with pytest.raises(ValueError, match=r"need galore_jax\.chain in place of optax\.chain"):
        optax.chain(galore_jax.galore(rank=8), optax.adam(1e-3)).init(params)


def test_several_devices_are_refused():
    params = to_int8({"kernel": jnp.ones((64, 64))})
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",))
    with pytest.raises(ValueError, match="8 bits are for one device"):
        galore_jax.shardings(galore_jax.adamw(0.1, rank=4), params, mesh)
