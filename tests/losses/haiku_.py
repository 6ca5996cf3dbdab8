"""Losses of Haiku functions, with the layers as Haiku has them."""

import jax
import jax.numpy as jnp
import pytest

from losses.table import Table, filled, inputs, squared

hk = pytest.importorskip("haiku")

CASES = Table()
model = CASES.model


def example(forward, *batch, loss=None, **settings):
    transformed = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(transformed.init, jax.random.key(0), *batch))
    own = loss or (lambda apply, params, *batch: squared(apply(params, *batch)))
    return lambda params, *batch: own(transformed.apply, params, *batch), params, batch, settings


def mlp(x):
    return hk.nets.MLP([8, 6], activation=jnp.tanh, name="mlp")(x)


MLP = "mlp/~/linear_0/w mlp/~/linear_1/w"


@model(projected=MLP)
def a_multilayer_perceptron():
    return example(mlp, inputs(5, 6))


@model(projected=MLP)
def a_gradient_penalty_by_the_inputs():
    def loss(apply, params, x):
        slopes = jax.grad(lambda x: jnp.sum(jnp.sin(apply(params, x))))(x)
        return squared(apply(params, x)) + jnp.mean(slopes**2)

    return example(mlp, inputs(5, 6), loss=loss)


@model(partly=MLP)
def a_penalty_on_the_weights_by_their_names():
    def loss(apply, params, x):
        weights = [leaf for tree in params.values() for name, leaf in tree.items() if name == "w"]
        return squared(apply(params, x)) + sum(jnp.sum(w**2) for w in weights)

    return example(mlp, inputs(5, 6), loss=loss)


@model(full="mlp/~/linear_0/w", projected="mlp/~/linear_1/w")
def parameters_mapped_by_their_module():
    def loss(apply, params, x):
        double = lambda module, _, a: 2 * a if module.endswith("0") else a
        return squared(apply(hk.data_structures.map(double, params), x))

    return example(mlp, inputs(5, 6), loss=loss)


@model(projected=" ".join(f"attention/{name}/w" for name in ("query", "key", "value", "linear")))
def attention():
    def forward(x):
        initial = hk.initializers.VarianceScaling(1.0)
        attend = hk.MultiHeadAttention(2, 3, w_init=initial, model_size=6, name="attention")
        return attend(x, x, x)

    return example(forward, inputs(2, 4, 6), zero=("attention/key/b",))


@model(projected="lstm/linear/w")
def an_lstm_unrolled_by_a_scan():
    def forward(xs):
        core = hk.LSTM(6, name="lstm")
        return hk.dynamic_unroll(core, xs, core.initial_state(2))[0]

    return example(forward, inputs(4, 2, 6))


@model(projected="gru/w_i gru/w_h")
def a_gated_recurrent_unit_that_splits_its_kernel():
    def forward(xs):
        core = hk.GRU(6, name="gru")
        return hk.dynamic_unroll(core, xs, core.initial_state(2))[0]

    return example(forward, inputs(4, 2, 6))


@model(projected="layers/linear/w")
def layers_by_layer_stack():
    def forward(x):
        layer = lambda x: jnp.tanh(hk.Linear(6, name="linear")(x))
        return hk.experimental.layer_stack(3, name="layers")(layer)(x)

    return example(forward, inputs(5, 6))


@model(projected=MLP)
def remat_by_haiku():
    return example(lambda x: hk.remat(mlp)(x), inputs(5, 6))


@model(full="conv/w", projected="linear/w")
def a_convolution_and_a_linear_layer():
    def forward(x):
        return hk.Linear(6, name="linear")(jnp.tanh(hk.Conv1D(8, 3, name="conv")(x)))

    return example(forward, inputs(2, 7, 6))
