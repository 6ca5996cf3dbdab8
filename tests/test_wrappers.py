"""What stands around a chain: the wrappers and tree tools of optax, jax.vmap, NNX, Haliax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import PLAIN, loss, max_difference, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore, init, value_and_grad
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.subspace.basis import Basis


@pytest.mark.parametrize("change", ["tree.map", "filter_jit", "update"])
def test_a_chain_rebuilt_from_its_fields_takes_the_same_step(change):
    target, params = random_params(PLAIN, seed=1), random_params(PLAIN)
    tx = chain(galore(4, 2), optax.adam(0.1))

    def step(tx, params, state):
        return apply_gradients(tx, jax.grad(loss)(params, target), state, params)[0]

    arguments = params, tx.init(params)
    if change == "tree.map":
        found = step(chain(jax.tree.map(lambda field: field, tx)), *arguments)
    elif change == "filter_jit":
        found = pytest.importorskip("equinox").filter_jit(step)(tx, *arguments)
    else:
        # A function around that of the chain, of which nothing else is known.
        found = step(tx._replace(update=lambda *a, **k: tx.update(*a, **k)), *arguments)
    # Adam's first step divides gradients by their size, and rounds.
    assert max_difference(found, step(tx, *arguments)) <= 2e-6


def test_a_partition_may_mix_a_chain_with_a_stock_one():
    target = random_params(PLAIN, seed=1)
    labels = dict.fromkeys(PLAIN, "chain") | {"tall": "stock"}
    inner = galore(4), optax.adam(0.1)
    mixed = optax.partition({"chain": chain(*inner), "stock": optax.chain(*inner)}, labels)
    results = []
    for tx in (mixed, chain(*inner)):
        params = random_params(PLAIN)
        grads = jax.grad(loss)(params, target)
        results.append(apply_gradients(tx, grads, init(tx, params), params)[0])
    assert max_difference(*results) <= 2e-6


SETTINGS = {"seed": 3, "lazy_overlap": 0.9, "scale": 0.5, "moments": "keep"}


@pytest.mark.parametrize(
    ("name", "settings"), [("adamw", SETTINGS), ("adafactor", {}), ("lion", SETTINGS)], ids=str
)
def test_the_numbers_of_a_ready_made_optimizer_can_be_hyperparameters(name, settings):
    make, target = getattr(galore_jax, name), random_params(PLAIN, seed=1)
    settings = {"update_proj_gap": 2, "weight_decay": 0.1} | settings
    injected = optax.inject_hyperparams(make, static_args="rank")
    runs = []
    for tx in (make(0.1, rank=4, **settings), injected(learning_rate=0.1, rank=4, **settings)):
        params, state = random_params(PLAIN), init(tx, random_params(PLAIN))
        step = jax.jit(lambda p, s, tx=tx: apply_gradients(tx, jax.grad(loss)(p, target), s, p))
        for _ in range(3):
            params, state = step(params, state)
        runs.append(params)
    assert {"learning_rate", *settings} - {"moments"} <= set(state.hyperparams)
    assert max_difference(*runs) <= 1e-5


def test_a_rank_that_is_a_hyperparameter_is_refused_with_the_remedy():
    tx = optax.inject_hyperparams(galore_jax.adamw)(learning_rate=0.1, rank=4)
    with pytest.raises(ValueError, match=r'add "rank" to the static_args of optax.inject_hyper'):
        tx.init(random_params(PLAIN))


def test_a_mask_that_became_an_array_is_refused_with_the_remedy():
    params = random_params(PLAIN)
    mask = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def step(static_args):
        make = optax.inject_hyperparams(galore_jax.adamw, static_args=static_args)
        tx = make(0.1, 4, mask=mask, weight_decay=0.1)
        return apply_gradients(tx, params, tx.init(params), params)

    with pytest.raises(ValueError, match='add "mask" to the static_args of'):
        step("rank")
    step(("rank", "mask"))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_a_dtype_of_the_bases_may_be_among_hyperparameters(dtype):
    make = optax.inject_hyperparams(galore_jax.adamw, static_args="rank")
    state = jax.jit(make(0.1, 4, basis_dtype=dtype).init)(random_params(PLAIN))
    (stored, *_) = jax.tree.leaves(bases_of(galore_states(state, inside_chains=True))[0].vectors)
    assert stored.dtype == dtype


def test_an_error_of_galore_inside_of_a_wrapper_is_its_own():
    target, params = random_params(PLAIN, seed=1), random_params(PLAIN)
    make = optax.inject_hyperparams(galore_jax.adamw, static_args="rank")
    state = make(0.1, rank=5).init(params)
    value = lambda params, x: loss(params, target) + jnp.sum(x @ params["wide"]["kernel"])
    grads = value_and_grad(value)(params, state, jnp.ones((1, 12)))[1]
    with pytest.raises(ValueError, match=r"^galore: the state of .* was started with rank = 5"):
        apply_gradients(make(0.1, rank=4), grads, state, params)


def test_a_chain_without_galore_may_come_after_galore():
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(4)}
    gradients = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )

    def stepped(chain, inner):
        parts = {"matrix": inner(optax.scale_by_adam(), optax.scale(-0.1)), "rest": optax.sgd(0.1)}
        tx = chain(galore(4), optax.partition(parts, {"w": "matrix", "b": "rest"}))
        return apply_gradients(tx, gradients, init(tx, params), params)[0]

    expected = stepped(chain, optax.chain)
    for outer, inner in ((chain, chain), (optax.chain, chain)):
        found = stepped(outer, inner)
        jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-6), found, expected)


def test_a_wrapper_may_change_the_tree_of_the_gradients():
    params = {"z": jnp.ones((8, 16)) * (1 + 2j)}
    gradients = {"z": jnp.cos(jnp.arange(128.0)).reshape(8, 16) * (2 - 1j)}
    tx = optax.contrib.split_real_and_imaginary(galore_jax.lion(1e-2, rank=4))
    state = tx.init(params)
    updates, _ = tx.update(gradients, state, params)
    found, _ = apply_gradients(tx, gradients, state, params)
    np.testing.assert_allclose(found["z"], params["z"] + updates["z"], rtol=1e-6)
    with pytest.raises(ValueError, match="z"):
        apply_gradients(tx, {"z": gradients["z"].T}, state, params)


@jax.tree_util.register_pytree_node_class
class NamedArray:
    """As in Haliax, for which the axes' names belong to the very array below them."""

    __module__ = "haliax.core"

    def __init__(self, array, axes):
        self.array, self.axes = array, axes

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(children[0], axes)


def test_named_arrays_of_haliax_hold_parameters_but_no_bases_or_coordinates():
    params = {"kernel": NamedArray(jnp.ones((12, 20)), ("in", "out"))}
    tx = chain(galore(4), optax.adam(0.1))
    state = tx.init(params)
    assert isinstance(state.inner_states[0].bases["kernel"], Basis)
    assert isinstance(optax.tree.get(state, "mu")["kernel"], galore_jax.Coordinates)
    loss = lambda params, x: jnp.sum(jnp.sin(x @ params["kernel"].array))
    x = jax.random.normal(jax.random.key(0), (5, 12))
    _, grads = galore_jax.value_and_grad(loss)(params, state, x)
    new, _ = apply_gradients(tx, grads, state, params)
    plain = jax.tree.map(lambda node: node.array, (params, grads), is_leaf=is_named)
    wanted, _ = apply_gradients(tx, plain[1], tx.init(plain[0]), plain[0])
    assert is_named(new["kernel"])
    np.testing.assert_array_equal(new["kernel"].array, wanted["kernel"])


def is_named(node):
    return isinstance(node, NamedArray)
