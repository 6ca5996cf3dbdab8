"""Rules by path, dimension numbers, and their effects and those of the gaps in a run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers

import galore_jax
from galore_jax import Rule, chain, galore, init
from galore_jax.subspace.rules import projections

PARAMS = {
    "embed": {"embedding": jnp.zeros((30, 12))},
    "layers": {
        "attention": {
            "q_proj": {"kernel": jnp.zeros((2, 12, 16))},
            "o_proj": {"kernel": jnp.zeros((2, 16, 12))},
        },
        "mlp": {"up_proj": {"kernel": jnp.zeros((2, 12, 32)), "bias": jnp.zeros((2, 32))}},
        "norm": {"scale": jnp.zeros((2, 12))},
    },
    "lm_head": {"kernel": jnp.zeros((12, 30))},
}
QUERY, OUT, UP = (
    f"layers/{name}/kernel" for name in ("attention/q_proj", "attention/o_proj", "mlp/up_proj")
)


def projected(rules=None, rank=4, proj_type="std", numbers=None, params=PARAMS):
    """The projections by name."""
    found = projections(params, Rule(rank, proj_type), rules or {}, numbers)
    return {projection.name: projection for projection in jax.tree.leaves(found)}


def ranks(*args, **settings):
    return {name: found.rank for name, found in projected(*args, **settings).items()}


def test_names_decide_without_rules():
    assert ranks() == {QUERY: 4, OUT: 4, UP: 4}


def test_two_parameters_with_one_path_are_refused():
    params = {"a/b": jnp.zeros((8, 8)), "a": {"b": jnp.zeros((8, 8))}}
    with pytest.raises(ValueError, match="two parameters have the path a/b: rename one"):
        galore_jax.galore(4).init(params)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (3, {QUERY: 3, OUT: 3, UP: 3}),
        (0.5, {QUERY: 6, OUT: 6, UP: 6}),
        (0.01, {QUERY: 1, OUT: 1, UP: 1}),
        (lambda shape: shape[1] // 4, {QUERY: 4, OUT: 3, UP: 8}),
        (12, {}),
    ],
    ids=["number", "fraction of the smaller side", "at least one", "function", "too large"],
)
def test_a_rank_is_a_number_a_fraction_of_the_smaller_side_or_a_function_of_the_shape(
    rank, expected
):
    assert ranks(rank=rank) == expected
    if expected:
        assert ranks({"layers/*/kernel": Rule(rank)}, rank=2) == expected


@pytest.mark.parametrize(
    ("proj_type", "wide", "tall"),
    [
        ("std", ("left",), ("right",)),
        ("reverse_std", ("right",), ("left",)),
        ("left", ("left",), ("left",)),
        ("right", ("right",), ("right",)),
        ("full", ("left", "right"), ("left", "right")),
    ],
)
def test_a_projection_type_selects_sides_for_all_leaves_or_for_those_of_a_rule(
    proj_type, wide, tall
):
    sides = {name: found.sides for name, found in projected(proj_type=proj_type).items()}
    assert sides == {QUERY: wide, OUT: tall, UP: wide}
    sides = {
        name: found.sides for name, found in projected({QUERY: Rule(proj_type=proj_type)}).items()
    }
    assert sides == {QUERY: wide, OUT: ("right",), UP: ("left",)}


def test_std_projects_the_in_side_of_a_square_kernel():
    square = {"kernel": jnp.zeros((12, 12))}
    assert projected(params=square)["kernel"].sides == ("left",)
    assert projected(params=square, proj_type="reverse_std")["kernel"].sides == ("right",)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"*/attention/*": Rule(2)}, {QUERY: 2, OUT: 2, UP: 4}),
        ({"layers/*": Rule(2)}, {QUERY: 2, OUT: 2, UP: 2}),
        ({"*_proj/*": None}, {}),
        ({QUERY: None}, {OUT: 4, UP: 4}),
        ({"*[qo]_proj/kernel": Rule(5)}, {QUERY: 5, OUT: 5, UP: 4}),
        ({re.compile(r"(q|up)_proj/k"): Rule(2)}, {QUERY: 2, OUT: 4, UP: 2}),
        ({re.compile(r"kernel$"): None}, {}),
        ({QUERY: Rule(1), "layers/*/kernel": Rule(2)}, {QUERY: 1, OUT: 2, UP: 2}),
        ({"*/attention/*": None, re.compile("layers.*kernel"): Rule(3)}, {UP: 3}),
        ({"lm_head/*": Rule()}, {QUERY: 4, OUT: 4, UP: 4, "lm_head/kernel": 4}),
        ({"*embedding": Rule(6)}, {QUERY: 4, OUT: 4, UP: 4, "embed/embedding": 6}),
    ],
)
def test_the_first_rule_that_matches_a_path_applies(rules, expected):
    assert ranks(rules) == expected


def test_a_rule_without_a_rank_does_not_project_matrices_too_small_for_the_default_rank():
    assert ranks({"layers/*": Rule(scale=2.0)}, rank=12) == {}


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"*/q_prj/kernel": Rule(2)}, f"'*/q_prj/kernel' applies to no leaf: .* {QUERY}"),
        (
            {re.compile("^q_proj"): None},
            "'^q_proj' applies to no leaf",
        ),
        ({"layers/*/kernel": Rule(2), UP: None}, f"'{UP}' applies to no leaf: .* earlier rule"),
        ({UP: Rule(12)}, f"gives {UP}, a matrix of 12 x 32, the rank 12: choose a rank below 12"),
        ({UP: Rule(lambda shape: 0.5)}, f"returned 0.5 for {UP}, a matrix of 12 x 32"),
    ],
    ids=["unmatched glob", "unmatched expression", "shadowed", "rank", "function"],
)
def test_a_rule_that_does_not_fit_is_refused_by_name(rules, sentence):
    with pytest.raises(ValueError, match=sentence.replace("*/", r"\*/").replace("^", r"\^")):
        init(chain(galore(4, rules=rules), optax.adam(1e-3)), PARAMS)


def weights_and_basis(grads, numbers=None):
    """Weights and basis after steps of Adam from zero, with a refresh at every other step."""
    settings = {"refresh": "svd", "weight_dimension_numbers": numbers}
    tx = chain(galore(4, 2, **settings), optax.adam(0.1))

    def step(carry, grad):
        params, state = carry
        return galore_jax.apply_gradients(tx, {"w": grad}, state, params), None

    params = {"w": jnp.zeros(grads.shape[1:])}
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params["w"], state.inner_states[0].bases["w"]


@pytest.mark.parametrize(
    ("shape", "reduction", "output", "order", "matrices"),
    [
        ((3, 3, 4, 16), (0, 1, 2), 3, (0, 1, 2, 3), (36, 16)),
        ((12, 2, 8), 0, (1, 2), (0, 1, 2), (12, 16)),
        ((2, 8, 12), (0, 1), 2, (0, 1, 2), (16, 12)),
        ((3, 12, 16), 1, 2, (0, 1, 2), (3, 12, 16)),
        ((12, 3, 16), 0, 2, (1, 0, 2), (3, 12, 16)),
        ((12, 16, 3), -3, -2, (2, 0, 1), (3, 12, 16)),
        ((2, 12, 3, 16), 1, 3, (0, 2, 1, 3), (2, 3, 12, 16)),
    ],
    ids=["convolution", "heads", "heads out", "layers", "middle", "last", "layers and experts"],
)
def test_a_leaf_is_trained_as_the_matrices_that_its_dimension_numbers_name(
    shape, reduction, output, order, matrices
):
    numbers = GaLoreDimensionNumbers(reduction_axis=reduction, output_axis=output)
    grads = jax.random.normal(jax.random.key(0), (4, *shape))
    weights, basis = weights_and_basis(grads, numbers)
    as_matrices = grads.transpose(0, *(axis + 1 for axis in order)).reshape(4, *matrices)
    expected, expected_basis = weights_and_basis(as_matrices)
    assert basis.age.shape == matrices[:-2]
    for side, vectors in expected_basis.vectors.items():
        np.testing.assert_allclose(basis.vectors[side], vectors, atol=1e-6)
    np.testing.assert_allclose(weights.transpose(order).reshape(matrices), expected, atol=1e-6)


def test_dimension_numbers_apply_to_leaves_that_their_names_would_exclude():
    numbers = {"embed": GaLoreDimensionNumbers(0, 1), "layers": None, "lm_head": None}
    assert ranks(numbers=numbers) == {"embed/embedding": 4}


def run_galore(tx, params, grads, steps):
    """The bases after each update; `grads` maps the update's number to gradients."""

    def step(state, count):
        _, state = tx.update(grads(count), state, params)
        return state, state.bases

    return jax.lax.scan(step, init(tx, params), jnp.arange(steps))[1]


def random_grads(params, count):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
    return tree.unflatten(
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def refreshes(basis):
    """Whether each update refreshed, `(steps, *batch)`: the age is 1 after a refresh."""
    return np.asarray(basis.age) == 1


def test_the_scale_of_a_rule_applies_to_its_updates():
    params = {"a": jnp.zeros((12, 20)), "b": jnp.zeros((3, 20, 12))}
    grads = random_grads(params, 0)
    plain, ruled = (
        jax.jit(tx.update)(grads, tx.init(params), params)[0]
        for rules in ({}, {"a": Rule(scale=0.75)})
        for tx in [chain(galore(4, scale=0.25, rules=rules), optax.sgd(1.0))]
    )
    np.testing.assert_allclose(ruled["a"], 3 * plain["a"], rtol=1e-6)
    np.testing.assert_array_equal(ruled["b"], plain["b"])


def test_the_gap_and_the_refresh_of_a_rule_apply_to_its_bases():
    params = {"a": jnp.zeros((12, 20)), "b": jnp.zeros((3, 20, 12))}
    rules = {"b": Rule(update_proj_gap=3, refresh="random")}
    grads = lambda count: random_grads(params, count)
    ruled = run_galore(galore(4, 5, rules=rules), params, grads, 11)
    alone = run_galore(galore(4, 3, refresh="random"), params, grads, 11)
    assert np.flatnonzero(refreshes(ruled["a"])).tolist() == [0, 5, 10]
    for matrix in refreshes(ruled["b"]).T:
        assert np.flatnonzero(matrix).tolist() == [0, 3, 6, 9]
    np.testing.assert_array_equal(ruled["b"].vectors["right"], alone["b"].vectors["right"])


GAP = 3
LAZY = {"update_proj_gap": GAP, "lazy_overlap": 0.9, "refresh": "svd"}


def constant_grads(params):
    grads = random_grads(params, 0)
    return lambda count: jax.tree.map(lambda grad: grad * (1 + count), grads)


def test_the_gap_doubles_up_to_its_bound_if_the_subspace_does_not_change():
    params = {"a": jnp.zeros((2, 8, 12))}
    steps = 70
    lazy = run_galore(galore(2, **LAZY), params, constant_grads(params), steps)
    # The first basis is random, so the first interval is T; then 2 T, 4 T and, the bound, 8 T.
    expected, gap, update = [], 1, 0
    while update < steps:
        expected.append(update)
        update += GAP * gap
        gap = min(2 * gap, 8)
    for matrix in refreshes(lazy["a"]).T:
        assert np.flatnonzero(matrix).tolist() == expected
    saved = len(range(0, steps, GAP)) - len(expected)
    assert lazy["a"].saved[-1].tolist() == [saved, saved]
    assert lazy["a"].overlap[0].max() < 0.9
    np.testing.assert_allclose(lazy["a"].overlap[-1], 1, atol=1e-5)


def test_the_gap_is_reset_if_the_subspace_moves():
    params = {"a": jnp.zeros((2, 8, 12))}
    constant = constant_grads(params)

    def grads(count):
        grads = random_grads(params, count)["a"]
        # The first matrix is constant until update T and changes from then on, the second always.
        return {"a": grads.at[0].set(jnp.where(count <= GAP, constant(count)["a"][0], grads[0]))}

    lazy = run_galore(galore(2, **LAZY), params, grads, 6 * GAP)
    first, second = refreshes(lazy["a"]).T
    assert np.flatnonzero(first).tolist() == [0, GAP, 3 * GAP, 4 * GAP, 5 * GAP]
    assert np.flatnonzero(second).tolist() == [GAP * i for i in range(6)]
    assert lazy["a"].saved[-1].tolist() == [1, 0]


def test_a_lazy_gap_counts_finite_updates_only():
    params = {"a": jnp.zeros((2, 8, 12))}
    constant = constant_grads(params)

    def grads(count):
        # Every odd update of the first matrix is not finite.
        bad = jnp.where(count % 2, jnp.nan, 1)
        return {"a": constant(count)["a"].at[0].multiply(bad)}

    lazy = run_galore(galore(2, **LAZY), params, grads, 44)
    first, second = (np.flatnonzero(matrix) for matrix in refreshes(lazy["a"]).T)
    first = first[first % 2 == 0]
    assert (first // 2).tolist() == [0, GAP, 3 * GAP, 7 * GAP]
    assert second.tolist() == [0, GAP, 3 * GAP, 7 * GAP]
    assert lazy["a"].skipped[-1].tolist() == [22, 0]
