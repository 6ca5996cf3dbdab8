"""Losses of Flax NNX modules, with the layers as Flax has them."""

import jax
import jax.numpy as jnp
from flax import nnx

from losses.table import Table, filled, inputs, squared, sum_of_squares

CASES = Table()
model = CASES.model


def example(make, *batch, loss=None, **settings):
    """Of the parameters of a module as a state, that is merged with the module in the loss."""
    graph, variables = nnx.split(nnx.eval_shape(make))
    own = loss or (lambda module, *batch: squared(module(*batch)))
    return (
        lambda params, *batch: own(nnx.merge(graph, params), *batch),
        filled(variables),
        batch,
        settings,
    )


class MLP(nnx.Module):
    def __init__(self, **settings):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(6, 8, rngs=rngs, **settings)
        self.second = nnx.Linear(8, 6, rngs=rngs, **settings)

    def __call__(self, x):
        return self.second(nnx.gelu(self.first(x)))


@model(projected="first/kernel second/kernel")
def linear_layers():
    return example(MLP, inputs(5, 6))


@model(projected="first/kernel second/kernel")
def linear_layers_in_bfloat16():
    return example(lambda: MLP(dtype=jnp.bfloat16), inputs(5, 6), tolerance=2e-2)


@model(projected="first/kernel second/kernel")
def parameters_as_a_dictionary():
    graph, variables = nnx.split(nnx.eval_shape(MLP))
    params = filled(nnx.to_pure_dict(variables))

    def loss(params, x):
        state = jax.tree.map(lambda a: a, variables)
        nnx.replace_by_pure_dict(state, params)
        return squared(nnx.merge(graph, state)(x))

    return loss, params, (inputs(5, 6),), {}


@model(projected="first/kernel second/kernel")
def a_gradient_penalty_by_the_inputs():
    def loss(module, x):
        slopes = jax.grad(lambda x: jnp.sum(jnp.sin(module(x))))(x)
        return squared(module(x)) + jnp.mean(slopes**2)

    return example(MLP, inputs(5, 6), loss=loss)


@model(partly="first/kernel", projected="second/kernel")
def a_penalty_on_the_kernel_of_a_layer():
    loss = lambda module, x: squared(module(x)) + jnp.sum(module.first.kernel[...] ** 2)
    return example(MLP, inputs(5, 6), loss=loss)


@model(partly="first/kernel second/kernel")
def a_penalty_on_all_parameters():
    loss = lambda module, x: squared(module(x)) + sum_of_squares(nnx.state(module, nnx.Param))
    return example(MLP, inputs(5, 6), loss=loss)


@model(full="first/kernel", projected="second/kernel")
def a_kernel_that_is_replaced_by_its_double():
    def loss(module, x):
        module.first.kernel[...] = 2 * module.first.kernel[...]
        return squared(module(x))

    return example(MLP, inputs(5, 6), loss=loss)


class Attention(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(self.norm(x))


@model(projected=" ".join(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")))
def attention_and_a_layer_norm():
    return example(Attention, inputs(2, 3, 6), zero=("attention/key/bias",))


class Stack(nnx.Module):
    def __init__(self):
        make = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        layer = lambda x, layer: nnx.tanh(layer(x))
        scanned = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scanned(x, self.layers)


@model(projected="layers/kernel")
def scanned_layers():
    return example(Stack, inputs(5, 6))


@model(projected="first/kernel second/kernel")
def remat_by_nnx():
    return example(MLP, inputs(5, 6), loss=lambda m, x: squared(nnx.remat(MLP.__call__)(m, x)))


@model(projected="first/kernel second/kernel")
def a_jit_by_nnx():
    return example(MLP, inputs(5, 6), loss=lambda m, x: squared(nnx.jit(MLP.__call__)(m, x)))


@model(full="conv/kernel", projected="linear/kernel")
def a_convolution_and_a_linear_layer():
    class Conv(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(6, 8, (3,), rngs=rngs)
            self.linear = nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            return self.linear(nnx.tanh(self.conv(x)))

    return example(Conv, inputs(2, 7, 6))


@model(projected="first/kernel second/kernel")
def a_batch_norm_in_training_with_its_state_as_an_auxiliary_value():
    class Net(MLP):
        def __init__(self):
            super().__init__()
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(nnx.tanh(self.norm(self.first(x))))

    graph, params, rest = nnx.split(nnx.eval_shape(Net), nnx.Param, ...)

    def loss(params, x, rest):
        module = nnx.merge(graph, params, rest, copy=True)
        return squared(module(x)), nnx.state(module, nnx.BatchStat)

    settings = {"has_aux": True, "zero": ("first/bias",)}
    return loss, filled(params), (inputs(5, 6), filled(rest)), settings
