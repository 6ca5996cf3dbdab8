"""Products in types of other precision than the parameters, on plain JAX."""

import jax
import jax.numpy as jnp

from losses.table import Table, inputs, kernel, mlp, network, squared, stack

CASES = Table()
loss = CASES.loss


def cast(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), tree)


# Numbers of the network in another type.

half = {"projected": "w1 w2", "tolerance": 2e-2}


@loss(**half)
def everything_in_bfloat16(params, x):
    return squared(network(*cast((params, x), jnp.bfloat16)))


@loss(**half)
def everything_in_float16(params, x):
    return squared(network(*cast((params, x), jnp.float16)))


@loss(**half)
def a_loss_in_bfloat16(params, x):
    return jnp.mean(network(*cast((params, x), jnp.bfloat16)) ** 2)


@loss(**half, params=lambda: cast(mlp(), jnp.bfloat16))
def parameters_that_are_kept_in_bfloat16(params, x):
    return squared(network(params, x.astype(jnp.bfloat16)))


@loss(**half)
def a_cast_to_bfloat16_and_back(params, x):
    return squared(network(cast(cast(params, jnp.bfloat16), jnp.float32), x))


@loss(projected="w1 w2")
def products_of_the_highest_precision(params, x):
    with jax.default_matmul_precision("highest"):
        return squared(network(params, x))


# One kernel of 6 × 8, and activations of many types.

product = CASES.rows(
    lambda f: lambda params, x: squared(f(params["w"], x)),
    params=kernel("w", 6, 8),
    projected="w",
)


def given_as(change):
    return {"batch": lambda: (change(inputs(5, 6)),)}


def product_in(dtype):
    return lambda w, x: jnp.matmul(
        x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
    )


def without_a_cast(w, x):
    dense = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dense, preferred_element_type=jnp.float32)


small = jnp.float8_e4m3fn
plain = lambda w, x: x @ w
# The gradient in full is the less exact one: its cotangent is rounded to float8.
rounded = lambda w, x: x @ w.astype(small).astype(jnp.float32)
product("a kernel rounded to float8", rounded, tolerance=0.1)
product("a product in float8 with a result in float32", product_in(small), tolerance=0.1)
in_bfloat16 = product_in(jnp.bfloat16)
product("a product in bfloat16 with a result in float32", in_bfloat16, tolerance=2e-2)
product("activations of complex numbers", lambda w, x: jnp.abs(jnp.fft.fft(x) @ w))
product("integer activations", plain, **given_as(lambda x: (3 * x).astype(jnp.int32)))
product("boolean activations", plain, **given_as(lambda x: x > 0))
of_half = given_as(lambda x: x.astype(jnp.bfloat16))
product("activations in bfloat16 with a kernel in float32", plain, **of_half)
product("one hot activations", lambda w, x: jax.nn.one_hot(x, 6) @ w, [0, 3, 3, 5])
rounded_to_int8 = given_as(lambda x: jnp.round(5 * x).astype(jnp.int8))
product("a product of integers with a kernel without a cast", without_a_cast, **rounded_to_int8)


# Bases in another type.


@loss(projected="w1 w2", basis_dtype=jnp.bfloat16)
def bases_that_are_kept_in_bfloat16(params, x):
    return squared(network(params, x))


@loss(partly="ws", params=stack(2, 3), basis_dtype=jnp.int8)
def stacked_bases_that_are_kept_in_int8(params, x):
    reordered = params["ws"].swapaxes(0, 1)[::-1].reshape(6, 6, 6)
    y, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, reordered)
    return squared(y) + squared(params["ws"])
