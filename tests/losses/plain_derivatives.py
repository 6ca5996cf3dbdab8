"""Derivatives inside the loss, on plain JAX."""

import jax
import jax.numpy as jnp

from losses.table import Table, inputs, mlp, network, normal, squared, stack

CASES = Table()
loss = CASES.loss


def energy(params, x):
    """A smooth scalar of one input."""
    return jnp.sum(jnp.sin(network(params, x)))


@loss(projected="w1 w2")
def a_gradient_penalty_next_to_the_plain_loss(params, x):
    slopes = jax.vmap(jax.grad(energy, argnums=1), (None, 0))(params, x)
    return squared(network(params, x)) + jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2)


@loss(projected="w1 w2")
def a_gradient_penalty_alone(params, x):
    return jnp.mean(jax.grad(lambda x: energy(params, x))(x) ** 2)


@loss(projected="w1 w2")
def the_residual_of_a_pinn(params, x):
    def laplacian(x):
        second = lambda e: jax.jvp(jax.grad(energy, argnums=1), (params, x), (zeros, e))[1] @ e
        zeros = jax.tree.map(jnp.zeros_like, params)
        return sum(second(e) for e in jnp.eye(6)[:2])

    residual = jax.vmap(laplacian)(x) - jax.vmap(lambda x: energy(params, x))(x)
    return jnp.mean(residual**2)


@loss(projected="w1 w2")
def a_second_derivative_by_nested_jvp(params, x):
    direction = jnp.ones_like(x)
    slope = lambda x: jax.jvp(lambda x: network(params, x), (x,), (direction,))[1]
    value, second = jax.jvp(slope, (x,), (direction,))
    return squared(value) + squared(second)


# Derivatives of the network by the inputs, of each row.
jacobian = CASES.rows(
    lambda derivative: (
        lambda params, x: (
            squared(jax.vmap(derivative(lambda x: network(params, x)))(x))
            + squared(network(params, x))
        )
    ),
    projected="w1 w2",
)
jacobian("a jacobian by jacfwd", jax.jacfwd)
jacobian("a jacobian by jacrev", jax.jacrev)
hessian = CASES.rows(
    lambda derivative: (
        lambda params, x: squared(jax.vmap(derivative(lambda x: energy(params, x)))(x))
    ),
    projected="w1 w2",
)
hessian("a hessian", jax.hessian)
hessian("a hessian by jacrev of jacrev", lambda f: jax.jacrev(jax.jacrev(f)))


@loss(projected="w1 w2")
def a_hessian_vector_product_forward_over_reverse(params, x):
    slope = jax.grad(lambda x: energy(params, x))
    return squared(jax.jvp(slope, (x,), (jnp.cos(x),))[1])


@loss(projected="w1 w2")
def a_hessian_vector_product_reverse_over_reverse(params, x):
    slope = jax.grad(lambda x: energy(params, x))
    return squared(jax.grad(lambda y: jnp.vdot(slope(y), jnp.cos(x)))(x))


def value_and_slope(f, x):
    y, slope = jax.jvp(f, (x,), (jnp.cos(x),))
    return squared(y) + squared(slope)


@loss(projected="w1 w2")
def a_jvp_in_the_inputs_next_to_the_primal(params, x):
    return value_and_slope(lambda x: network(params, x), x)


@loss(projected="w1 w2")
def a_linearised_network(params, x):
    y, slope = jax.linearize(lambda x: network(params, x), x)
    return squared(y) + squared(slope(jnp.cos(x)))


@loss(projected="w1 w2")
def a_vjp_with_a_cotangent_of_the_loss(params, x):
    y, pull = jax.vjp(lambda x: network(params, x), x)
    return squared(pull(jnp.cos(y))[0])


@loss(projected="w1 w2")
def score_matching(params, x):
    score = lambda x: network(params, x)
    trace = jax.vmap(lambda x: jnp.trace(jax.jacfwd(score)(x)))(x)
    return jnp.mean(trace + 0.5 * jnp.sum(score(x) ** 2, axis=-1))


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jax.random.key(0)))
def sliced_score_matching_with_a_key_in_the_batch(params, x, key):
    noise = jax.random.normal(key, x.shape)
    score, slope = jax.jvp(lambda x: network(params, x), (x,), (noise,))
    return jnp.mean(jnp.sum(noise * slope, axis=-1) + 0.5 * jnp.sum(score**2, axis=-1))


@loss(projected="w1 w2")
def an_adversarial_step_of_the_inputs(params, x):
    return squared(network(params, x + 0.1 * jax.grad(lambda x: energy(params, x))(x)))


@loss(projected="w1", params=lambda: {"w1": normal(6, 8), "b1": normal(8)})
def a_contractive_autoencoder_with_tied_kernels(params, x):
    encode = lambda x: jnp.tanh(x @ params["w1"] + params["b1"])
    contraction = jax.vmap(jax.jacrev(encode))(x)
    return squared(encode(x) @ params["w1"].T - x) + 0.1 * jnp.sum(contraction**2)


def scanned(ws, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def unrolled(ws, x):
    for i in range(3):
        x = jnp.tanh(x @ ws[i])
    return x


@loss(projected="ws", params=stack(3))
def a_jvp_through_scanned_layers(params, x):
    return value_and_slope(lambda x: scanned(params["ws"], x), x)


def penalised(layers):
    def loss(params, x):
        output = lambda x: jnp.sum(jnp.sin(layers(params["ws"], x)))
        return output(x) + jnp.sum(jax.grad(output)(x) ** 2)

    return loss


penalty = CASES.rows(penalised, params=stack(3), projected="ws")
penalty("a gradient penalty through unrolled layers", unrolled)
penalty("a gradient penalty through scanned layers", scanned)


@loss(projected="w1 w2")
def a_gradient_penalty_through_a_jit(params, x):
    compiled = jax.jit(network)
    return jnp.mean(jax.grad(lambda x: squared(compiled(params, x)))(x) ** 2)


@loss(projected="w1 w2")
def a_gradient_penalty_through_remat(params, x):
    recomputed = jax.checkpoint(network)
    return 10 * jnp.mean(jax.grad(lambda x: squared(recomputed(params, x)))(x) ** 2)


@loss(projected="w1 w2")
def an_ordinary_differential_equation_by_runge_kutta(params, x):
    def step(x, _):
        k1 = network(params, x)
        k2 = network(params, x + 0.1 * k1)
        return x + 0.05 * (k1 + k2), None

    return squared(jax.lax.scan(step, x, None, length=3)[0])


@loss(projected="w1 w2")
def a_penalty_on_the_gradient_by_the_parameters(params, x):
    value, slopes = jax.value_and_grad(inner_loss)(params, x)
    return value + sum(jnp.sum(g**2) for g in jax.tree.leaves(slopes))


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), jax.tree.map(jnp.cos, mlp())))
def a_hessian_vector_product_in_the_parameters(params, x, direction):
    slope = lambda params: jax.grad(inner_loss)(params, x)
    _, product = jax.jvp(slope, (params,), (direction,))
    return sum(jnp.sum(g**2) for g in jax.tree.leaves(product))


@loss(partly="w1 w2")
def sharpness_aware_minimisation(params, x):
    slopes = jax.lax.stop_gradient(jax.grad(inner_loss)(params, x))
    norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(slopes)) ** 0.5
    return inner_loss(jax.tree.map(lambda a, g: a + 0.1 * g / norm, params, slopes), x)


def inner_loss(params, x):
    return squared(network(params, x) - 1)


def adapted(params, x, steps=1, gradient=None):
    gradient = gradient or jax.grad(inner_loss)
    for _ in range(steps):
        params = jax.tree.map(lambda a, g: a - 0.3 * g, params, gradient(params, x))
    return params


maml = CASES.rows(
    lambda inner: lambda params, x: squared(network(inner(params, x[:2]), x[2:])), partly="w1 w2"
)
maml("maml with one inner step", adapted)
maml("maml with two inner steps", lambda params, x: adapted(params, x, steps=2))
constant = lambda params, x: jax.lax.stop_gradient(jax.grad(inner_loss)(params, x))
maml("first order maml", lambda params, x: adapted(params, x, gradient=constant))


@loss(full="w1 w2")
def maml_with_inner_steps_in_a_scan(params, x):
    step = lambda params, x: (adapted(params, x), None)
    params, _ = jax.lax.scan(step, params, jnp.stack([x[:2], x[1:3]]))
    return squared(network(params, x[2:]))


@loss(partly="w1 w2")
def maml_over_a_batch_of_tasks(params, x):
    task = lambda x: squared(network(adapted(params, x[:2]), x[2:]))
    return jnp.mean(jax.vmap(task)(jnp.stack([x, jnp.cos(x)])))


@loss(projected="w1 w2", params=lambda: mlp() | {"c": normal(6)})
def an_inner_gradient_by_parameters_that_are_not_projected(params, x):
    offset = lambda c: squared(network(params, x) + c)
    return offset(params["c"] - 0.3 * jax.grad(offset)(params["c"]))


def scaled_backward(scale):
    """The identity, whose backward pass multiplies by a value that it has from elsewhere."""
    identity = jax.custom_vjp(lambda y: y)
    identity.defvjp(lambda y: (y, None), lambda _, dy: (dy * scale,))
    return identity


backward = CASES.rows(
    lambda scale: lambda params, x: squared(scaled_backward(scale(x))(network(params, x))),
    full="w1 w2",
)
backward("a backward pass that reads a value of the loss", lambda x: jnp.sum(x**2))
# A value that all micro-batches have in common.
common = lambda x: 2 * jnp.mean(jnp.sign(x**2))
backward("a backward pass that reads its micro batch", common, (6, 6), micro_batches=2)
backward("a backward pass that reads the batch", lambda x: x, full="", projected="w1 w2")
