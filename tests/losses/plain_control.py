"""Control flow, nested transformations and custom derivatives, on plain JAX."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from losses.table import Table, given, inputs, kernel, network, normal, output, squared, stack

CASES = Table()
loss = CASES.loss


# Functions of the parameters and the batch in place of the network.

applied = CASES.rows(output, projected="w1 w2")
each = lambda params, x: jax.lax.map(lambda x: network(params, x), x)
applied("a map over the batch", each)
applied("a vmap over the batch", lambda params, x: jax.vmap(lambda x: network(params, x))(x))
applied("a jit", jax.jit(network))
centred = lambda params, x: network(params, x) - jax.lax.pmean(network(params, x), "row")
rows = lambda params, x: jax.vmap(lambda x: centred(params, x), axis_name="row")(x)
applied("a vmap with an axis name", rows, (2, 5, 6))
applied("names of scopes", jax.named_scope("outer")(jax.named_call(network, name="inner")))
barrier = lambda params, x: network(*jax.lax.optimization_barrier((params, x)))
applied("an optimization barrier around all parameters", barrier)
within = jax.jit(lambda params, x: network(params, x))
applied("a jit in a jit", jax.jit(lambda params, x: within(params, jnp.cos(x))))
twice = jax.jit(lambda n, params, x: network(params, n * x), static_argnums=0, inline=True)
static = lambda params, x: twice(2, params, x)
applied("a jit with an inline flag and a static argument", static)

policies = jax.checkpoint_policies
remat = functools.partial(jax.checkpoint, network)
applied("remat", remat())
applied("remat that may save nothing", remat(policy=policies.nothing_saveable))
applied("remat that may save everything", remat(policy=policies.everything_saveable))
applied("remat that may save products", remat(policy=policies.dots_with_no_batch_dims_saveable))
inner = remat(prevent_cse=False)
outer = jax.checkpoint(lambda params, x: inner(params, jnp.cos(inner(params, x))))
applied("remat inside remat without a barrier", outer)


sequence = given(4, 5, 6)


@loss(
    projected="wx wh",
    params=lambda: {"wx": normal(6, 8), "wh": normal(8, 8), "b": normal(8)},
    batch=sequence,
)
def a_recurrent_cell(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"])
        return h, h

    return squared(jax.lax.scan(step, jnp.zeros((5, 8)), xs)[1])


@loss(
    projected="wx wh",
    params=lambda: {"wx": normal(6, 24), "wh": normal(6, 24), "b": normal(24)},
    batch=sequence,
)
def an_lstm_whose_gates_share_two_kernels(params, xs):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ params["wx"] + h @ params["wh"] + params["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    (h, _), _ = jax.lax.scan(step, (jnp.zeros((5, 6)), jnp.zeros((5, 6))), xs)
    return squared(h)


@loss(
    projected="w u",
    params=lambda: {"w": normal(2, 6, 6), "u": normal(2, 6, 6, seed=2)},
    batch=sequence,
)
def a_gated_recurrent_unit_with_a_stack_of_gates(params, xs):
    def step(h, x):
        z = jax.nn.sigmoid(x @ params["w"][0] + h @ params["u"][0])
        new = jnp.tanh(x @ params["w"][1] + h @ params["u"][1])
        return (1 - z) * h + z * new, None

    return squared(jax.lax.scan(step, jnp.zeros((5, 6)), xs)[0])


# Choices between kernels of 6 × 6. A branch that is not taken has no gradient.

squares = lambda *names: {name: normal(6, 6, seed=2 * i) for i, name in enumerate(names)}
chosen = lambda: (inputs(5, 6), jnp.bool_(True))
between = CASES.rows(output, params=lambda: squares("w", "v"), batch=chosen, zero=("v",))
products = lambda p, x, chosen: jax.lax.cond(chosen, lambda: x @ p["w"], lambda: x @ p["v"])
between("a cond between products with two kernels", products, projected="w v")
of_cond = lambda p, x, chosen: x @ jax.lax.cond(chosen, lambda: p["w"], lambda: p["v"])
between("a cond that returns one of two kernels", of_cond, full="w v")
selected = lambda p, x, chosen: x @ jnp.where(chosen, p["w"], p["v"])
between("a select between two kernels", selected, full="w v")

of_one = CASES.rows(output, params=kernel("w", 6, 6), batch=chosen)
nothing = lambda p, x, chosen: jax.lax.cond(chosen, lambda x: x @ p["w"], lambda x: x, x)
of_one("a cond that applies a kernel or does nothing", nothing, projected="w")
scaled = lambda p, x, chosen: jax.lax.cond(chosen, lambda: x @ p["w"], lambda: x @ (2 * p["w"]))
of_one("a cond that applies a kernel or scales it", scaled, partly="w")
loop = lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x)
of_one("a loop with static bounds", loop, (5, 6), projected="w")


@loss(
    projected="w0 w1 w2",
    zero=("w0", "w2"),
    params=lambda: {f"w{i}": normal(6, 6, seed=i) for i in range(3)},
    batch=lambda: (inputs(5, 6), jnp.int32(1)),
)
def a_switch_between_three_kernels(params, x, index):
    branches = [functools.partial(jnp.matmul, b=params[f"w{i}"]) for i in range(3)]
    return squared(jax.lax.switch(index, branches, x))


@loss(projected="w v", params=lambda: squares("w", "v"))
def a_cond_inside_a_scan(params, x):
    def step(h, i):
        product = jax.lax.cond(i % 2 == 0, lambda: h @ params["w"], lambda: h @ params["v"])
        return jnp.tanh(product), None

    return squared(jax.lax.scan(step, x, jnp.arange(3))[0])


@loss(projected="w", params=kernel("w", 6, 6))
def a_scan_that_stops_early_by_a_condition(params, x):
    def step(h, _):
        go = jnp.sum(h**2) > 1e-3
        return jax.lax.cond(go, lambda h: jnp.tanh(h @ params["w"]), lambda h: h, h), None

    return squared(jax.lax.scan(step, x, None, length=3)[0])


@loss(projected="w1 w2", tolerance=2e-2)
def a_jit_that_returns_the_kernels_in_bfloat16(params, x):
    half = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree))
    return squared(network(half(params), x.astype(jnp.bfloat16)))


clipped = jax.custom_vjp(lambda x: x)
clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-2, 1e-2),))
product = jax.custom_vjp(jnp.matmul)
product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_jvp
def swish(x):
    return x * jax.nn.sigmoid(x)


@swish.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return swish(x), dx * jax.nn.sigmoid(x) * (1 + x * (1 - jax.nn.sigmoid(x)))


@loss(projected="w1 w2")
def a_custom_vjp_of_activations(params, x):
    return squared(network(params, clipped(jnp.tanh(x @ params["w1"]) @ params["w2"])))


@loss(projected="w1 w2")
def a_custom_jvp_of_activations(params, x):
    return squared(swish(x @ params["w1"]) @ params["w2"] + params["b1"][:6])


@loss(full="w1", projected="w2")
def a_custom_vjp_of_a_kernel(params, x):
    return squared(jnp.tanh(product(x, params["w1"]) + params["b1"]) @ params["w2"])


@loss(partly="w1", projected="w2")
def a_custom_vjp_of_a_kernel_next_to_a_product(params, x):
    h = jnp.tanh(product(x, params["w1"]) + jnp.cos(x) @ params["w1"] + params["b1"])
    return squared(h @ params["w2"])


@loss(full="w1", projected="w2")
def a_custom_jvp_of_a_kernel(params, x):
    return squared(network(params | {"w1": swish(params["w1"])}, x))


@loss(projected="w1 w2")
def gelu_relu_and_other_activations(params, x):
    h = jax.nn.gelu(x @ params["w1"] + params["b1"])
    return squared(jax.nn.relu(h @ params["w2"])) + jax.nn.logsumexp(jax.nn.silu(h))


@loss(projected="w1 w2")
def remat_that_saves_an_activation_by_its_name(params, x):
    def named(params, x):
        h = checkpoint_name(jnp.tanh(x @ params["w1"] + params["b1"]), "hidden")
        return h @ params["w2"]

    saved = jax.checkpoint(named, policy=policies.save_only_these_names("hidden"))
    return squared(saved(params, x))


@loss(projected="w1 w2")
def remat_that_saves_a_kernel_by_its_name(params, x):
    def named(params, x):
        return network(params | {"w1": checkpoint_name(params["w1"], "kernel")}, x)

    saved = jax.checkpoint(named, policy=policies.save_only_these_names("kernel"))
    return squared(saved(params, x))


@loss(projected="w1 w2", tolerance=2e-2)
def remat_of_a_cast_that_returns_the_kernels(params, x):
    half = jax.checkpoint(lambda params: jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    return squared(network(half(params), x.astype(jnp.bfloat16)))


@loss(partly="w1", projected="w2")
def remat_of_a_penalty_and_a_product(params, x):
    @jax.checkpoint
    def penalised(params, x):
        return squared(network(params, x)) + 0.1 * jnp.sum(params["w1"] ** 2)

    return penalised(params, x)


@loss(projected="w1 w2")
def a_stop_gradient_on_one_of_two_uses_of_a_kernel(params, x):
    h = jnp.tanh(x @ jax.lax.stop_gradient(params["w1"]) + jnp.cos(x) @ params["w1"])
    return squared((h + params["b1"]) @ params["w2"])


@loss(projected="w1 w2", zero=("w1", "b1"))
def a_stop_gradient_on_the_output_of_a_layer(params, x):
    h = jax.lax.stop_gradient(jnp.tanh(x @ params["w1"] + params["b1"]))
    return squared(h @ params["w2"])


@loss(partly="w1", projected="w2")
def an_iteration_to_convergence_under_stop_gradient(params, x):
    power = lambda v: v @ params["w1"].T @ params["w1"]
    unit = lambda v: v / jnp.linalg.norm(v)
    v = jax.lax.while_loop(
        lambda pair: jnp.sum((pair[0] - pair[1]) ** 2) > 1e-2,
        lambda pair: (unit(power(pair[0])), pair[0]),
        (jnp.ones(8) / 8**0.5, jnp.zeros(8)),
    )[0]
    return squared(network(params, x)) * jax.lax.stop_gradient(jnp.linalg.norm(power(v)))


@loss(projected="w1 w2")
def a_sharding_constraint_on_the_parameters(params, x):
    sharding = NamedSharding(Mesh(jax.devices()[:1], ("data",)), PartitionSpec())
    return squared(network(jax.lax.with_sharding_constraint(params, sharding), x))


@loss(projected="w1 w2")
def a_shard_map_over_the_batch(params, x):
    mesh, rows = Mesh(jax.devices()[:1], ("data",)), PartitionSpec("data")
    mapped = jax.shard_map(network, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    return squared(mapped(params, x))


@loss(
    projected="query/kernel out/kernel",
    params=lambda: {"query": {"kernel": normal(6, 2, 4)}, "out": {"kernel": normal(2, 4, 6)}},
)
def a_shard_map_with_an_entry_for_every_axis_of_heads(params, x):
    mesh, rows = Mesh(jax.devices()[:1], ("data",)), PartitionSpec("data", None)

    def attention(query, out, x):
        return jnp.einsum("nhk,hkd->nd", jnp.tanh(jnp.einsum("nd,dhk->nhk", x, query)), out)

    specs = (PartitionSpec(None, None, None),) * 2
    mapped = jax.shard_map(attention, mesh=mesh, in_specs=(*specs, rows), out_specs=rows)
    return squared(mapped(params["query"]["kernel"], params["out"]["kernel"], x))


@loss(full="w", params=kernel("w", 6, 6))
def a_fixed_point_by_custom_root(params, x):
    solve = lambda f, z: jax.lax.fori_loop(0, 20, lambda _, z: z + f(z), z)
    solve_linear = lambda g, y: solve(lambda v: g(v) - y, jnp.zeros_like(y))
    residual = lambda z: jnp.tanh(0.3 * z @ params["w"] + x) - z
    return squared(jax.lax.custom_root(residual, jnp.zeros_like(x), solve, solve_linear))


@loss(projected="w1 w2")
def a_printed_activation(params, x):
    y = network(params, x)
    jax.debug.print("mean {}", y.mean())
    return squared(y)


@loss(projected="w1 w2")
def printed_norms_of_a_kernel(params, x):
    jax.debug.print("norm {}", jnp.linalg.norm(params["w1"]))
    norm = jax.jit(jnp.linalg.norm)(params["w2"])
    jax.jit(lambda w: jax.debug.print("norms {} {}", jnp.linalg.norm(w), norm))(params["w1"])
    return squared(network(params, x))


@loss(projected="ws", params=stack(3))
def a_norm_printed_in_each_scanned_layer(params, x):
    def layer(h, w):
        jax.debug.print("norm {}", jnp.linalg.norm(w))
        return jnp.tanh(h @ w), None

    return squared(jax.lax.scan(layer, x, params["ws"])[0])


@loss(projected="w1 w2")
def a_pure_callback_next_to_the_network(params, x):
    cosine = jax.pure_callback(jnp.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return squared(network(params, jax.lax.stop_gradient(cosine)))


@loss(projected="w1 w2")
def an_ordered_print_of_an_activation(params, x):
    y = network(params, x)
    jax.debug.print("mean {}", y.mean(), ordered=True)
    return squared(y)
