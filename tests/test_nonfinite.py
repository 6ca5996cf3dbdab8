"""Gradients that are not finite, or too large to be squared: a matrix that has one sits out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, clip_by_finite_norm, galore, init
from galore_jax.subspace.basis import AGE_UNINITIALIZED
from galore_jax.subspace.projection import is_coordinates

STEPS, GAP, RANK = 300, 7, 3
SHAPES = {"stack": (4, 8, 12), "tall": (12, 8), "square": (8, 8), "bias": (12,)}
# In every run the same matrices of the stack and the tall one get faults; the others none.
FAULTY = {"stack": np.array([0, 1, 1, 0], bool), "tall": np.array(True), "square": np.array(False)}
# By fault: what is added to one number of a matrix, and the factor of all. Zeros leave the basis.
ADDED = jnp.array([0, jnp.nan, jnp.inf, -jnp.inf, 0, 0])
FACTORS = jnp.array([1, 1, 1, 1, 1e30, 0])
CLEAN, ZEROS = 0, 5


CASES = [
    ("adamw", "keep", "subspace_iteration"),
    ("adafactor", "rotate", "eigh"),
    ("lion", "rotate", "svd"),
    ("lion", "keep", "random"),
    ("stock", "rotate", "subspace_iteration"),
]


def optimizer(name, **settings):
    if name == "stock":
        return optax.chain(galore(RANK, GAP, **settings), optax.adamw(0.05, weight_decay=0.1))
    return getattr(galore_jax, name)(0.05, RANK, GAP, weight_decay=0.1, **settings)


class Run(NamedTuple):
    """What 300 steps left and, of each step and each matrix, what they did.

    Attributes:
      params: at the end.
      state: at the end.
      before: by leaf, the bits of weights, moments and basis, hashed, `(steps, *batch)`.
      after: the same after the step.
      bases: by leaf, the bits of the basis alone after the step.
      errors: by leaf, of the orthonormality of the basis, `(steps, *batch)`.
      ages: by leaf, after the step.
      skips: by leaf, after the step.
      gaps: by leaf, of the first interval, `(*batch,)`.
    """

    params: dict
    state: tuple
    before: dict
    after: dict
    bases: dict
    errors: dict
    ages: dict
    skips: dict
    gaps: dict


def random_params(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: {"bias" if name == "bias" else "kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def corrupted(gradient, fault, place):
    """Puts a fault into each matrix `(*batch, in, out)`, at a place of it."""
    flat = gradient.reshape(*fault.shape, -1) * FACTORS[fault][..., None]
    here = jnp.arange(flat.shape[-1]) == place[..., None]
    return jnp.where(here, flat + ADDED[fault][..., None], flat).reshape(gradient.shape)


def parts(params, state):
    """The galore's bases, and by leaf all arrays that belong to its matrices."""
    galore_state, *inner = getattr(state, "inner_states", state)
    bases = {name: galore_state.bases[name]["kernel"] for name in FAULTY}
    moments = filter(is_coordinates, jax.tree.leaves(inner, is_leaf=is_coordinates))
    arrays = {name: [params[name]["kernel"], *bases[name].vectors.values()] for name in FAULTY}
    for moment in moments:
        arrays[moment.projection.path[0]].append(moment.value)
    return bases, arrays


def bits(arrays, batch):
    """A number for all bits of each matrix: it changes when one of them does."""
    flat = [array.reshape(*batch, -1).astype(jnp.float32) for array in arrays]
    words = jax.lax.bitcast_convert_type(jnp.concatenate(flat, axis=-1), jnp.uint32)
    # Odd weights, so that no change of a single word is lost modulo 2^32.
    weights = jax.random.bits(jax.random.key(7), words.shape[-1:], jnp.uint32) | 1
    return jnp.sum(words * weights, axis=-1)


def orthonormality_error(basis):
    (vectors,) = basis.vectors.values()
    gram = jnp.matmul(vectors.mT, vectors, precision="highest")
    return jnp.max(jnp.abs(gram - jnp.eye(RANK)), axis=(-2, -1))


@pytest.fixture(scope="module")
def faults():
    """By leaf, for every step and matrix, which fault and where."""
    random = np.random.default_rng(0)
    found = {}
    for name, faulty in FAULTY.items():
        shape = (STEPS, *faulty.shape)
        kinds = random.integers(1, ZEROS + 1, shape) * (random.random(shape) < 0.4)
        found[name] = np.where(faulty, kinds, CLEAN), random.integers(0, 64, shape)
    return found


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def runs(request, faults):
    """A clean run and one with faults, of one compiled program."""
    name, moments, method = request.param
    tx = optimizer(name, moments=moments, refresh=method)

    @jax.jit
    def run(faults):
        params = random_params(jax.random.key(0))
        state = init(tx, params)

        def step(carry, inputs):
            params, state = carry
            count, faults = inputs
            noise = random_params(jax.random.fold_in(jax.random.key(1), count))
            grads = jax.tree.map(lambda p, n: 0.1 * p + n, params, noise)
            for name, (fault, place) in faults.items():
                grads[name]["kernel"] = corrupted(grads[name]["kernel"], fault, place)
            _, before = parts(params, state)
            params, state = apply_gradients(tx, grads, state, params)
            bases, after = parts(params, state)
            batches = {name: basis.age.shape for name, basis in bases.items()}
            record = (
                {name: bits(before[name], batch) for name, batch in batches.items()},
                {name: bits(after[name], batch) for name, batch in batches.items()},
                {name: bits(b.vectors.values(), b.age.shape) for name, b in bases.items()},
                jax.tree.map(orthonormality_error, bases, is_leaf=lambda b: hasattr(b, "vectors")),
                {name: basis.age for name, basis in bases.items()},
                {name: basis.skipped for name, basis in bases.items()},
            )
            return (params, state), record

        gaps = {name: basis.gap for name, basis in parts(params, state)[0].items()}
        ends, records = jax.lax.scan(step, (params, state), (jnp.arange(STEPS), faults))
        return Run(*ends, *records, gaps)

    clean = jax.tree.map(np.zeros_like, faults)
    return tuple(jax.tree.map(np.asarray, run(given)) for given in (clean, faults))


def bad_steps(faults, name):
    kinds, _ = faults[name]
    return (kinds != CLEAN) & (kinds != ZEROS)


def test_what_has_no_fault_goes_as_in_a_clean_run_bit_for_bit(runs):
    clean, faulty = runs
    np.testing.assert_array_equal(clean.params["bias"]["bias"], faulty.params["bias"]["bias"])
    for name, touched in FAULTY.items():
        for field in ("after", "bases", "ages", "skips"):
            one, other = (getattr(run, field)[name][:, ~touched] for run in runs)
            np.testing.assert_array_equal(one, other)
        one, other = (run.params[name]["kernel"][~touched] for run in runs)
        np.testing.assert_array_equal(one, other)


def test_a_bad_step_changes_nothing_of_its_matrix_and_is_counted(runs, faults):
    _, faulty = runs
    for name in FAULTY:
        bad = bad_steps(faults, name)
        np.testing.assert_array_equal(faulty.before[name] == faulty.after[name], bad)
        np.testing.assert_array_equal(faulty.skips[name], np.cumsum(bad, axis=0))


def test_a_refresh_that_was_not_possible_takes_place_at_the_next_good_gradient(runs, faults):
    _, faulty = runs
    for name in FAULTY:
        bad = bad_steps(faults, name)
        gap, age = faulty.gaps[name], np.full(bad.shape[1:], AGE_UNINITIALIZED)
        expected = np.zeros_like(bad)
        for step in range(STEPS):
            good = ~bad[step] & (faults[name][0][step] != ZEROS)
            expected[step] = good & (age >= gap)
            gap = np.where(expected[step] & (age < AGE_UNINITIALIZED), GAP, gap)
            age = np.where(expected[step], 0, age) + ~bad[step]
            np.testing.assert_array_equal(faulty.ages[name][step], age)
        renewed = faulty.bases[name][1:] != faulty.bases[name][:-1]
        np.testing.assert_array_equal(renewed, expected[1:])


def test_bases_stay_orthonormal_and_everything_finite(runs):
    for run in runs:
        assert max(errors.max() for errors in run.errors.values()) <= 1e-5
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((run.params, run.state)))


def updates_behind(clip, grads):
    tx = chain(clip, galore(RANK, refresh="random"), optax.sgd(1.0))
    params = jax.tree.map(jnp.zeros_like, grads)
    return jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)


def without(grads, value):
    """The gradients with a matrix of the stack replaced by one value."""
    return grads | {"stack": {"kernel": grads["stack"]["kernel"].at[1].set(value)}}


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_behind_a_clip_by_finite_norm_the_others_go_as_if_a_bad_matrix_were_zero(value):
    grads = random_params(jax.random.key(0))
    absent, _ = updates_behind(clip_by_finite_norm(1.0), without(grads, 0))
    bad, state = updates_behind(clip_by_finite_norm(1.0), without(grads, value))
    assert state.inner_states[1].bases["stack"]["kernel"].skipped.tolist() == [0, 1, 0, 0]
    assert not bad["stack"]["kernel"][1].any()
    for one, other in zip(jax.tree.leaves(absent), jax.tree.leaves(bad), strict=True):
        np.testing.assert_array_equal(one, other)
