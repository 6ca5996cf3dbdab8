"""What is refused, in a sentence."""

import functools

import jax.numpy as jnp
import optax
import pytest
from trees import PLAIN, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore
from galore_jax.optim.galore_state import bases_of


def test_nothing_may_follow_a_decay_of_whole_weights():
    params = random_params(PLAIN)
    tx = chain(galore_jax.adamw(0.1, rank=4, weight_decay=0.1), optax.clip(1e-3))
    with pytest.raises(ValueError, match="must come last"):
        tx.update(params, tx.init(params), params)


def test_more_than_one_galore_is_refused():
    with pytest.raises(ValueError, match="more than one galore"):
        chain(galore(8), galore(4), optax.adam(1e-3))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 1.5}, "rank must be an integer of at least 1.* not 1.5"),
        ({"rank": 4, "update_proj_gap": 2**30 + 1}, "gap must be a whole number from 1 to 100,000"),
        ({"rank": 4, "lazy_overlap": 2}, "lazy_overlap must be above 0 and at most 1, not 2"),
        ({"rank": 4, "scale": float("nan")}, "scale must be positive and finite, not nan"),
        ({"rank": 4, "proj_type": "both"}, "proj_type must be one of std, .*, full, not 'both'"),
        (
            {"rank": 4, "basis_dtype": "float16"},
            "must be one of float32, bfloat16, int8, int4, not",
        ),
        ({"rank": 4, "refresh": "qr"}, "refresh must be one of subspace_iteration, eigh, svd"),
        ({"rank": 4, "seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"rank": 4, "rules": ["*"]}, r"rules must map patterns to galore_jax.Rule, .* not \['"),
    ],
)
def test_a_wrong_setting_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        galore(**settings)


def test_a_rank_above_every_matrix_is_warned_of_with_the_largest_of_them():
    params = random_params(PLAIN)
    with pytest.warns(UserWarning, match=r"projects no parameter.*square/kernel, 16 x 16"):
        galore(16).init(params)


def test_parameters_that_are_left_whole_by_a_rule_or_have_no_matrix_are_not_warned_of():
    params = random_params(PLAIN)
    biases = {"bias": params["bias"], "tall": {"bias": params["tall"]["kernel"]}}
    assert not bases_of([galore(4, rules={"*": None}).init(params)])
    assert not bases_of([galore(4, weight_dimension_numbers=lambda _: None).init(params)])
    assert not bases_of([galore(4).init(biases)])


@pytest.mark.parametrize("other", [1e-3, optax.adam])
def test_what_is_no_transformation_is_named(other):
    with pytest.raises(ValueError, match=r"chain: .* is no optax transformation: pass what"):
        galore_jax.chain(galore(4), other)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rank": 5}, "rank = 4, which is 5 here"),
        ({"rules": {"*/kernel": None}}, "rank = 4, which is None here"),
        ({"proj_type": "full"}, r"sides = \('left',\), which is \('left', 'right'\) here"),
        ({"refresh": "svd"}, "refresh = 'subspace_iteration', which is 'svd' here"),
        ({"moments": "rotate"}, "moments = 'keep', which is 'rotate' here"),
        ({"basis_dtype": jnp.int8}, "basis_dtype = 'float32', which is 'int8' here"),
    ],
)
def test_a_state_of_other_settings_is_refused(changed, sentence):
    params = {"layer": {"kernel": random_params(PLAIN)["tall"]["kernel"]}}
    state = galore_jax.adamw(0.1, rank=4, proj_type="left").init(params)
    other = galore_jax.adamw(0.1, **{"rank": 4, "proj_type": "left"} | changed)
    with pytest.raises(ValueError, match=f"state of layer/kernel was started with {sentence}: use"):
        apply_gradients(other, params, state, params)


def test_settings_that_may_change_between_updates_are_those_of_the_optimizer():
    params = {"kernel": random_params(PLAIN)["tall"]["kernel"]}
    state = galore_jax.adamw(0.1, rank=4).init(params)
    other = galore_jax.adamw(0.1, rank=4, scale=0.5, update_proj_gap=7, seed=3, lazy_overlap=0.5)
    _, state = apply_gradients(other, params, state, params)
    (basis,) = bases_of([state.inner_states[0]])
    assert (basis.scale, basis.interval) == (0.5, 7)


def test_an_unknown_implementation_is_refused():
    for make in (galore_jax.scale_by_adam8bit, functools.partial(galore_jax.galore, 4)):
        with pytest.raises(ValueError, match="implementation must be one of xla, pallas, not 'cu"):
            make(implementation="cuda")
