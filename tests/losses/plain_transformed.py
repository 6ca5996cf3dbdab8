"""Parameters that are transformed or penalised before or next to their use, on plain JAX."""

import functools

import jax
import jax.numpy as jnp

from losses.table import Table, inputs, mlp, network, normal, squared, sum_of_squares

CASES = Table()
loss = CASES.loss


# All parameters, each changed by one function.

changed = CASES.rows(
    lambda change: lambda params, x: squared(network(jax.tree.map(change, params), x)),
    full="w1 w2",
)
twice_kernels = lambda a: 2 * a if a.ndim >= 2 else a
changed("kernels scaled by their number of axes", twice_kernels)
twice_biases = lambda a: 2 * a if a.ndim < 2 else a
changed("biases scaled by their number of axes", twice_biases, full="", projected="w1 w2")
changed("kernels pruned by their size", lambda a: jnp.where(jnp.abs(a) > 0.2, a, 0))
changed("absolute kernels", jnp.abs)
standard = lambda a: (a - a.mean(axis=0)) / (a.std(axis=0) + 1e-2) if a.ndim >= 2 else a
changed("weight standardisation", standard)


def quantised(a):
    step = jnp.max(jnp.abs(a)) / 7
    return a + jax.lax.stop_gradient(step * jnp.round(a / step) - a)


changed("fake quantisation with a straight through estimator", quantised)
rounded = jax.custom_vjp(lambda a: jnp.round(4 * a) / 4)
rounded.defvjp(lambda a: (rounded(a), None), lambda _, g: (g,))
changed("rounding with a custom derivative", rounded)

# One kernel, changed by a function.

first = CASES.rows(
    lambda change: lambda params, x: squared(network(params | {"w1": change(params["w1"])}, x)),
    full="w1",
    projected="w2",
)
first("a kernel with its diagonal removed", lambda w: w * (1 - jnp.eye(6, 8)))
first("a kernel clipped to a range", lambda w: jnp.clip(w, -0.6, 0.6))
first("a softmax over a kernel", jax.nn.softmax)


@loss(full="w1", projected="w2")
def a_kernel_scaled_by_its_path(params, x):
    double = lambda path, a: 2 * a if path[-1].key == "w1" else a
    return squared(network(jax.tree_util.tree_map_with_path(double, params), x))


@loss(full="w1 w2", batch=lambda: (inputs(5, 6), jax.tree.map(lambda a: a > -0.2, mlp())))
def kernels_pruned_by_masks_in_the_batch(params, x, masks):
    return squared(network(jax.tree.map(jnp.multiply, params, masks), x))


@loss(full="w1 w2", tolerance=2e-2)
def kernels_cast_to_bfloat16_and_scaled(params, x):
    half = lambda a: a.astype(jnp.bfloat16) * jnp.bfloat16(0.5)
    return squared(network(jax.tree.map(half, params), x.astype(jnp.bfloat16)))


@loss(full="w1 w2", params=lambda: mlp() | {"g1": normal(8), "g2": normal(6)})
def weight_normalisation(params, x):
    unit = lambda w: w / jnp.linalg.norm(w, axis=0)
    kernels = {name: params["g" + name[1]] * unit(params[name]) for name in ("w1", "w2")}
    return squared(network(params | kernels, x))


@loss(partly="w1", projected="w2")
def spectral_normalisation_by_power_iteration(params, x):
    w = params["w1"]
    u = v = jnp.ones(8)
    for _ in range(2):
        u = jax.lax.stop_gradient(w @ v)
        v = jax.lax.stop_gradient(u @ w / jnp.linalg.norm(u @ w))
    u = u / jnp.linalg.norm(u)
    return squared(network(params | {"w1": w / (u @ w @ v)}, x))


@loss(full="w1 w2", batch=lambda: (inputs(5, 6), jax.random.key(0)))
def dropout_on_kernels(params, x, key):
    drop = lambda a: jnp.where(jax.random.bernoulli(key, 0.8, a.shape), a / 0.8, 0)
    return squared(network(jax.tree.map(drop, params), x))


@loss(full="w1 w2", batch=lambda: (inputs(5, 6), jax.random.key(0)))
def noise_on_kernels(params, x, key):
    noisy = lambda a: a + 0.1 * jax.random.normal(key, a.shape)
    return squared(network(jax.tree.map(noisy, params), x))


@loss(full="w1", projected="w2", params=lambda: mlp() | {"a": normal(6, 2), "b": normal(2, 8)})
def a_low_rank_term_added_to_a_kernel(params, x):
    return squared(network(params | {"w1": params["w1"] + params["a"] @ params["b"]}, x))


@loss(
    projected="w1 w2", params=lambda: mlp() | {"a": normal(6, 2, seed=3), "b": normal(2, 8, seed=3)}
)
def a_low_rank_product_next_to_a_kernel(params, x):
    added = x @ params["a"] @ params["b"]
    return squared(jnp.tanh(x @ params["w1"] + params["b1"] + added) @ params["w2"])


@loss(full="w1", projected="w2")
def a_kernel_padded_before_its_product(params, x):
    wide = jnp.pad(params["w1"], ((0, 2), (0, 0)))
    return squared(network(params | {"w1": wide}, jnp.concatenate([x, x[:, :2]], axis=1)))


@loss(projected="w1 w2")
def a_loss_divided_by_the_number_of_parameters(params, x):
    return squared(network(params, x)) * 100 / sum(a.size for a in jax.tree.leaves(params))


@loss(projected="w1 w2")
def a_penalty_on_leaves_of_one_axis(params, x):
    penalty = sum_of_squares([a for a in jax.tree.leaves(params) if a.ndim == 1])
    return squared(network(params, x)) + 0.1 * penalty


@loss(partly="w1 w2")
def a_penalty_on_all_weights(params, x):
    return squared(network(params, x)) + 0.1 * sum_of_squares(params)


@loss(partly="w1 w2")
def a_penalty_on_the_flat_vector_of_all_weights(params, x):
    flat, _ = jax.flatten_util.ravel_pytree(params)
    return squared(network(params, x)) + 0.1 * jnp.linalg.norm(flat)


@loss(full="w1 w2")
def parameters_restored_from_one_flat_vector(params, x):
    flat, restore = jax.flatten_util.ravel_pytree(params)
    return squared(network(restore(flat), x))


@loss(partly="w1", projected="w2")
def an_absolute_penalty_on_one_kernel(params, x):
    return squared(network(params, x)) + 0.1 * jnp.sum(jnp.abs(params["w1"]))


@loss(partly="w1", projected="w2")
def a_penalty_on_the_gram_matrix_of_a_kernel(params, x):
    gram = params["w1"] @ params["w1"].T
    return squared(network(params, x)) + 0.1 * jnp.sum((gram - jnp.eye(6)) ** 2)


def elsewhere():
    return jax.tree.map(lambda a: a + 0.3, mlp())


@loss(partly="w1 w2", batch=lambda: (inputs(5, 6), elsewhere()))
def a_penalty_on_the_distance_from_a_second_tree(params, x, start):
    distance = sum_of_squares(jax.tree.map(jnp.subtract, params, start))
    return squared(network(params, x)) + 0.1 * distance


@loss(partly="w1 w2", batch=lambda: (inputs(5, 6), elsewhere(), jax.tree.map(jnp.abs, mlp())))
def elastic_weight_consolidation(params, x, start, fisher):
    weighted = jax.tree.map(lambda f, a, b: jnp.sum(f * (a - b) ** 2), fisher, params, start)
    return squared(network(params, x)) + 0.5 * sum(jax.tree.leaves(weighted))


@loss(projected="w1 w2", batch=lambda: (inputs(5, 6), elsewhere()))
def distillation_from_a_second_tree(params, x, teacher):
    return jnp.mean((network(params, x) - network(teacher, x)) ** 2)


@loss(projected="w1 w2")
def a_target_network_under_stop_gradient(params, x):
    target = network(jax.lax.stop_gradient(params), jnp.cos(x))
    return jnp.mean((network(params, x) - target) ** 2)


@loss(full="w1 w2", batch=lambda: (inputs(5, 6), elsewhere()))
def a_moving_average_of_the_parameters(params, x, average):
    return squared(network(jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, params, average), x))


@loss(partly="w1", projected="w2", params=lambda: {"w1": normal(6, 8), "w2": normal(8, 6)})
def a_kernel_that_is_also_read_by_its_rows(params, x):
    rows = params["w1"][jnp.array([0, 2, 2, 5, 1]), :6]
    return squared(jnp.tanh(x @ params["w1"]) @ params["w2"] + rows)


@loss(partly="w1 w2")
def two_networks_of_which_one_has_scaled_kernels(params, x):
    scaled = jax.tree.map(functools.partial(jnp.multiply, 0.5), params)
    return squared(network(params, x) - network(scaled, jnp.cos(x)))
