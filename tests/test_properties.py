"""What every ready-made optimizer keeps to, with every refresh and whatever becomes of moments."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, galore
from galore_jax.subspace.new_basis import REFRESH
from galore_jax.subspace.projection import MOMENTS

RANK, GAP = 2, 2
SHAPES = {"stack": (2, 6, 8), "bias": (8,)}


def momentum(rate, rank, gap, scale, **settings):
    return chain(galore(rank, gap, scale, **settings), optax.sgd(rate, momentum=0.9))


def apollo_mini(rate, rank, gap, scale, **settings):
    return galore_jax.apollo(rate, 1, gap, scale, **settings)


OPTIMIZERS = {
    "adamw": galore_jax.adamw,
    "adafactor": galore_jax.adafactor,
    "lion": galore_jax.lion,
    "muon": galore_jax.muon,
    "fira": galore_jax.fira,
    "apollo": galore_jax.apollo,
    "apollo_mini": apollo_mini,
    "momentum": momentum,
}
# Each refresh with each rule for moments, in one optimizer.
CASES = [
    (name, refresh, "keep" if name in ("fira", "apollo", "apollo_mini") else moments)
    for name, (refresh, moments) in zip(
        OPTIMIZERS, itertools.product(REFRESH, MOMENTS), strict=True
    )
]
TREES = {
    "empty": {},
    "number": {"number": 1.0},
    "scalar": {"scalar": jnp.float32(1), "none": None},
    "array": jnp.ones(3),
}


class Case(NamedTuple):
    """An optimizer, and what it does by itself in three steps, with two refreshes.

    Attributes:
      make: the optimizer from its rate and its scale.
      tx: with the rate 0.1 and the scale 0.5.
      step: of parameters, state and gradients, compiled, the first two donated.
      params: what it starts from.
      grads: of each step.
      after: the parameters after all steps.
    """

    make: Callable[..., optax.GradientTransformation]
    tx: optax.GradientTransformation
    step: jax.stages.Wrapped
    params: dict
    grads: list
    after: dict


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def assert_close(one, other, atol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def make_optimizer(name, method, moments, rate=0.1, scale=0.5):
    return OPTIMIZERS[name](rate, RANK, GAP, scale, refresh=method, moments=moments)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    make = functools.partial(make_optimizer, *request.param)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, grads):
        return apply_gradients(tx, grads, state, params)

    tx, start, grads = make(), random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    params, state = jax.tree.map(jnp.copy, start), tx.init(start)
    for grad in grads:
        params, state = step(params, state, grad)
    return Case(make, tx, step, start, grads, params)


def test_later_steps_do_not_recompile_and_donated_buffers_are_reused(case):
    params, state = jax.tree.map(jnp.copy, (case.params, case.tx.init(case.params)))
    for grads in case.grads:
        held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))}
        params, state = case.step(params, state, grads)
        # All but the scale, a setting.
        arrays = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.ndim > 0]
        assert {leaf.unsafe_buffer_pointer() for leaf in arrays} <= held
    assert case.step._cache_size() == 1


def test_shapes_are_known_without_computing(case):
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    state = jax.eval_shape(case.tx.init, case.params)
    _, after = jax.eval_shape(case.tx.update, case.grads[0], state, case.params)
    for tree in (state, after):
        assert jax.tree.structure(tree) == jax.tree.structure(case.tx.init(case.params))
        assert shapes(tree) == shapes(case.tx.init(case.params))


def test_rate_and_scale_may_be_hyperparameters(case):
    tx = optax.inject_hyperparams(case.make)(rate=0.1, scale=0.5)
    state, update = tx.init(case.params), jax.jit(tx.update)
    plain, _ = update(case.grads[0], state, case.params)
    for name, factors in (("rate", {"stack": 3, "bias": 3}), ("scale", {"stack": 3, "bias": 1})):
        tripled = state.hyperparams | {name: 3 * state.hyperparams[name]}
        updates, _ = update(case.grads[0], state._replace(hyperparams=tripled), case.params)
        for leaf, factor in factors.items():
            np.testing.assert_allclose(updates[leaf], factor * plain[leaf], rtol=1e-5, atol=1e-6)


def test_wrappers_of_optax_and_extra_arguments_change_nothing(case):
    mask = {"stack": True, "bias": True, "other": False}
    masked = optax.masked(optax.inject_hyperparams(case.make)(0.1), mask)
    labels = {"stack": "trained", "bias": "trained", "other": "frozen"}
    parted = optax.partition({"trained": masked, "frozen": optax.set_to_zero()}, labels)
    tx = optax.MultiSteps(optax.apply_if_finite(parted, 3), 2)
    other = {"other": jnp.ones((6, 8))}
    # Two gradients with the mean of each one.
    pairs = [
        jax.tree.map(lambda g, factor=factor: factor * g, grads | other)
        for grads in case.grads
        for factor in (0.5, 1.5)
    ]
    params = case.params | other
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in pairs:
        updates, state = update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    assert_close(params, case.after | other)


def test_map_params_reaches_moments_and_bases_but_not_counts(case):
    state = case.tx.init(case.params)
    mapped = optax.tree.map_params(case.tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    galore_state, *_ = getattr(state, "inner_states", state)
    mapped_galore, *_ = getattr(mapped, "inner_states", mapped)
    assert mapped_galore.count == galore_state.count
    for side, vectors in galore_state.bases["stack"].vectors.items():
        np.testing.assert_array_equal(mapped_galore.bases["stack"].vectors[side], vectors + 1)


def test_bfloat16_parameters_keep_their_dtype_and_have_a_float32_state(case):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    state = case.tx.init(params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    step = jax.jit(lambda p, s, g: apply_gradients(case.tx, g, s, p))
    after, _ = step(params, state, case.grads[0])
    exact, _ = case.step(*jax.tree.map(jnp.copy, (case.params, state)), case.grads[0])
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        # Rounded before and after, each time by 2^-9 of a number below 4.
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=2 * 4 * 2**-9)


@pytest.mark.parametrize(
    ("tree", "name"), list(zip(itertools.cycle(TREES), OPTIMIZERS, strict=False))
)
def test_trees_without_a_matrix_are_trained_too(tree, name):
    params, tx = TREES[tree], make_optimizer(name, "subspace_iteration", "keep")
    grads = jax.tree.map(jnp.ones_like, params)
    after, _ = apply_gradients(tx, grads, tx.init(params), params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    # Down the gradient, which is 1.
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        assert jnp.all(one < other)


def test_an_ensemble_of_nnx_states_is_trained_under_vmap_like_a_dict_alone(case, nnx):
    def member(tree, factor):
        return nnx.State({name: nnx.Param(factor * leaf) for name, leaf in tree.items()})

    def ensemble(tree):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), member(tree, 3), member(tree, 1))

    params = ensemble(case.params)
    state = jax.vmap(case.tx.init)(params)
    step = jax.jit(jax.vmap(lambda p, s, g: apply_gradients(case.tx, g, s, p)))
    for grads in case.grads:
        params, state = step(params, state, ensemble(grads))
    second = nnx.to_pure_dict(jax.tree.map(lambda leaf: leaf[1], params))
    assert_close(second, case.after)
