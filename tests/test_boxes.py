"""Parameters in the boxes of Flax, which name the axes of an array, and states made for them."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import max_difference

import galore_jax
from galore_jax import apply_gradients, chain, galore, layerwise
from galore_jax.grads.layerwise import LayeredModel
from galore_jax.subspace.basis import Basis

BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}
TARGET = np.sin(np.arange(16.0, dtype=np.float32))


class Model(nn.Module):
    """An embedding, which stays whole, and two matrices with heads, all in boxes."""

    boxed: str = "partitioned"

    @nn.compact
    def __call__(self, tokens):
        def init(*names):
            return BOXES[self.boxed](nn.initializers.normal(0.3), names)

        x = nn.Embed(8, 32, embedding_init=init(None, "model"), name="embed")(tokens)
        query = nn.DenseGeneral((2, 8), kernel_init=init("data", "model", None), name="query")
        out = nn.DenseGeneral(16, (1, 2), kernel_init=init("model", None, "data"), name="out")
        return out(nn.gelu(query(x)))


TOKENS = np.arange(8)


def loss(params, tokens):
    return jnp.mean((Model().apply({"params": params}, tokens) - TARGET) ** 2)


def is_box(node):
    return isinstance(node, nn.Partitioned)


def params_in(boxed):
    return Model(boxed).init(jax.random.key(0), TOKENS)["params"]


def mask():
    return jax.tree.map(lambda leaf: leaf.ndim > 2, params_in("partitioned"))


OPTIMIZERS = {
    "chain": lambda: chain(optax.trace(0.5), galore(4, 2), optax.adam(1e-2)),
    "literal": lambda: optax.chain(optax.clip(1.0), galore(4, 2), optax.adamw(1e-2)),
    "adamw": lambda: galore_jax.adamw(1e-2, 4, update_proj_gap=2, weight_decay=0.1),
    "fira": lambda: galore_jax.fira(1e-2, 4, update_proj_gap=2, weight_decay=0.1),
    "apollo": lambda: galore_jax.apollo(1e-2, 1, update_proj_gap=2),
    "mask": lambda: galore_jax.adamw(1e-2, 4, weight_decay=0.1, mask=mask()),
    "adafactor": lambda: galore_jax.adafactor(1e-2, 4, update_proj_gap=2, moments="rotate"),
    "partition": lambda: optax.partition(
        {"kernel": optax.chain(galore(4, 2), optax.adam(1e-2)), "rest": optax.sgd(1e-2)},
        lambda params: jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "rest", params),
    ),
    "steps": lambda: optax.MultiSteps(galore_jax.adamw(1e-2, 4, update_proj_gap=2), 2),
    "injected": lambda: optax.inject_hyperparams(galore_jax.adamw, static_args="rank")(1e-2, 4),
    "full-size": lambda: optax.chain(galore(4, 2), optax.adam(1e-2)),
}


def train(name, params, gradients="full", steps=3):
    tx = OPTIMIZERS[name]()
    state = tx.init(params) if name == "full-size" else galore_jax.init(tx, params)

    @jax.jit
    def step(params, state):
        if gradients == "full":
            grads = jax.grad(loss)(params, TOKENS)
        else:
            state = galore_jax.refresh(loss)(params, state, TOKENS)
            _, grads = galore_jax.value_and_grad(loss)(params, state, TOKENS)
        if gradients == "updates" or name == "full-size":
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state
        return apply_gradients(tx, grads, state, params)

    structure = jax.tree.structure(params)
    for _ in range(steps):
        params, state = step(params, state)
        assert jax.tree.structure(params) == structure
    return params, state


@pytest.mark.filterwarnings("ignore:galore was started with tx.init")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_boxes_change_no_number_of_the_training(name):
    for boxed in BOXES if name == "adamw" else ["partitioned"]:
        params = params_in(boxed)
        plain, _ = train(name, nn.meta.unbox(params))
        assert max_difference(nn.meta.unbox(train(name, params)[0]), plain) == 0


@pytest.mark.parametrize("name", ["literal", "adamw"])
def test_projected_gradients_of_boxed_parameters_train_as_those_of_plain_ones(name):
    params = params_in("partitioned")
    for gradients in ("projected", "updates") if name == "adamw" else ("projected",):
        plain, _ = train(name, nn.meta.unbox(params), gradients)
        assert max_difference(nn.meta.unbox(train(name, params, gradients)[0]), plain) == 0


def test_a_state_has_boxes_where_its_arrays_are_shaped_like_the_parameters():
    params = params_in("partitioned")
    state = galore_jax.adamw(1e-2, 4).init(params)
    mu = optax.tree.get(state, "mu")
    assert mu["embed"]["embedding"].names == (None, "model")
    assert isinstance(mu["query"]["kernel"], galore_jax.Coordinates)
    bases = optax.tree.get(state, "bases")
    assert isinstance(bases["query"]["kernel"], Basis)
    assert not any(map(is_box, jax.tree.leaves(bases, is_leaf=is_box)))


@pytest.mark.parametrize("name", ["chain", "literal", "adamw", "partition"])
def test_states_of_boxed_parameters_are_written_read_and_mapped(name):
    params = params_in("partitioned")
    _, state = train(name, params, steps=1)
    tx = OPTIMIZERS[name]()
    for read in (
        pickle.loads(pickle.dumps(state)),
        optax.tree.map_params(tx, lambda leaf: leaf, state),
    ):
        assert jax.tree.structure(read) == jax.tree.structure(state)
        assert max_difference(read, state) == 0
    table = galore_jax.describe(params, tx).table
    assert table == galore_jax.describe(nn.meta.unbox(params), tx).table
    assert "query/kernel" in table


def layered_params():
    keys = jax.random.split(jax.random.key(0), 3)

    def boxed(i, *shape):
        return nn.Partitioned(jax.random.normal(keys[i], shape), (None,) * len(shape))

    layers = {"dense": {"kernel": boxed(1, 3, 16, 24), "bias": boxed(1, 3, 16)}}
    return {
        "table": {"kernel": boxed(0, 8, 16)},
        "layers": layers,
        "last": {"kernel": boxed(2, 16)},
    }


def block(layer, x, _):
    dense = nn.meta.unbox(layer["dense"])
    return x + nn.tanh(x @ dense["kernel"]) @ dense["kernel"].T + dense["bias"]


LAYERED = LayeredModel(
    lambda params, tokens: (nn.meta.unbox(params["table"]["kernel"])[tokens], None),
    block,
    lambda params, x, _: (jnp.mean((x @ nn.meta.unbox(params["last"]["kernel"])) ** 2), None),
)


@pytest.mark.parametrize("projected", [True, False])
def test_boxes_change_no_number_of_a_layerwise_step(projected):
    tx = galore_jax.adamw(1e-2, 4, update_proj_gap=2)
    step = galore_jax.make_step(LAYERED, tx, projected=projected, refreshes=projected)
    runs = []
    for params in (layered_params(), nn.meta.unbox(layered_params())):
        state, structure = layerwise.init(tx, params), jax.tree.structure(params)
        for _ in range(3):
            params, state, *_ = jax.jit(step)(params, state, TOKENS)
        assert jax.tree.structure(params) == structure
        runs.append(nn.meta.unbox(params))
    assert max_difference(*runs) == 0
