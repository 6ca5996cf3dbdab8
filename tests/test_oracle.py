"""The transform against the oracle of `reference.py`, one step from equal states at a time."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_full
from pairwise import pairwise
from trees import PLAIN, STACKED, max_difference, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore
from galore_jax.subspace.basis import is_basis
from galore_jax.subspace.new_basis import REFRESH
from galore_jax.subspace.projection import MOMENTS, PROJ_TYPES, is_coordinates

GAP, RANK = 5, 4
SETTINGS = {"learning_rate": 0.05, "scale": 0.5, "weight_decay": 0.1}
LEAVES = {"plain": PLAIN, "stacked": STACKED}

# Where the state of each chain has what the oracle knows: the link and its field.
FIELDS = {
    "adamw": {"first": (1, "mu"), "second": (1, "nu")},
    "adafactor": {
        "first": (4, "ema"),
        "second": (1, "nu"),
        "rows": (1, "rows"),
        "columns": (1, "columns"),
    },
    "lion": {"first": (1, "mu")},
    "muon": {"first": (1, "mu"), "second": (1, "nu")},
    "fira": {"first": (0, "mu"), "second": (0, "nu"), "norm": (0, "norm")},
    "apollo": {"first": (0, "mu"), "second": (0, "nu"), "norm": (0, "norm")},
    "apollo-mini": {"first": (0, "mu"), "second": (0, "nu"), "norm": (0, "norm")},
}

# Sine of the largest angle between a basis and the oracle's. Singular values fall by 0.6 each, so
# an error of float32 grows by σ₁ / (σ₄ − σ₅) = 12; `orthonormalise` adds 1e-4 of another basis to
# orthogonal columns for "eigh", and twice to others for "subspace_iteration".
ANGLES = {"svd": 1e-5, "eigh": 2e-4, "subspace_iteration": 1e-3}


@dataclass(frozen=True)
class Matrix:
    """A matrix of the tree, or a leaf that is not projected, as the oracle sees it."""

    weight: np.ndarray
    gradient: np.ndarray
    bases: reference.Bases
    due: bool
    moments: reference.Moments


def make(optimizer, **settings):
    """The optimizer with the rank of these tests; APOLLO-Mini is APOLLO of rank 1."""
    name, _, is_mini = optimizer.partition("-")
    return getattr(galore_jax, name)(rank=1 if is_mini else RANK, **settings)


@cache
def falling(size):
    """Singular values that fall by 0.6 each, along directions that mix all axes."""
    across = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    return jnp.asarray(across * 0.6 ** np.arange(size) @ across.T, jnp.float32)


def random_gradients(params, seed):
    """Of the parameters' shapes, alike for all seeds, with well defined subspaces."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [p + jax.random.normal(key, p.shape) / 2 for p, key in zip(leaves, keys, strict=True)]
    return tree.unflatten([leaf @ falling(leaf.shape[-1]) for leaf in noisy])


def links(state):
    """The states of the parts of a chain, ours or optax's."""
    return getattr(state, "inner_states", state)


def matrices(optimizer, params, gradients, state):
    """All that the trees hold, leaf by leaf and in each layer by layer."""
    tree = jax.tree.structure(params)
    parts = [tree.flatten_up_to(part) for part in (params, gradients, links(state)[0].bases)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    found = []
    for leaf, (path, weight, gradient, basis) in enumerate(zip(paths, *parts, strict=True)):
        vectors, due, size = {}, np.zeros(len(weight), bool), weight.shape
        if optimizer == "adafactor" and "bias" in path:
            size = size[-1:]  # It clips the bias of each layer.
        if is_basis(basis):
            vectors, due, size = basis.vectors, np.ravel(basis.age >= basis.gap), size[-2:]
        weights, gradients = (exact(array, size) for array in (weight, gradient))
        stacks = {side: exact(stack, stack.shape[-2:]) for side, stack in vectors.items()}
        for i in range(len(weights)):
            bases = {side: stack[i] for side, stack in stacks.items()}
            shape = reference.project(gradients[i], bases).shape
            like = start(optimizer, shape, projected=bool(bases))
            moments = moments_of(optimizer, tree, state, leaf, i, like, projected=bool(bases))
            found.append(Matrix(weights[i], gradients[i], bases, bool(due[i]), moments))
    return found


def start(optimizer, shape, projected):
    name = optimizer.removesuffix("-mini")
    if name in reference_full.DIRECTIONS:
        return reference_full.start(shape, projected)
    return reference.start(name, shape, projected)


def moments_of(optimizer, tree, state, leaf, i, like, projected):
    """What the state has for the ith matrix of a leaf, in the shapes of `like`."""
    values, counts = {}, set()
    for name, zeros in like.values.items():
        link, field = FIELDS[optimizer][name]
        own = links(state)[link]
        if isinstance(own, optax.transforms.PartitionState):
            label = "coordinates" if projected else "unprojected"
            own = own.inner_states[label].inner_state
        node = getattr(own, field)
        node = node if is_coordinates(node) else tree.flatten_up_to(node)[leaf]
        stack = exact(node.value if is_coordinates(node) else node, zeros.shape)
        values[name] = stack[i]
        if "count" in own._fields:
            counts.add(int(np.broadcast_to(own.count, len(stack))[i]))
    (count,) = counts or {0}
    return reference.Moments(values, count)


def exact(array, shape):
    return np.asarray(array, np.float64).reshape(-1, *shape)


def is_well_conditioned(case):
    """False where float32 cannot agree with float64 to 1e-5, or where the optimizer refuses it.

    Between its own singular vectors on both sides a gradient is diagonal, and of the rounding
    errors beside the diagonal Adam and Lion make signs.
    """
    optimizer, proj_type, moments, refresh, *_ = case
    if "norm" in FIELDS[optimizer]:
        return proj_type != "full" and moments == "keep"
    return proj_type != "full" or refresh not in ("svd", "eigh")


@pytest.mark.parametrize(
    ("optimizer", "proj_type", "moments", "refresh", "leaves"),
    pairwise(*(FIELDS, PROJ_TYPES, MOMENTS, REFRESH, LEAVES), where=is_well_conditioned),
)
def test_every_step_over_three_refreshes_agrees_with_the_numpy_reference(
    optimizer, proj_type, moments, refresh, leaves
):
    tx = make(
        optimizer,
        update_proj_gap=GAP,
        proj_type=proj_type,
        moments=moments,
        refresh=refresh,
        **SETTINGS,
    )
    # The embedding stays whole, and is large enough for Adafactor to factor it.
    large = jax.random.normal(jax.random.key(1), (130, 128))
    params = start = random_params(LEAVES[leaves]) | {"embedding": large}
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: apply_gradients(tx, g, s, p))
    for count in range(2 * GAP + 2):
        gradients = random_gradients(start, count)
        before = matrices(optimizer, params, gradients, state)
        params, state = step(params, state, gradients)
        after = matrices(optimizer, params, gradients, state)
        for old, new in zip(before, after, strict=True):
            if old.bases:
                assert old.bases.keys() == reference.sides(old.weight.shape, proj_type)
                assert old.due == (count % GAP == 0)
                check_bases(old, new, refresh, rounds=3 if count == 0 else 1)
            check_step(old, new, optimizer, moments, refresh)


def check_bases(old, new, refresh, rounds):
    for side, basis in new.bases.items():
        if not old.due:
            np.testing.assert_array_equal(basis, old.bases[side])
            continue
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
        if refresh == "random":
            assert reference.largest_angle(old.bases[side], basis) > 0.5
        else:
            ours = reference.refreshed(old.gradient, old.bases[side], side, refresh, rounds)
            assert reference.largest_angle(ours, basis) < ANGLES[refresh]


def check_step(old, new, optimizer, rule, method):
    moments = old.moments
    if old.due:
        moments = reference.after_refresh(moments, rule, old.bases, new.bases)
    arguments = old.weight, old.gradient, moments, new.bases
    name = optimizer.removesuffix("-mini")
    if name in reference_full.DIRECTIONS:
        weight, moments = reference_full.step(name, *arguments, method=method, **SETTINGS)
    else:
        weight, moments = reference.step(name, *arguments, **SETTINGS)
    np.testing.assert_allclose(new.weight, weight, atol=1e-5)
    assert new.moments.count == moments.count
    for name, value in moments.values.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(new.moments.values[name], value, rtol=1e-5, atol=1e-5 * scale)


def test_reverse_std_is_the_galore_of_optax_on_matrices_that_are_not_square():
    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.5}
    start = random_params({"wide": (12, 20), "tall": (20, 12), "bias": (12,)})
    runs = [
        galore_jax.adamw(0.05, eps=1e-8, proj_type="reverse_std", refresh="svd", **settings),
        optax.contrib.galore(0.05, **settings),
    ]
    params, states = [start, start], [tx.init(start) for tx in runs]
    steps = [jax.jit(tx.update) for tx in runs]
    for count in range(2 * GAP + 2):
        gradients = random_gradients(start, count)
        for i, step in enumerate(steps):
            updates, states[i] = step(gradients, states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
        assert max_difference(*params) <= 1e-5


def orthonormal(rows, columns, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_rotated_first_moments_are_those_of_the_full_space_while_the_subspace_stays(proj_type):
    tx = chain(
        galore(RANK, 1, proj_type=proj_type, refresh="svd", moments="rotate"),
        optax.ema(0.9, debias=False),
    )
    sides = reference.sides((12, 20), proj_type)
    spans = {side: orthonormal(12 if side == "left" else 20, RANK) for side in sides}
    params = {"kernel": jnp.zeros((12, 20))}
    state, average = tx.init(params), 0
    update = jax.jit(tx.update)
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(12, 20))
        gradient = reference.lift(reference.project(noise, spans), spans)
        old = state.inner_states[0].bases["kernel"].vectors
        _, state = update({"kernel": jnp.asarray(gradient, jnp.float32)}, state)
        bases = state.inner_states[0].bases["kernel"].vectors
        assert all(float(jnp.abs(bases[side] - old[side]).max()) > 0.1 for side in bases)
        average = 0.9 * average + 0.1 * gradient
        lifted = reference.lift(state.inner_states[1].ema["kernel"].value, bases)
        np.testing.assert_allclose(lifted, average, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_a_refresh_that_finds_the_same_basis_leaves_rotated_moments(optimizer):
    params = random_params(STACKED)
    gradients = random_gradients(params, 0)
    states = []
    for moments in ("keep", "rotate"):
        tx = make(optimizer, learning_rate=0.1, update_proj_gap=1, refresh="svd", moments=moments)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(4):
            _, state = update(gradients, state, params)
        states.append(state.inner_states[1:])
    assert max_difference(*states) <= 1e-5
