"""Gradients that are born projected, against full ones that are projected afterwards."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import GaLoreDimensionNumbers

import galore_jax
from galore_jax import (
    Rule,
    apply_gradients,
    chain,
    check_projection,
    dot_general,
    galore,
    refresh,
    refresh_due,
    value_and_grad,
)
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.projection import is_coordinates
from galore_jax.state import galore_states
from galore_jax.training.step import batch_loss

DENSE = (((1,), (0,)), ((), ()))
# Bounds of the largest difference over the largest coordinate.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def started(params, **settings):
    """An optimizer and its state, with random bases."""
    tx = chain(galore(settings.pop("rank", 4), **settings), optax.adam(1e-3))
    return tx, tx.init(params)


def names(params):
    """The paths of all leaves."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }


def compared(loss, params, *batch, **settings):
    """The paths whose gradients are coordinates; all are compared with full gradients."""
    dtype = settings.pop("dtype", "float32")
    options = {key: settings.pop(key) for key in ("has_aux", "micro_batches") if key in settings}
    tx, state = started(params, **settings)
    _, found = jax.jit(value_and_grad(loss, tx, **options))(params, state, *batch)
    full = jax.jit(jax.grad(loss, has_aux=options.get("has_aux", False)))(params, *batch)
    full = full[0] if options.get("has_aux") else full
    [galore_state] = galore_states(state, inside_chains=True)
    born = set()

    def at_leaf(path, found, full, basis):
        wanted = full
        if is_coordinates(found):
            born.add(basis.projection.name)
            wanted, found = basis.projection.project(basis.vectors, full), found.value
            assert found.dtype == jnp.float32
        wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
        largest = np.abs(wanted).max()
        assert largest > 0, path
        assert np.abs(found - wanted).max() <= TOLERANCE[dtype] * largest, path

    jax.tree_util.tree_map_with_path(
        at_leaf, found, full, galore_state.bases, is_leaf=is_coordinates
    )
    return born


def llama(**settings):
    """A LLaMA's configuration, parameters and a packed batch of 4 rows."""
    config = LlamaConfig(97, 32, 56, 3, 2, max_length=20, **settings)
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (4, 20), 0, 97)
    segments = jnp.where(jnp.arange(20) < 7, 1, 2) * jnp.ones_like(tokens)
    positions = jnp.where(jnp.arange(20) < 7, 0, -7) + jnp.arange(20) + jnp.zeros_like(tokens)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    return config, Llama(config).init(key, tokens)["params"], batch


LLAMA_KERNELS = {
    *(f"layers/attention/{name}_proj/kernel" for name in "qkvo"),
    *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_coordinates_of_the_whole_llama_equal_projected_gradients(dtype, remat, proj_type):
    config, params, batch = llama(dtype=dtype, remat=remat)
    loss = functools.partial(batch_loss, config)
    born = compared(loss, params, batch, dtype=dtype, proj_type=proj_type, has_aux=True)
    assert born == LLAMA_KERNELS


def test_micro_batches_give_the_mean():
    config, params, batch = llama()

    def loss(params, batch):
        total, targets = batch_loss(config, params, batch)
        return total / targets  # Every row has as many targets.

    assert compared(loss, params, batch, micro_batches=4) == LLAMA_KERNELS


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.gelu(nn.Dense(24, name="first")(x)))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(16, name="shared")
        return shared(nn.tanh(shared(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attend = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
        x = x + attend(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(40)(nn.LayerNorm()(x)))), None


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense,
            in_axes=None,
            out_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=3,
        )
        return dense(12, name="experts")(x)


class General(nn.Module):
    """Contracts two axes, apart for each element of a batch axis."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((3, 5), axis=(-2, -1), batch_dims=(0,), name="general")(x)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="dense")(nn.Conv(16, (3,), name="conv")(x))


def squared(model, x):
    """A loss whose gradient is dense, and the model's parameters."""
    params = model.init(jax.random.key(0), x)["params"]
    return lambda params, x: jnp.mean(jnp.sin(model.apply({"params": params}, x)) ** 2), params


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize(
    ("model", "shape", "kernels"),
    [
        (MLP(), (5, 16), {"Dense_0/kernel", "first/kernel"}),
        (Twice(), (5, 16), {"shared/kernel"}),
        (Experts(), (5, 16), {"experts/kernel"}),
        (Conv(), (2, 7, 16), {"dense/kernel"}),
        (
            Encoder(),
            (2, 7, 16),
            {
                *(
                    f"layers/MultiHeadDotProductAttention_0/{name}/kernel"
                    for name in ("query", "key", "value", "out")
                ),
                "layers/Dense_0/kernel",
                "layers/Dense_1/kernel",
            },
        ),
    ],
    ids=["mlp", "one-dense-twice", "experts", "convolution", "encoder"],
)
def test_coordinates_in_foreign_models_equal_projected_gradients(model, shape, kernels, proj_type):
    loss, params = squared(model, inputs(*shape))
    born = compared(loss, params, inputs(*shape), proj_type=proj_type)
    assert born == kernels


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_dimension_numbers_say_how_a_kernel_of_many_axes_is_read(proj_type):
    x = inputs(3, 5, 4, 6)
    loss, params = squared(General(), x)
    assert params["general"]["kernel"].shape == (3, 4, 6, 3, 5)
    # In other orders than the layer's own.
    numbers = {"general": {"kernel": GaLoreDimensionNumbers((2, 1), (4, 3)), "bias": None}}
    settings = {"weight_dimension_numbers": numbers, "proj_type": proj_type}
    assert compared(loss, params, x, **settings) == {"general/kernel"}
    # Read in a way that the layer does not multiply by, its gradient is formed whole.
    numbers["general"]["kernel"] = GaLoreDimensionNumbers((1, 3), (2, 4))
    assert compared(loss, params, x, **settings) == set()


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_plain_jax_multiplies_by_dot_general_also_along_the_out_axis(proj_type):
    params = {"in_out": inputs(16, 12), "out_in": inputs(10, 12), "plain": inputs(10, 8)}

    def loss(params, x):
        x = jnp.sin(dot_general(x, params["in_out"], DENSE))
        x = jnp.sin(dot_general(x, params["out_in"], (((1,), (1,)), ((), ()))))
        return jnp.mean((x @ params["plain"]) ** 2)

    born = compared(loss, params, inputs(5, 16), proj_type=proj_type)
    assert born == {"in_out", "out_in", "plain"}
    # Any other operation refuses a projected kernel: nothing of a gradient is lost in silence.
    tx, state = started(params)
    with pytest.raises(TypeError, match="ProjectedKernel"):
        value_and_grad(lambda params, x: jnp.sum(x * params["plain"]), tx)(params, state, 1.0)
    with pytest.raises(AttributeError, match=r"plain stands in the loss as a ProjectedKernel, wh"):
        value_and_grad(lambda params, x: jnp.sum(x @ params["plain"].T), tx)(params, state, 1.0)


def test_an_nnx_layer_of_four_lines_multiplies_by_projected_kernels():
    class Linear(nnx.Linear):
        def __call__(self, x):
            y = dot_general(x, self.kernel.get_value(), DENSE)
            return y + self.bias.get_value()

    graph, variables = nnx.split(Linear(16, 12, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(variables)

    def loss(params, x):
        state = jax.tree.map(nnx.Param, params, is_leaf=lambda n: not isinstance(n, dict))
        return jnp.mean(jnp.sin(nnx.merge(graph, nnx.State(state))(x)) ** 2)

    assert compared(loss, params, inputs(5, 16)) == {"kernel"}


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="second")(nn.tanh(nn.Dense(16, name="first")(x)))


def test_a_kernel_that_is_also_used_elsewhere_gets_its_whole_gradient():
    model = Two()
    params = model.init(jax.random.key(0), inputs(5, 16))["params"]

    def loss(params, x):
        kernel = nn.meta.unbox(params["second"]["kernel"])
        return jnp.mean((model.apply({"params": params}, x) @ kernel.T) ** 2)

    assert compared(loss, params, inputs(5, 16)) == {"first/kernel"}
    with pytest.raises(ValueError, match=r"check_projection: second/kernel is multiplied by"):
        check_projection(loss, params, inputs(5, 16))
    assert list(check_projection(loss, params, inputs(5, 16), rules={"second/*": None})) == [
        "first/kernel"
    ]


def test_a_penalty_on_all_weights_makes_their_gradients_whole():
    loss, params = squared(MLP(), inputs(5, 16))

    def penalised(params, x):
        return loss(params, x) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    assert compared(penalised, params, inputs(5, 16)) == set()


@pytest.mark.parametrize(
    "change", [lambda a: 2 * a, lambda a: a * jnp.float32(0.5), lambda a: a + 1e-3]
)
def test_parameters_that_are_mapped_before_their_use_get_whole_gradients(change):
    loss, params = squared(MLP(), inputs(5, 16))
    mapped = lambda params, x: loss(jax.tree.map(change, params), x)  # noqa: E731
    assert compared(mapped, params, inputs(5, 16)) == set()


class Gated(nn.Module):
    """A layer of somebody's own, in which two kernels go through one `dot_general`."""

    dot_general: Any = jax.lax.dot_general

    @nn.compact
    def __call__(self, x):
        kernel, gate = (
            self.param(name, nn.initializers.normal(1.0), (16, 24)) for name in ("kernel", "gate")
        )
        return self.dot_general(x, kernel, DENSE) * nn.sigmoid(self.dot_general(x, gate, DENSE))


def test_a_layer_of_ones_own_with_a_dot_general_gets_whole_gradients():
    loss, params = squared(Gated(), inputs(5, 16))
    assert compared(loss, params, inputs(5, 16)) == set()


@pytest.mark.parametrize("dtype", ["int32", "bool", "bfloat16"])
def test_activations_of_another_type_than_the_kernel_do_not_round_its_gradient(dtype):
    params = {"w": inputs(16, 12)}
    loss = lambda params, x: jnp.mean(jnp.sin(x @ params["w"]) ** 2)  # noqa: E731
    x = (2 * inputs(5, 16)).astype(dtype)
    assert compared(loss, params, x) == {"w"}


def test_check_projection_measures_how_well_coordinates_agree():
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    errors = check_projection(loss, params, batch, has_aux=True)
    assert set(errors) == LLAMA_KERNELS
    assert max(errors.values()) <= 1e-5


def test_what_is_cast_before_the_model_still_gets_its_coordinates():
    loss, params = squared(MLP(), inputs(5, 16))

    def in_bfloat16(params, x):
        return loss(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), x)

    born = compared(in_bfloat16, params, inputs(5, 16), dtype="bfloat16")
    assert born == {"Dense_0/kernel", "first/kernel"}


def test_a_batch_is_split_and_keywords_are_not():
    loss, params = squared(MLP(), inputs(6, 16))
    tx, state = started(params)
    scaled = lambda params, x, *, scale: scale * loss(params, x)  # noqa: E731
    one, _ = value_and_grad(loss, tx)(params, state, inputs(6, 16))
    mean, _ = value_and_grad(scaled, tx, micro_batches=3)(
        params, state, inputs(6, 16), scale=jnp.float32(2)
    )
    np.testing.assert_allclose(mean, 2 * one, rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(6, 16\), cannot be split into 4"):
        value_and_grad(loss, tx, micro_batches=4)(params, state, inputs(6, 16))


def test_optimizers_that_want_full_gradients_are_refused():
    loss, params = squared(MLP(), inputs(5, 16))
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="need the state of an optimizer with galore"):
        value_and_grad(loss, adam)(params, adam.init(params), inputs(5, 16))
    stock = optax.chain(galore(4), adam)
    with pytest.raises(ValueError, match=r"started with tx.init\(params\)"):
        value_and_grad(loss, stock)(params, stock.init(params), inputs(5, 16))


def test_an_update_with_coordinates_leaves_a_basis_that_is_due_as_it_is_and_due():
    loss, params = squared(MLP(), inputs(5, 16))
    tx, state = started(params, update_proj_gap=2)
    before = galore_states(state, inside_chains=True)[0].bases
    for _ in range(3):
        _, grads = value_and_grad(loss, tx)(params, state, inputs(5, 16))
        params, state = apply_gradients(tx, grads, state, params)
    after = galore_states(state, inside_chains=True)[0]
    assert int(after.count) == 3
    assert bool(refresh_due(state))
    np.testing.assert_array_equal(
        after.bases["first"]["kernel"].vectors["left"], before["first"]["kernel"].vectors["left"]
    )


def dots(text):
    """Of every dot in an HLO text: the sizes of its result, and the product of those it sums over.

    Yields pairs of a sorted tuple of sizes without ones, and a number.
    """
    for computation in text.split("\n}"):
        shapes = {
            name: tuple(map(int, filter(None, sizes.split(","))))
            for name, sizes in re.findall(r"%(\S+) = \w+\[([\d,]*)\]", computation)
        }
        pattern = (
            r"%\S+ = \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*?lhs_contracting_dims=\{([\d,]*)\}"
        )
        for sizes, left, summed in re.findall(pattern, computation):
            result = tuple(sorted(int(n) for n in sizes.split(",") if n and n != "1"))
            yield result, math.prod(shapes[left][int(axis)] for axis in summed.split(","))


def weight_gradients(step, *arguments):
    """The number of products over the 80 tokens of `llama` as large as a projected kernel."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    assert "dot(" in text
    kernels = {(32, 32), (32, 56)}
    return sum(result in kernels and summed == 80 for result, summed in dots(text))


def test_no_product_over_tokens_is_as_large_as_a_projected_kernel():
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    tx = galore_jax.adamw(1e-3, rank=8, rules={"lm_head/*": Rule(rank=8)})
    state = tx.init(params)

    def projected(params, state, batch):
        _, grads = value_and_grad(loss, tx, has_aux=True)(params, state, batch)
        return apply_gradients(tx, grads, state, params)

    def full(params, state, batch):
        grads, _ = jax.grad(loss, has_aux=True)(params, batch)
        return apply_gradients(tx, grads, state, params)

    assert weight_gradients(projected, params, state, batch) == 0
    assert weight_gradients(refresh(loss, tx, has_aux=True), params, state, batch) == 0
    assert weight_gradients(full, params, state, batch) >= 7


def test_a_training_step_holds_no_factorisation():
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    tx = galore_jax.adamw(1e-3, rank=8)
    state = tx.init(params)

    def projected(params, state, batch):
        _, grads = value_and_grad(loss, tx, has_aux=True)(params, state, batch)
        return apply_gradients(tx, grads, state, params)

    def primitives(step):
        return str(jax.make_jaxpr(step)(params, state, batch))

    factorisations = re.compile(r"= (cholesky|svd|eigh|qr|geqrf|triangular_solve|cond)\[")
    assert not factorisations.search(primitives(projected))
    assert factorisations.search(primitives(refresh(loss, tx, has_aux=True)))
