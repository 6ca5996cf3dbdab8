"""Losses of Equinox modules, with the layers as Equinox has them."""

import jax
import jax.numpy as jnp
import pytest

from losses.table import Table, filled, inputs, squared, sum_of_squares

eqx = pytest.importorskip("equinox")
nn = eqx.nn

CASES = Table()
model = CASES.model


def example(make, *batch, loss=None, **settings):
    """Of the arrays of a module, that is combined with the rest of it in the loss."""
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, rest = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    own = loss or (lambda module, x: squared(jax.vmap(module)(x)))
    return (
        lambda params, *batch: own(eqx.combine(params, rest), *batch),
        filled(shapes),
        batch,
        settings,
    )


def mlp(key):
    return nn.MLP(6, 6, 8, depth=2, key=key)


MLP = "layers/0/weight layers/1/weight layers/2/weight"


@model(projected="weight")
def a_linear_layer():
    return example(lambda key: nn.Linear(6, 8, key=key), inputs(5, 6))


@model(projected=MLP)
def a_multilayer_perceptron():
    return example(mlp, inputs(5, 6))


@model(projected=MLP)
def a_multilayer_perceptron_under_filter_jit():
    apply = eqx.filter_jit(lambda module, x: jax.vmap(module)(x))
    return example(mlp, inputs(5, 6), loss=lambda module, x: squared(apply(module, x)))


@model(projected=MLP)
def a_multilayer_perceptron_in_bfloat16():
    def loss(module, x):
        cast = lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a
        return squared(jax.vmap(jax.tree.map(cast, module))(cast(x)))

    return example(mlp, inputs(5, 6), loss=loss, tolerance=2e-2)


@model(projected=MLP)
def a_gradient_penalty_by_the_inputs():
    def loss(module, x):
        slopes = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(module(x)))))(x)
        return squared(jax.vmap(module)(x)) + jnp.mean(slopes**2)

    return example(mlp, inputs(5, 6), loss=loss)


@model(projected=MLP)
def the_divergence_of_a_network():
    def loss(module, x):
        return jnp.mean(jax.vmap(lambda x: jnp.trace(jax.jacfwd(module)(x)))(jnp.sin(x)) ** 2)

    return example(
        lambda key: nn.MLP(6, 6, 8, depth=2, activation=jnp.tanh, key=key),
        inputs(5, 6),
        loss=loss,
        zero=("layers/2/bias",),
    )


@model(partly=MLP)
def a_penalty_on_all_arrays():
    def loss(module, x):
        arrays = eqx.filter(module, eqx.is_inexact_array)
        return squared(jax.vmap(module)(x)) + sum_of_squares(arrays)

    return example(mlp, inputs(5, 6), loss=loss)


@model(full="layers/0/weight", projected="layers/1/weight layers/2/weight")
def a_weight_replaced_by_tree_at():
    def loss(module, x):
        module = eqx.tree_at(lambda m: m.layers[0].weight, module, replace_fn=jnp.abs)
        return squared(jax.vmap(module)(x))

    return example(mlp, inputs(5, 6), loss=loss)


@model(projected=" ".join(f"{name}_proj/weight" for name in ("query", "key", "value", "output")))
def attention():
    make = lambda key: nn.MultiheadAttention(2, 6, key=key)
    loss = lambda module, x: squared(jax.vmap(lambda x: module(x, x, x))(x))
    return example(make, inputs(2, 4, 6), loss=loss)


@model(projected="cell/weight_ih cell/weight_hh")
def a_recurrent_cell_in_a_scan():
    class Net(eqx.Module):
        cell: nn.LSTMCell

        def __call__(self, xs):
            step = lambda carry, x: (self.cell(x, carry), None)
            return jax.lax.scan(step, (jnp.zeros(6), jnp.zeros(6)), xs)[0][0]

    return example(lambda key: Net(nn.LSTMCell(6, 6, key=key)), inputs(2, 4, 6))


@model(projected="cell/weight_ih cell/weight_hh")
def a_gated_recurrent_unit_in_a_scan():
    class Net(eqx.Module):
        cell: nn.GRUCell

        def __call__(self, xs):
            return jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(6), xs)[0]

    return example(lambda key: Net(nn.GRUCell(6, 6, key=key)), inputs(2, 4, 6))


@model(projected="layers/weight")
def layers_stacked_by_filter_vmap_and_scanned():
    class Net(eqx.Module):
        layers: nn.Linear

        def __call__(self, x):
            arrays, rest = eqx.partition(self.layers, eqx.is_array)
            step = lambda x, one: (jnp.tanh(eqx.combine(one, rest)(x)), None)
            return jax.lax.scan(step, x, arrays)[0]

    def make(key):
        keys = jax.random.split(key, 3)
        return Net(eqx.filter_vmap(lambda key: nn.Linear(6, 6, key=key))(keys))

    return example(make, inputs(5, 6))


@model(projected="weight")
def a_frozen_bias_by_partition():
    linear = nn.Linear(6, 8, key=jax.random.key(0))
    params, rest = eqx.partition(linear, jax.tree.map(lambda a: a.ndim > 1, linear))
    loss = lambda params, x: squared(jax.vmap(eqx.combine(params, rest))(x))
    return loss, params, (inputs(5, 6),), {}


@model(projected=MLP)
def activations_with_a_check_at_run_time():
    def loss(module, x):
        y = jax.vmap(module)(x)
        return squared(eqx.error_if(y, jnp.isnan(y).any(), "not a number"))

    return example(mlp, inputs(5, 6), loss=loss)


@model(full="conv/weight", projected="linear/weight")
def a_convolution_and_a_linear_layer():
    class Net(eqx.Module):
        conv: nn.Conv1d
        linear: nn.Linear

        def __call__(self, x):
            return self.linear(jnp.tanh(self.conv(x)).mean(axis=1))

    def make(key):
        return Net(nn.Conv1d(6, 8, 5, key=key), nn.Linear(8, 6, key=key))

    return example(make, inputs(2, 6, 7))
