"""Refreshes by sketch, against the same iteration on full gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from next_tokens import next_tokens
from reference import largest_angle

import galore_jax
from galore_jax import Rule, apply_gradients, chain, galore, refresh, refresh_due, value_and_grad
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.optim.galore_state import bases_of, galore_states, start_coordinates
from galore_jax.optim.moments import rotated
from galore_jax.subspace.new_basis import subspace_iteration
from galore_jax.training.pretraining import batch_loss

CONFIG = LlamaConfig(97, 32, 56, 3, 2, max_length=16)


@functools.cache
def start():
    """Parameters and a batch of 8 rows."""
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 97)
    return Llama(CONFIG).init(jax.random.key(0), tokens)["params"], tokens


def loss(params, tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.arange(tokens.shape[1]) * ones
    batch = {"tokens": tokens, "segments": ones, "positions": positions}
    batch["targets"] = next_tokens(tokens, ones)
    total, targets = batch_loss(CONFIG, params, batch)
    return total / targets


def bases(state):
    """By the path of the parameter."""
    found = bases_of(galore_states(state, inside_chains=True))
    return {basis.projection.name: basis for basis in found}


full_gradients = jax.jit(jax.grad(loss))
iterated = jax.jit(subspace_iteration, static_argnums=(1, 3, 4))


@functools.cache
def compiled_refresh(tx, micro_batches=1):
    return jax.jit(refresh(loss, micro_batches=micro_batches))


def refreshed(tx, params, state, tokens, **settings):
    """The state after a refresh."""
    return compiled_refresh(tx, **settings)(params, state, tokens)


@functools.cache
def compiled_step(tx):
    """An update by projected gradients, which it returns too."""

    @jax.jit
    def step(params, state, tokens):
        _, grads = value_and_grad(loss)(params, state, tokens)
        return *apply_gradients(tx, grads, state, params), grads

    return step


def leaf(tree, name):
    """The leaf at a path."""
    for key in name.split("/"):
        tree = tree[key]
    return tree


def first_vectors(basis):
    """Those of its first side, (layers, in or out, r)."""
    return next(iter(basis.vectors.values()))


@pytest.mark.parametrize(
    ("proj_type", "micro_batches"), [("std", 4), ("reverse_std", 1), ("full", 1)]
)
def test_a_sketch_spans_what_the_iteration_on_the_full_gradient_spans(proj_type, micro_batches):
    params, tokens = start()
    tx = chain(galore(6, 2, proj_type=proj_type), optax.adam(1e-3))
    state = tx.init(params)
    for rounds in (3, 1):  # From random bases, and once they are due again.
        old = bases(state)
        state = refreshed(tx, params, state, tokens, micro_batches=micro_batches)
        gradients = full_gradients(params, tokens)
        for name, basis in bases(state).items():
            assert np.all(np.asarray(basis.age) == 0)
            matrices = basis.projection.view.to_matrices(leaf(gradients, name))
            for side, vectors in basis.vectors.items():
                for layer in range(3):
                    wanted = iterated(
                        matrices[layer], side, old[name].vectors[side][layer], rounds, None
                    )
                    assert largest_angle(wanted, vectors[layer]) <= 1e-3
                    identity = np.eye(6)
                    own = np.asarray(vectors[layer], np.float64)
                    np.testing.assert_allclose(own.T @ own, identity, atol=1e-5)
        for _ in range(2):
            params, state, _ = compiled_step(tx)(params, state, tokens)
        assert bool(refresh_due(state))


@pytest.mark.slow
def test_steps_of_projected_and_of_full_gradients_agree_along_a_run():
    params, tokens = start()
    tx = galore_jax.adamw(1e-2, 6, 8, 1.0, weight_decay=0.1, moments="rotate")
    state = tx.init(params)

    @jax.jit
    def full(params, state, tokens):
        return apply_gradients(tx, jax.grad(loss)(params, tokens), state, params)

    refreshes = 0
    for step in range(20):
        batch = jnp.roll(tokens, step, axis=1)
        if refresh_due(state):
            state = refreshed(tx, params, state, batch)
            refreshes += 1
        other, _ = full(params, state, batch)
        params, state, _ = compiled_step(tx)(params, state, batch)
        for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
    assert refreshes == 3
    assert loss(params, tokens) < loss(start()[0], tokens) - 0.5


def test_a_refresh_rotates_the_moments_and_counts_no_update():
    params, tokens = start()
    tx = galore_jax.adamw(1e-2, 6, 2, moments="rotate")
    state = refreshed(tx, params, tx.init(params), tokens)
    for _ in range(2):
        params, state, _ = compiled_step(tx)(params, state, tokens)
    after = refreshed(tx, params, state, jnp.roll(tokens, 1, axis=1))
    for old, new in zip(
        galore_states(state, inside_chains=True),
        galore_states(after, inside_chains=True),
        strict=True,
    ):
        assert old.count == new.count == 2
    name = "layers/mlp/gate_proj/kernel"
    old, new = bases(state)[name], bases(after)[name]
    for kind, moment in (("first", "mu"), ("second", "nu")):
        before = leaf(optax.tree.get(state, moment), name).value
        found = leaf(optax.tree.get(after, moment), name).value
        for layer in range(3):
            turn = {"left": new.vectors["left"][layer].T @ old.vectors["left"][layer]}
            wanted = np.asarray(rotated(before[layer], turn, kind))
            np.testing.assert_allclose(found[layer], wanted, atol=1e-6 * np.abs(wanted).max())
        assert np.abs(np.asarray(found - before)).max() > 1e-3 * np.abs(before).max()


def test_a_sketch_that_is_not_finite_keeps_its_basis_and_is_retried():
    params, tokens = start()
    tx = galore_jax.adamw(1e-2, 6, 5)
    state = refreshed(tx, params, tx.init(params), tokens)
    for _ in range(5):
        state = counted(tx, params, state)
    broken = jax.tree.map(jnp.copy, params)
    broken["layers"]["mlp"]["down_proj"]["kernel"] = (
        params["layers"]["mlp"]["down_proj"]["kernel"].at[2].set(jnp.nan)
    )
    kept = refreshed(tx, broken, state, tokens)
    for name, basis in bases(kept).items():
        old = bases(state)[name]
        np.testing.assert_array_equal(basis.wait, np.ones(3))
        for one, other in zip(
            *map(jax.tree.leaves, (dataclasses.replace(basis, wait=old.wait), old)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    # One more update, and it is due again.
    assert int(updates_until_refresh(kept)) == 1
    kept = counted(tx, params, kept)
    assert bool(refresh_due(kept))
    later = refreshed(tx, params, kept, tokens)
    assert int(updates_until_refresh(later)) == 5


def test_only_what_is_due_is_refreshed():
    params, tokens = start()
    rules = {"*/up_proj/*": Rule(update_proj_gap=2), "*/mlp/*": Rule(update_proj_gap=3)}
    tx = galore_jax.adamw(1e-2, 6, 7, rules=rules)
    state = refreshed(tx, params, tx.init(params), tokens)
    steps = []
    for step in range(8):
        if refresh_due(state):
            before, state = state, refreshed(tx, params, state, tokens)
            changed = 0
            for name, old in bases(before).items():
                due = np.asarray(old.age >= old.gap)
                moved = np.any(first_vectors(old) != first_vectors(bases(state)[name]), (-2, -1))
                np.testing.assert_array_equal(moved, due)
                changed += due.sum()
            steps.append((step, int(changed)))
        state = counted(tx, params, state)
    # Kernels are stacks of three matrices: up_proj, gate_proj and down_proj, and four others.
    assert steps == [(2, 3), (3, 6), (4, 3), (6, 9), (7, 12)]


@functools.cache
def compiled_update(tx):
    def update(params, state):
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads = start_coordinates(zeros, galore_states(state, inside_chains=True))
        return apply_gradients(tx, grads, state, params)[1]

    return jax.jit(update)


def counted(tx, params, state):
    """The state after an update by zeros."""
    return compiled_update(tx)(params, state)


def test_a_lazy_gap_doubles_where_the_subspace_stays():
    params, tokens = start()
    tx = galore_jax.adamw(1e-2, 6, 2, lazy_overlap=0.5)
    state = tx.init(params)
    for _ in range(2):
        state = refreshed(tx, params, state, tokens)
        for _ in range(2):
            state = counted(tx, params, state)
    # The same gradient again: the second refresh finds what the first one had.
    for basis in bases(state).values():
        assert np.all(np.asarray(basis.overlap) > 0.9)
        assert np.all(np.asarray(basis.gap) == 4)
    assert int(updates_until_refresh(state)) == 2


def test_exact_methods_are_refused_by_the_name_of_a_leaf_and_random_ones_work():
    params, tokens = start()
    for method in ("svd", "eigh"):
        tx = chain(galore(6, refresh=method), optax.adam(1e-3))
        sentence = rf'refresh="{method}" of layers/.*/kernel needs its full gradient'
        with pytest.raises(ValueError, match=sentence):
            refresh(loss)(params, tx.init(params), tokens)
    tx = chain(galore(6, refresh="random"), optax.adam(1e-3))
    state = tx.init(params)
    after = refreshed(tx, params, state, tokens)
    assert not refresh_due(after)
    for name, basis in bases(after).items():
        assert largest_angle(first_vectors(basis)[0], first_vectors(bases(state)[name])[0]) > 0.1
