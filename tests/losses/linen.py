"""Losses of Flax Linen modules, with the layers as Flax has them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from losses.table import Table, filled, inputs, squared, sum_of_squares

CASES = Table()
model = CASES.model


def example(module, *batch, reads="params", loss=None, **settings):
    """Of a module that is applied to the batch; collections but the parameters are constants."""
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), *batch))
    rest = {name: value for name, value in variables.items() if name != "params"}
    apply = lambda params, *batch: module.apply({"params": params} | rest, *batch)
    loss = loss or (lambda apply, params, *batch: squared(apply(params, *batch)))
    return functools.partial(loss, apply), variables["params"], batch, settings


class Compact(nn.Module):
    """A module whose `__call__` is a function, which makes the layers of it."""

    function: Callable

    @nn.compact
    def __call__(self, *inputs):
        return self.function(*inputs)


class MLP(nn.Module):
    dense: type = nn.Dense
    settings: tuple = ()

    @nn.compact
    def __call__(self, x):
        settings = dict(self.settings)
        x = nn.gelu(self.dense(8, name="first", **settings)(x))
        return self.dense(6, name="second", **settings)(x)


@model(projected="first/kernel second/kernel")
def dense_layers():
    return example(MLP(), inputs(5, 6))


@model(projected="first/kernel second/kernel")
def dense_layers_in_bfloat16():
    return example(MLP(settings=(("dtype", jnp.bfloat16),)), inputs(5, 6), tolerance=2e-2)


@model(projected="first/kernel second/kernel")
def dense_layers_in_float16():
    return example(MLP(settings=(("dtype", jnp.float16),)), inputs(5, 6), tolerance=2e-2)


@model(projected="first/kernel second/kernel")
def a_gradient_penalty_by_the_inputs():
    def loss(apply, params, x):
        slopes = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(apply(params, x)))))(x)
        return squared(apply(params, x)) + jnp.mean(slopes**2)

    return example(MLP(), inputs(5, 6), loss=loss)


@model(partly="first/kernel second/kernel")
def a_penalty_on_all_weights():
    loss = lambda apply, params, x: squared(apply(params, x)) + sum_of_squares(params)
    return example(MLP(), inputs(5, 6), loss=loss)


@model(full="first/kernel", projected="second/kernel")
def parameters_scaled_by_their_path():
    def loss(apply, params, x):
        double = lambda path, a: 2 * a if "first" in jax.tree_util.keystr(path) else a
        return squared(apply(jax.tree_util.tree_map_with_path(double, params), x))

    return example(MLP(), inputs(5, 6), loss=loss)


@model(partly="first/kernel second/kernel")
def an_inner_step_of_all_parameters():
    def loss(apply, params, x):
        inner = jax.grad(lambda params: squared(apply(params, x) - 1))(params)
        return squared(apply(jax.tree.map(lambda a, g: a - 0.3 * g, params, inner), x))

    return example(MLP(), inputs(5, 6), loss=loss)


def normalised(wrapper, **arguments):
    """`wrapper` around a dense layer, between two dense layers."""

    def forward(x):
        x = nn.tanh(nn.Dense(6, name="first")(x))
        return nn.Dense(6, name="last")(wrapper(nn.Dense(8, name="inner"))(x, **arguments))

    return example(Compact(forward), inputs(5, 6))


@model(projected="first/kernel last/kernel", full="inner/kernel")
def weight_normalisation():
    return normalised(nn.WeightNorm)


@model(projected="first/kernel last/kernel", partly="inner/kernel")
def spectral_normalisation():
    return normalised(nn.SpectralNorm, update_stats=False)


def mapped(change):
    """A dense layer that reads its parameters through a function."""
    each = lambda tree: jax.tree.map(change, tree)
    dense = nn.map_variables(nn.Dense, "params", each, init=True)
    return example(Compact(lambda x: dense(6, name="mapped")(x)), inputs(5, 6))


@model(full="mapped/kernel")
def variables_mapped_by_a_scaling():
    return mapped(lambda a: 2 * a)


@model(projected="mapped/kernel")
def variables_mapped_by_a_transposition():
    return mapped(lambda a: a.T)


@model(projected="dense/kernel")
def a_module_that_reads_the_kernel_of_its_child_to_tie_it():
    def forward(x):
        dense = nn.Dense(8, name="dense")
        h = nn.tanh(dense(x))
        return h @ dense.variables["params"]["kernel"].T

    return example(Compact(forward), inputs(5, 6))


@model(partly="dense/kernel")
def a_module_that_reads_the_kernel_of_its_child_for_a_penalty():
    def forward(x):
        dense = nn.Dense(8, name="dense")
        return dense(x) + jnp.sum(dense.variables["params"]["kernel"] ** 2)

    return example(Compact(forward), inputs(5, 6))


@model(projected="mlp/first/kernel mlp/second/kernel")
def a_derivative_in_forward_mode_by_nn_jvp():
    def forward(x):
        module = MLP(name="mlp")
        module(x)
        y, slope = nn.jvp(lambda m, x: m(x), module, (x,), (jnp.cos(x),), variable_tangents={})
        return y + slope

    return example(Compact(forward), inputs(5, 6))


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = nn.Dense(6, name="first"), nn.Dense(6, name="second")
        if self.is_initializing():
            first(x), second(x)
        return nn.cond(x.sum() > -1e3, lambda _, x: first(x), lambda _, x: second(x), self, x)


@model(projected="first/kernel second/kernel")
def a_cond_between_two_modules():
    return example(Branches(), inputs(5, 6), zero=("second/kernel", "second/bias"))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")(x)
        return x + nn.Dense(6, name="dense")(nn.LayerNorm(name="norm")(y)), None


ATTENTION = [f"attention/{name}" for name in ("query", "key", "value", "out")]
LAYER = " ".join(f"layers/{name}/kernel" for name in (*ATTENTION, "dense"))


@model(projected=LAYER)
def attention_and_a_layer_norm():
    first = Compact(lambda x: Layer(name="layers")(x)[0])
    return example(first, inputs(2, 3, 6), zero=("layers/attention/key/bias",))


@model(projected=LAYER)
def scanned_layers_under_remat():
    stack = nn.scan(nn.remat(Layer), {"params": 0}, split_rngs={"params": True}, length=2)
    encoder = Compact(lambda x: stack(name="layers")(x, None)[0])
    return example(encoder, inputs(2, 3, 6), zero=("layers/attention/key/bias",))


class Carry(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="dense")(x)), None


@model(projected="layers/dense/kernel")
def scanned_layers_with_parameters_on_axis_1():
    stack = nn.scan(Carry, {"params": 1}, split_rngs={"params": True}, length=3)
    module = Compact(lambda x: stack(name="layers")(x, None)[0])
    numbers = {"layers": {"dense": {"kernel": GaLoreDimensionNumbers(0, 2), "bias": None}}}
    return example(module, inputs(5, 6), weight_dimension_numbers=numbers)


@model(projected="layers/dense/kernel")
def scanned_layers_that_share_their_parameters():
    never = {"params": False}
    stack = nn.scan(Carry, variable_broadcast="params", split_rngs=never, length=3)
    return example(Compact(lambda x: stack(name="layers")(x, None)[0]), inputs(5, 6))


def experts(x, **settings):
    settings |= {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    dense = nn.vmap(nn.Dense, **settings)
    return example(Compact(lambda x: dense(8, name="experts")(x)), x)


@model(projected="experts/kernel")
def experts_by_nn_vmap_that_share_activations():
    return experts(inputs(5, 6), in_axes=None, axis_size=3)


@model(projected="experts/kernel")
def experts_by_nn_vmap_with_activations_of_their_own():
    return experts(inputs(3, 5, 6))


def partitioned(wrap):
    names = ("in", "out")
    return (
        ("kernel_init", wrap(nn.initializers.normal(0.5), names)),
        ("bias_init", wrap(nn.initializers.normal(0.5), names[1:])),
    )


@model(projected="first/kernel second/kernel")
def parameters_boxed_by_with_partitioning():
    return example(MLP(settings=partitioned(nn.with_partitioning)), inputs(5, 6))


@model(projected="first/kernel second/kernel")
def parameters_boxed_by_with_logical_partitioning():
    return example(MLP(settings=partitioned(nn.with_logical_partitioning)), inputs(5, 6))


@model(projected="general/kernel")
def a_dense_general_with_a_batch_axis():
    settings = {"axis": (-2, -1), "batch_dims": (0,), "name": "general"}
    general = Compact(lambda x: nn.DenseGeneral((2, 4), **settings)(x))
    numbers = {"general": {"kernel": GaLoreDimensionNumbers((1, 2), (3, 4)), "bias": None}}
    return example(general, inputs(2, 5, 2, 3), weight_dimension_numbers=numbers)


@model(full="conv/kernel", projected="dense/kernel")
def a_convolution_and_a_dense_layer():
    forward = lambda x: nn.Dense(6, name="dense")(nn.tanh(nn.Conv(8, (3,), name="conv")(x)))
    return example(Compact(forward), inputs(2, 7, 6))


@model(projected="first/kernel second/kernel")
def a_batch_norm_in_training_with_its_statistics_as_an_auxiliary_value():
    def forward(x):
        x = nn.Dense(8, use_bias=False, name="first")(x)
        x = nn.BatchNorm(use_running_average=False, name="norm")(x)
        return nn.Dense(6, name="second")(nn.tanh(x))

    module, x = Compact(forward), inputs(5, 6)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x))

    def loss(params, x, statistics):
        variables = {"params": params, "batch_stats": statistics}
        y, updated = module.apply(variables, x, mutable="batch_stats")
        return squared(y), updated

    return loss, variables["params"], (x, variables["batch_stats"]), {"has_aux": True}


@model(projected="first/kernel second/kernel")
def dropout_with_a_key_in_the_batch():
    def forward(x):
        x = nn.Dropout(0.2, deterministic=False)(nn.Dense(8, name="first")(x))
        return nn.Dense(6, name="second")(x)

    module, x = Compact(forward), inputs(5, 6)
    params = filled(jax.eval_shape(MLP().init, jax.random.key(0), x))["params"]
    loss = lambda params, x, key: squared(
        module.apply({"params": params}, x, rngs={"dropout": key})
    )
    return loss, params, (x, jax.random.key(1)), {}


def recurrent(cell):
    forward = lambda xs: nn.RNN(cell(6, name="cell"), name="rnn")(xs)
    return example(Compact(forward), inputs(2, 4, 6))


@model(projected=" ".join(f"cell/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"))
def an_lstm():
    return recurrent(nn.LSTMCell)


@model(full=" ".join(f"cell/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"))
def an_lstm_that_concatenates_its_kernels():
    return recurrent(nn.OptimizedLSTMCell)


@model(projected=" ".join(f"cell/{side}{gate}/kernel" for side in "ih" for gate in "rzn"))
def a_gated_recurrent_unit():
    return recurrent(nn.GRUCell)


@model(projected="cell/i/kernel cell/h/kernel")
def a_simple_recurrent_cell():
    return recurrent(nn.SimpleCell)
