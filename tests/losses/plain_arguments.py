"""What a loss is given and what it returns: auxiliary values, keywords, other types, 64 bits."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np

from losses.table import Table, given, inputs, mlp, network, normal, output, squared, sum_of_squares

CASES = Table()
loss = CASES.loss


of_network = CASES.rows(output, projected="w1 w2")
copied = lambda params, x: network(jax.tree.map(jnp.array, params), x)
of_network("copies of all parameters", copied)
of_network("a loss without a batch", lambda params: network(params, inputs(5, 6)), batch=tuple)
of_network("a mean over micro batches", network, (6, 6), micro_batches=3)
doubled = lambda params, x: network(params | {"w1": 2 * params["w1"]}, x)
halves = {"projected": "w2", "full": "w1", "micro_batches": 2}
of_network("micro batches with a kernel that is transformed", doubled, (6, 6), **halves)

# Parameters of other kinds.
unused = {"params": lambda: mlp() | {"unused": normal(6, 6), "offset": normal(6)}}
zero = {"projected": "w1 w2 unused", "zero": ("unused", "offset")}
of_network("parameters that the loss does not use", network, **unused, **zero)
Weights = namedtuple("Weights", mlp())
of_tuple = lambda params, x: network(params._asdict(), x)
of_network("parameters in a named tuple", of_tuple, params=lambda: Weights(**mlp()))
of_list = lambda params, x: network(params[0], x) @ params[1]["w3"]
in_list = {"params": lambda: [mlp(), {"w3": normal(6, 7)}], "projected": "0/w1 0/w2 1/w3"}
of_network("parameters in a list", of_list, **in_list)

# Numbers of 64 bits.
cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype), tree)
double = {"x64": True, "params": lambda: cast(mlp(), jnp.float64)}
double_inputs = lambda: (inputs(5, 6).astype(jnp.float64),)
of_network("parameters of 64 bits", network, **double, batch=double_inputs)
single = lambda params, x: network(*cast((params, x), jnp.float32))
of_network("parameters of 64 bits in products of 32", single, **double)
plain = "parameters of 32 bits with activations of 64"
of_network(plain, network, x64=True, batch=double_inputs)


def penalised(scale):
    return lambda params, x: squared(network(params, x)) + scale * sum_of_squares(params)


penalty = CASES.rows(penalised, partly="w1 w2")
penalty("micro batches with a penalty", 0.1, (6, 6), micro_batches=2)
penalty("parameters of 64 bits with a penalty", 1.0, **double)


@loss(projected="w1 w2", has_aux=True)
def auxiliary_activations(params, x):
    y = network(params, x)
    return squared(y), {"outputs": y, "rows": jnp.int32(len(x))}


# Auxiliary values of the parameters.
auxiliary = CASES.rows(
    lambda f: lambda params, x: (squared(network(params, x)), f(params)),
    projected="w1 w2",
    has_aux=True,
)
norms = lambda params: jax.tree.map(jnp.linalg.norm, params)
auxiliary("auxiliary norms of all parameters", norms)
auxiliary("auxiliary parameters themselves", lambda params: params)
auxiliary("an auxiliary value that is empty", lambda params: None)
small = lambda params: sum(jnp.sum(jnp.abs(a) < 0.1) for a in jax.tree.leaves(params))
auxiliary("an auxiliary count of small weights", small)


@loss(projected="w1 w2", has_aux=True)
def an_auxiliary_gradient_by_the_inputs(params, x):
    value = lambda x: squared(network(params, x))
    return value(x), jax.grad(value)(x)


@loss(partly="w1 w2", has_aux=True)
def a_penalty_that_is_also_auxiliary(params, x):
    penalty = sum_of_squares(params)
    return squared(network(params, x)) + 0.1 * penalty, penalty


@loss(projected="w1 w2", zero=("w2",))
def a_kernel_whose_product_the_loss_ignores(params, x):
    y = network(params, x)
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return squared(h) + 0 * y.sum()


@loss(projected="w1 w2", params=lambda: mlp() | {"absent": None, "empty": {}})
def parameters_with_empty_places(params, x):
    assert params["absent"] is None
    return squared(network(params, x))


@loss(projected="w1 w2", batch=lambda: ({"x": inputs(5, 6), "y": None, "z": (inputs(5, 6),)},))
def a_batch_that_is_a_tree(params, batch):
    assert batch["y"] is None
    return jnp.mean((network(params, batch["x"]) - batch["z"][0]) ** 2)


@loss(projected="w1 w2", batch=lambda: (np.asarray(inputs(5, 6)),))
def a_batch_of_numpy_arrays(params, x):
    assert isinstance(x, np.ndarray)
    return squared(network(params, x))


@loss(projected="w1 w2", batch=lambda: ("tanh", inputs(5, 6), 2))
def strings_and_numbers_in_the_batch(params, activation, x, times):
    h = x @ params["w1"] + params["b1"]
    for _ in range(times):
        h = getattr(jnp, activation)(h)
    return squared(h @ params["w2"])


@loss(
    projected="w1 w2",
    keywords={"mode": "mean", "times": 2, "activation": jnp.tanh, "scale": 0.5},
)
def strings_numbers_and_functions_by_keyword(params, x, *, mode, times, activation, scale):
    h = x @ params["w1"] + params["b1"]
    for _ in range(times):
        h = activation(h)
    y = scale * (h @ params["w2"])
    return squared(y) if mode == "mean" else jnp.sum(y)


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jax.nn.gelu))
def a_function_in_the_batch(params, x, activation):
    return squared(activation(x @ params["w1"] + params["b1"]) @ params["w2"])


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jax.random.PRNGKey(3)))
def noise_on_activations_with_an_old_key(params, x, key):
    return squared(network(params, x + 0.1 * jax.random.normal(key, x.shape)))


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jax.random.key(3)))
def dropout_of_activations_with_a_key_in_the_batch(params, x, key):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    keep = jax.random.bernoulli(key, 0.8, h.shape)
    return squared(jnp.where(keep, h / 0.8, 0) @ params["w2"])


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jnp.array([0, 2, 1, 5, 3])))
def a_cross_entropy_with_integer_labels(params, x, labels):
    logits = jax.nn.log_softmax(network(params, x))
    return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))


@loss(projected="w1 w2", batch=given(6, 6), micro_batches=3)
def micro_batches_with_a_gradient_penalty(params, x):
    return jnp.mean(jax.grad(lambda x: jnp.sum(jnp.sin(network(params, x))))(x) ** 2)


@loss(projected="w1 w2")
def a_loss_that_looks_at_shapes_and_types_of_parameters(params, x):
    assert all(isinstance(a, jax.Array) and a.dtype == jnp.float32 for a in params.values())
    assert [a.shape for a in jax.tree.leaves(params)] == [(8,), (6, 8), (8, 6)]
    return squared(network(params, x))
