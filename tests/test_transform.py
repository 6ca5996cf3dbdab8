"""The optax face: galore, chain, init, apply_gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import galore_jax
from galore_jax import Coordinates, apply_gradients, chain, galore, init
from galore_jax.subspace import REFRESH
from galore_jax.transform import _warn_of_full_size

STACKED = {"wide": (3, 12, 20), "tall": (3, 20, 12), "square": (3, 16, 16), "bias": (3, 12)}
PLAIN = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16), "bias": (12,)}


def random_params(shapes, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: {"bias" if name == "bias" else "kernel": jax.random.normal(key, shape, dtype)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(params, target):
    """A quadratic with one steep and many flat directions, so that subspaces are well defined."""
    errors = jax.tree.map(lambda p, t: p - t, params, target)
    decay = lambda e: e * 0.6 ** jnp.arange(e.shape[-1])  # noqa: E731
    return sum(jnp.sum(decay(e) ** 2) for e in jax.tree.leaves(errors))


def max_difference(one, other):
    return max(
        jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one, other))
    )


def matrices(array, of_matrix):
    """An array as a list of its matrices (or vectors), whatever stands in front of them."""
    array = np.asarray(array, np.float64)
    if not of_matrix:
        return [array]
    return list(array.reshape(-1, *array.shape[-2:]))


@pytest.mark.parametrize("shapes", [PLAIN, STACKED], ids=["plain", "stacked"])
@pytest.mark.parametrize("method", list(REFRESH))
def test_every_step_over_three_refreshes_agrees_with_the_numpy_reference(shapes, method):
    settings = {"learning_rate": 0.05, "scale": 0.5, "weight_decay": 0.1}
    gap, rank = 5, 4
    tx = galore_jax.adamw(rank=rank, update_proj_gap=gap, refresh=method, **settings)
    params, target = random_params(shapes), random_params(shapes, seed=1)
    state = tx.init(params)
    step = jax.jit(
        lambda p, s: (
            jax.grad(loss)(p, target),
            *apply_gradients(tx, jax.grad(loss)(p, target), s, p),
        )
    )

    refreshes = 0
    for count in range(2 * gap + 2):
        grads, new_params, new_state = step(params, state)
        adam = state.links[1]
        for name, leaf in params.items():
            ((field, weight),) = leaf.items()
            projected = field == "kernel"
            old, new = (s.bases[name][field] for s in (state.links[0], new_state.links[0]))
            at = lambda tree, n=name, f=field: getattr(tree[n][f], "value", tree[n][f])  # noqa: E731
            parts = [
                matrices(x, projected)
                for x in (
                    weight,
                    at(grads),
                    at(adam.mu),
                    at(adam.nu),
                    at(new_params),
                    at(new_state.links[1].mu),
                    at(new_state.links[1].nu),
                )
            ]
            olds = matrices(old.vectors, True) if projected else [None]
            news = matrices(new.vectors, True) if projected else [None]
            for w, g, m, v, w_new, m_new, v_new, p_old, p in zip(*parts, olds, news, strict=True):
                if projected and count % gap == 0:
                    refreshes += 1
                    side = reference.side_of(w)
                    ours = reference.refreshed(g, p_old, side, method, 3 if count == 0 else 1)
                    assert reference.largest_angle(ours, p) < 1e-3
                elif projected:
                    np.testing.assert_array_equal(p, p_old)
                w_ref, moments = reference.adamw_step(
                    w, g, reference.Moments(m, v, count), basis=p, **settings
                )
                np.testing.assert_allclose(w_new, w_ref, atol=1e-5)
                np.testing.assert_allclose(
                    m_new, moments.first, rtol=1e-5, atol=1e-5 * abs(g).max()
                )
                np.testing.assert_allclose(
                    v_new, moments.second, rtol=1e-5, atol=1e-5 * (g**2).max()
                )
        params, state = new_params, new_state
    assert refreshes == 3 * (3 if shapes is PLAIN else 9)


def test_chain_holds_low_rank_adam_moments():
    params = random_params(PLAIN)
    state = chain(galore(rank=8), optax.adam(1e-3)).init(params)
    shapes = jax.tree.map(jnp.shape, optax.tree.get(state, "nu"))
    assert shapes["wide"]["kernel"].value == (8, 20)
    assert shapes["tall"]["kernel"].value == (20, 8)
    assert shapes["square"]["kernel"].value == (8, 16)
    assert shapes["bias"]["bias"] == (12,)


def test_the_called_form_is_the_chain():
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    results = []
    for tx in (galore(rank=8)(optax.adam(1e-2)), chain(galore(rank=8), optax.adam(1e-2))):
        grads = jax.grad(loss)(params, target)
        results.append(tx.update(grads, tx.init(params), params)[0])
    assert max_difference(*results) == 0


@pytest.mark.parametrize(
    "inner",
    [optax.adam(1e-2), optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)],
    ids=["adam", "adamw", "momentum"],
)
def test_the_stock_chain_started_with_init_gives_the_same_parameters_as_chain(inner):
    target = random_params(STACKED, seed=1)
    runs = []
    for tx in (
        chain(galore(rank=8, update_proj_gap=2), inner),
        optax.chain(galore(rank=8, update_proj_gap=2), inner),
    ):
        params = random_params(STACKED)
        state = init(tx, params)
        step = jax.jit(lambda p, s, tx=tx: apply_gradients(tx, jax.grad(loss)(p, target), s, p))
        for _ in range(5):
            params, state = step(params, state)
        runs.append((params, state))
    (params, state), (stock_params, stock_state) = runs
    assert jax.tree.map(jnp.shape, state.links) == jax.tree.map(jnp.shape, stock_state)
    assert max_difference(params, stock_params) <= 1e-6


def test_a_bare_init_trains_with_full_size_moments_and_warns_once_with_both_remedies():
    _warn_of_full_size.cache_clear()
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    tx = optax.chain(galore(rank=8), optax.adam(3e-2))
    state = tx.init(params)
    assert jax.tree.map(jnp.shape, optax.tree.get(state, "mu")) == jax.tree.map(jnp.shape, params)
    before = loss(params, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            updates, state = tx.update(jax.grad(loss)(params, target), state, params)
            params = optax.apply_updates(params, updates)
    (warning,) = caught
    assert "galore_jax.chain" in str(warning.message)
    assert "galore_jax.init(tx, params)" in str(warning.message)
    assert loss(params, target) < 0.7 * before


def test_a_bare_init_hands_on_the_gradient_projected_in_its_full_shape():
    _warn_of_full_size.cache_clear()
    params = random_params({"wide": (12, 20)})
    tx = galore(rank=5)
    with pytest.warns(UserWarning, match="full-size"):
        updates, state = tx.update(params, tx.init(params), params)
    basis = state.bases["wide"]["kernel"].vectors
    expected = basis @ basis.T @ params["wide"]["kernel"]
    np.testing.assert_allclose(updates["wide"]["kernel"], expected, atol=1e-5)


def test_update_and_apply_gradients_agree():
    params, target = random_params(STACKED), random_params(STACKED, seed=1)
    tx = galore_jax.adamw(1e-2, rank=4, weight_decay=0.1)
    grads, state = jax.grad(loss)(params, target), tx.init(params)
    updates, _ = tx.update(grads, state, params)
    applied, _ = apply_gradients(tx, grads, state, params)
    assert max_difference(optax.apply_updates(params, updates), applied) <= 1e-6


def test_transformations_before_galore_see_full_gradients():
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    tx = chain(optax.trace(0.9), optax.clip_by_global_norm(1.0), galore(rank=8), optax.identity())
    state = tx.init(params)
    grads = jax.grad(loss)(params, target)
    updates, state = tx.update(grads, state, params)
    assert max_difference(state.links[0].trace, grads) == 0
    norm = optax.tree.norm(grads)
    value = 0.25 * grads["bias"]["bias"] / norm / 0.25
    np.testing.assert_allclose(updates["bias"]["bias"], value, rtol=1e-5)
    assert float(optax.tree.norm(updates)) <= 1.0


def test_a_ready_made_chain_can_be_extended_in_front():
    tx = chain(optax.clip_by_global_norm(1.0), galore_jax.adamw(1e-2, rank=4))
    params = random_params(PLAIN)
    assert optax.tree.get(tx.init(params), "mu")["wide"]["kernel"].value.shape == (4, 20)
    assert len(tx.init(params).links) == 5


def test_a_stock_chain_with_state_before_galore_is_refused_in_favour_of_chain():
    tx = optax.chain(optax.trace(0.9), galore(rank=4), optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"before galore.*use galore_jax\.chain"):
        init(tx, random_params(PLAIN))


def test_what_enters_the_inner_optimizer_is_float32_and_updates_leave_in_the_parameters_dtype():
    params = random_params(PLAIN, dtype=jnp.bfloat16)
    tx = chain(galore(rank=4), optax.adam(1e-3))
    state = tx.init(params)
    updates, new_state = tx.update(params, state, params)
    for tree in (state, new_state):
        moments = jax.tree.leaves((optax.tree.get(tree, "mu"), optax.tree.get(tree, "nu")))
        assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_a_gradient_that_is_not_finite_leaves_the_basis_and_is_retried_at_the_next_update():
    params = random_params(STACKED)
    tx = galore(rank=4, update_proj_gap=10)
    state = init(tx, params)
    bad = jax.tree.map(lambda x: x, params)
    bad["wide"]["kernel"] = bad["wide"]["kernel"].at[1, 0, 0].set(jnp.nan)
    _, after = tx.update(bad, state, params)
    old, new = (s.bases["wide"]["kernel"].vectors for s in (state, after))
    assert bool((old[1] == new[1]).all())
    assert not bool((old[0] == new[0]).all())
    _, retried = tx.update(params, after, params)
    newest = retried.bases["wide"]["kernel"].vectors
    assert not bool((new[1] == newest[1]).all())
    assert bool((new[0] == newest[0]).all())
    assert retried.ages["wide"]["kernel"].tolist() == [2, 1, 2]


def test_coordinates_that_come_as_such_pass_through():
    params = random_params({"wide": (12, 20)})
    tx = chain(galore(rank=4), optax.sgd(1.0))
    state = tx.init(params)
    projection = state.links[0].bases["wide"]["kernel"].projection
    grads = {"wide": {"kernel": Coordinates(jnp.ones((4, 20)), projection)}}
    updates, state = tx.update(grads, state, params)
    basis = state.links[0].bases["wide"]["kernel"].vectors
    np.testing.assert_allclose(
        updates["wide"]["kernel"], -0.25 * basis @ jnp.ones((4, 20)), atol=1e-6
    )


def test_the_second_step_does_not_recompile_and_donated_buffers_are_reused():
    tx = galore_jax.adamw(1e-2, rank=4)
    params = random_params(STACKED)
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
    grads = random_params(STACKED, seed=2)
    memory = step.lower(params, state, grads).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    scale = state.links[0].scale.nbytes  # set anew from the setting, not carried over
    assert memory.alias_size_in_bytes == held - scale
    for _ in range(3):
        params, state = step(params, state, grads)
    assert step._cache_size() == 1


def test_no_lifted_update_of_a_whole_stacked_leaf_exists():
    params = {"kernel": jnp.zeros((16, 128, 256))}
    tx = galore_jax.adamw(1e-2, rank=4)
    step = jax.jit(lambda p, s, g: apply_gradients(tx, g, s, p), donate_argnums=(0, 1))
    memory = step.lower(params, tx.init(params), params).compile().memory_analysis()
    # A few matrices of the sixteen, and coordinates of 1/32 of the size.
    assert memory.temp_size_in_bytes < params["kernel"].nbytes / 4


def test_works_around_inject_hyperparams_masks_partitions_and_multi_steps():
    params, target = random_params(PLAIN), random_params(PLAIN, seed=1)
    inner = chain(galore(rank=4), optax.adam(0.1))
    labels = {name: "low" if name != "square" else "full" for name in params}
    transformations = [
        optax.inject_hyperparams(
            lambda learning_rate, scale: chain(galore(4, scale=scale), optax.adam(learning_rate))
        )(learning_rate=0.1, scale=1.0),
        optax.partition({"low": inner, "full": optax.adam(0.1)}, labels),
        optax.masked(inner, dict.fromkeys(params, True)),
        optax.MultiSteps(inner, 2),
        optax.apply_if_finite(inner, 3),
        optax.chain(optax.clip_by_global_norm(10.0), galore(4), optax.adam(0.1)),
    ]
    for tx in transformations:
        current, state = params, init(tx, params)
        step = jax.jit(lambda p, s, tx=tx: apply_gradients(tx, jax.grad(loss)(p, target), s, p))
        for _ in range(20):
            current, state = step(current, state)
        assert loss(current, target) < 0.9 * loss(params, target)


def test_tree_get_and_map_params_reach_the_state():
    params = random_params(PLAIN)
    tx = galore_jax.adamw(1e-2, rank=4)
    state = tx.init(params)
    assert optax.tree.get(state, "bases")["wide"]["kernel"].vectors.shape == (12, 4)
    zeros = optax.tree.map_params(tx, jnp.zeros_like, state)
    assert float(jnp.abs(zeros.links[0].bases["wide"]["kernel"].vectors).max()) == 0


def test_trains_an_nnx_model():
    model = nnx.Linear(12, 20, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    tx = chain(galore(rank=4), optax.adam(1e-1))
    state = tx.init(params)
    assert jax.tree.leaves(optax.tree.get(state, "mu")["kernel"])[0].shape == (4, 20)
    x = jax.random.normal(jax.random.key(0), (32, 12))

    def fit(params):
        return jnp.mean((nnx.merge(graph, params)(x) - jnp.tanh(x @ jnp.ones((12, 20)))) ** 2)

    before = fit(params)
    step = jax.jit(lambda p, s: apply_gradients(tx, jax.grad(fit)(p), s, p))
    for _ in range(30):
        params, state = step(params, state)
    assert fit(params) < 0.5 * before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 4, "update_proj_gap": 0}, "gap must be"),
        ({"rank": 4, "refresh": "qr"}, "refresh must be one of subspace_iteration, eigh, svd"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        galore(**settings)
