"""Products in types of other precision than the parameters, on plain JAX."""

import jax
import jax.numpy as jnp

from losses.table import Table, inputs, mlp, network, normal, squared, stack

CASES = Table()
loss = CASES.loss


def one():
    return {"w": normal(6, 8)}


@loss(projected="w1 w2", tolerance=2e-2)
def everything_in_bfloat16(params, x):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    return squared(network(half, x.astype(jnp.bfloat16)))


@loss(projected="w1 w2", tolerance=2e-2)
def everything_in_float16(params, x):
    half = jax.tree.map(lambda a: a.astype(jnp.float16), params)
    return squared(network(half, x.astype(jnp.float16)))


@loss(
    projected="w1 w2",
    tolerance=2e-2,
    params=lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16), mlp()),
)
def parameters_that_are_kept_in_bfloat16(params, x):
    return squared(network(params, x.astype(jnp.bfloat16)))


@loss(projected="w1 w2", tolerance=2e-2)
def a_cast_to_bfloat16_and_back(params, x):
    back = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
    return squared(network(jax.tree.map(back, params), x))


# The gradient in full is the less exact one: its cotangent is rounded to float8.
@loss(projected="w", params=one, tolerance=0.1)
def a_kernel_rounded_to_float8(params, x):
    return squared(x @ params["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32))


@loss(projected="w", params=one, tolerance=2e-2)
def a_product_in_bfloat16_with_a_result_in_float32(params, x):
    half = jnp.bfloat16
    product = jnp.matmul(
        x.astype(half), params["w"].astype(half), preferred_element_type=jnp.float32
    )
    return squared(product)


@loss(projected="w", params=one, tolerance=0.1)
def a_product_in_float8_with_a_result_in_float32(params, x):
    small = jnp.float8_e4m3fn
    product = jnp.matmul(
        x.astype(small), params["w"].astype(small), preferred_element_type=jnp.float32
    )
    return squared(product)


@loss(projected="w1 w2", tolerance=2e-2)
def a_loss_in_bfloat16(params, x):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    return jnp.mean(network(half, x.astype(jnp.bfloat16)) ** 2)


@loss(projected="w", params=one)
def activations_of_complex_numbers(params, x):
    return squared(jnp.abs(jnp.fft.fft(x) @ params["w"]))


@loss(projected="w1 w2")
def products_of_the_highest_precision(params, x):
    with jax.default_matmul_precision("highest"):
        return squared(network(params, x))


@loss(projected="w", params=one, batch=lambda: ((3 * inputs(5, 6)).astype(jnp.int32),))
def integer_activations(params, x):
    return squared(x @ params["w"])


@loss(projected="w", params=one, batch=lambda: (inputs(5, 6) > 0,))
def boolean_activations(params, x):
    return squared(x @ params["w"])


@loss(projected="w", params=one, batch=lambda: (inputs(5, 6).astype(jnp.bfloat16),))
def activations_in_bfloat16_with_a_kernel_in_float32(params, x):
    return squared(x @ params["w"])


@loss(projected="w", params=one, batch=lambda: (jnp.array([0, 3, 3, 5]),))
def one_hot_activations(params, x):
    return squared(jax.nn.one_hot(x, 6) @ params["w"])


@loss(projected="w", params=one, batch=lambda: (jnp.round(5 * inputs(5, 6)).astype(jnp.int8),))
def a_product_of_integers_with_a_kernel_without_a_cast(params, x):
    dense = (((1,), (0,)), ((), ()))
    return squared(jax.lax.dot_general(x, params["w"], dense, preferred_element_type=jnp.float32))


@loss(projected="w1 w2", basis_dtype=jnp.bfloat16)
def bases_that_are_kept_in_bfloat16(params, x):
    return squared(network(params, x))


@loss(partly="ws", params=stack(2, 3), basis_dtype=jnp.int8)
def stacked_bases_that_are_kept_in_int8(params, x):
    reordered = params["ws"].swapaxes(0, 1)[::-1].reshape(6, 6, 6)
    y, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, reordered)
    return squared(y) + squared(params["ws"])
