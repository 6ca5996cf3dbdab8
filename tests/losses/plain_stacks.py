"""Kernels stacked over layers or experts: sliced, gathered, scanned and multiplied together."""

import functools

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from losses.table import Table, inputs, kernel, normal, squared, stack

CASES = Table()
loss = CASES.loss


def layer(h, w):
    return jnp.tanh(h @ w)


def scanned(h, w):
    return layer(h, w), None


def of_stack(f):
    """A loss of a stack of kernels and the batch."""
    return lambda params, *batch: squared(f(params["ws"], *batch))


# Layers one after another.


def unrolled(change):
    """A loss of layers one by one, of what `change` makes of their stack."""

    def loss(params, x):
        for w in change(params["ws"]):
            x = layer(x, w)
        return squared(x)

    return loss


one_by_one = CASES.rows(unrolled, params=stack(3), projected="ws")
one_by_one("layers unrolled by their number", lambda ws: (ws[i] for i in range(3)))
one_by_one("layers unrolled by iteration", iter)
one_by_one("layers split by jnp split", lambda ws: (w[0] for w in jnp.split(ws, 3)))
one_by_one("layers unstacked", jnp.unstack)
one_by_one("layers in reversed order unrolled", lambda ws: reversed(list(ws)))
in_pairs = lambda ws: (ws[i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
one_by_one("two layer axes unrolled by a pair of indices", in_pairs, params=stack(2, 2))
last = {"params": kernel("ws", 6, 6, 3), "weight_dimension_numbers": GaLoreDimensionNumbers(0, 1)}
one_by_one("layers on the last axis unrolled", lambda ws: (ws[..., i] for i in range(3)), **last)
one_by_one("the last layer by a negative index", lambda ws: (ws[i] for i in (-1, 0)))

dynamic = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
of_layers = CASES.rows(of_stack, params=stack(3), projected="ws")
of_layers("a layer by a traced index", lambda ws, x, i: layer(x, ws[i]), (5, 6), 1)
by_index = lambda ws, x, i: layer(x, dynamic(ws, i))
of_layers("a layer by dynamic index in dim", by_index, (5, 6), 1)
of_layers("a layer by an index that is clamped", by_index, (5, 6), 7)
in_a_loop = lambda ws, x: jax.lax.fori_loop(0, 3, lambda i, h: layer(h, ws[i]), x)
of_layers("a traced index in a loop over all layers", in_a_loop)


@loss(projected="ws", params=stack(4), batch=lambda: (inputs(5, 6), jnp.int32(1)))
def two_layers_by_a_dynamic_slice(params, x, start):
    ws = jax.lax.dynamic_slice_in_dim(params["ws"], start, 2)
    return squared(jax.lax.scan(scanned, x, ws)[0])


@loss(projected="ws", params=stack(3))
def layers_split_into_unequal_parts(params, x):
    first, rest = jnp.split(params["ws"], [1])
    return squared(jax.lax.scan(scanned, layer(x, first.squeeze(0)), rest)[0])


# Scans of what a function makes of a stack.

scan = CASES.rows(
    lambda change: of_stack(lambda ws, x: jax.lax.scan(scanned, x, change(ws))[0]),
    params=stack(3),
)
scan("layers scanned", lambda ws: ws, projected="ws")
scan("layers scanned with both sides projected", lambda ws: ws, projected="ws", proj_type="full")
scan("layers scanned with transposed kernels", lambda ws: ws.mT, projected="ws")
scan("layers in reversed order", lambda ws: ws[::-1], projected="ws")
scan("every other layer by a strided slice", lambda ws: ws[::2], projected="ws", params=stack(4))
scan("all layers but the first", lambda ws: ws[1:], projected="ws")
repeated = lambda ws: jnp.repeat(ws, 2, axis=0)
scan("layers repeated before the scan", repeated, projected="ws", params=stack(2))
scan("layers rotated by jnp roll", lambda ws: jnp.roll(ws, 1, axis=0), full="ws")
merged = lambda ws: ws.reshape(4, 6, 6)
scan("two layer axes merged by a reshape", merged, projected="ws", params=stack(2, 2))
middle = {"params": kernel("ws", 6, 3, 6), "weight_dimension_numbers": GaLoreDimensionNumbers(0, 2)}
moved = lambda ws: jnp.moveaxis(ws, 1, 0)
scan("layers on a middle axis moved before the scan", moved, projected="ws", **middle)
scaled = lambda ws: jax.lax.scan(lambda factor, w: (factor + 1, factor * w), 1.0, ws)[1]
scan("layers that a scan returns scaled", scaled, full="ws")
mixed = lambda ws: jnp.tensordot(jnp.cos(jnp.arange(9.0)).reshape(3, 3), ws, 1)
scan("layers mixed by a matrix", mixed, full="ws")


@loss(projected="w", params=kernel("w", 6, 6))
def one_kernel_broadcast_over_the_layers_of_a_scan(params, x):
    return squared(jax.lax.scan(scanned, x, jnp.broadcast_to(params["w"], (3, 6, 6)))[0])


@loss(projected="ws", params=stack(3), tolerance=2e-2)
def layers_scanned_after_a_cast_of_the_whole_stack(params, x):
    half = params["ws"].astype(jnp.bfloat16)
    return squared(jax.lax.scan(scanned, x.astype(jnp.bfloat16), half)[0])


# Scans that do something else with each layer.

bodies = CASES.rows(
    lambda body: of_stack(lambda ws, x: jax.lax.scan(body, x, ws)[0]), params=stack(3)
)
bodies("layers scanned under remat", jax.checkpoint(scanned), projected="ws")
bodies("layers scanned and scaled inside", lambda h, w: (layer(h, 2 * w), None), full="ws")
nested = lambda h, ws: (jax.lax.scan(scanned, h, ws)[0], None)
bodies("nested scans", nested, projected="ws", params=stack(2, 2))


@loss(projected="ws", params=stack(2, 3))
def two_layer_axes_transposed_before_nested_scans(params, x):
    return squared(jax.lax.scan(nested, x, params["ws"].swapaxes(0, 1))[0])


@loss(projected="ws", params=stack(4))
def layers_grouped_by_a_reshape(params, x):
    body = lambda h, pair: (layer(layer(h, pair[0]), pair[1]), None)
    return squared(jax.lax.scan(body, x, params["ws"].reshape(2, 2, 6, 6))[0])


@loss(projected="ws", params=stack(3))
def layers_scanned_from_the_last_one(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"], reverse=True)[0])


@loss(projected="ws", params=stack(4))
def layers_scanned_and_unrolled_by_two(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"], unroll=2)[0])


@loss(projected="ws", params=stack(3))
def layers_scanned_with_outputs_of_every_layer(params, x):
    _, every = jax.lax.scan(lambda h, w: (layer(h, w), h @ w), x, params["ws"])
    return squared(every)


@loss(partly="ws", params=stack(3))
def layers_scanned_with_a_penalty_inside(params, x):
    def body(carry, w):
        h, penalty = carry
        return (layer(h, w), penalty + jnp.sum(w**2)), None

    (x, penalty), _ = jax.lax.scan(body, (x, 0.0), params["ws"])
    return squared(x) + 0.1 * penalty


@loss(projected="ws w", params=lambda: stack(3)() | {"w": normal(6, 6)})
def layers_scanned_next_to_a_kernel_that_all_share(params, x):
    body = lambda h, w: (layer(layer(h, w), params["w"]), None)
    return squared(jax.lax.scan(body, x, params["ws"])[0])


@loss(projected="ws", params=stack(3))
def layers_that_are_scanned_and_indexed(params, x):
    body = lambda h, w: (layer(h, w) @ params["ws"][0], None)
    return squared(jax.lax.scan(body, x, params["ws"])[0])


@loss(full="ws", params=stack(3))
def a_kernel_in_the_carry_of_a_scan(params, x):
    body = lambda carry, w: ((layer(carry[0], carry[1]), w), None)
    (x, w), _ = jax.lax.scan(body, (x, jnp.eye(6)), params["ws"])
    return squared(x @ w)


separate = lambda: {f"w{i}": normal(6, 6, seed=i) for i in range(3)}


@loss(projected="w0 w1 w2", params=separate)
def separate_kernels_one_after_another(params, x):
    for i in range(3):
        x = layer(x, params[f"w{i}"])
    return squared(x)


@loss(full="w0 w1 w2", params=separate)
def separate_kernels_stacked_before_a_scan(params, x):
    ws = jnp.stack([params[f"w{i}"] for i in range(3)])
    return squared(jax.lax.scan(scanned, x, ws)[0])


# Experts, each a kernel of 6 × 8, all at once.

experts = CASES.rows(of_stack, params=kernel("ws", 3, 6, 8), projected="ws")
experts("experts by lax map", lambda ws, x: jax.lax.map(lambda w: layer(x, w), ws))
shared = lambda ws, x: jax.vmap(lambda w: layer(x, w))(ws)
experts("experts by vmap that share activations", shared)
own = lambda ws, x: jax.vmap(layer)(x, ws)
experts("experts by vmap with activations of their own", own, (3, 5, 6))
later = lambda ws, x: jnp.einsum("nbi,bio->nbo", x, ws)
experts("stacked kernels by einsum over a later axis", later, (5, 3, 6))
on_the_left = lambda ws, x: jnp.einsum("bio,inb->nob", ws, x)
experts("stacked kernels on the left by einsum in another order", on_the_left, (6, 5, 3))

none = {"projected": "", "full": "ws"}
summed = lambda ws, x: jnp.einsum("ni,eio->no", x, ws)
experts("stacked kernels summed over their batch axis by einsum", summed, **none)
experts("the mean of all experts", lambda ws, x: x @ ws.mean(axis=0), **none)


@loss(projected="ws", params=kernel("ws", 3, 6, 8), proj_type="full")
def a_mixture_of_experts_weighted_by_a_router(params, x):
    weights = jax.nn.softmax(x[:, :3])
    return squared(jnp.einsum("ne,neo->no", weights, jnp.einsum("ni,eio->neo", x, params["ws"])))


@loss(projected="ws vs", params=lambda: {"ws": normal(3, 6, 8), "vs": normal(3, 8, 6)})
def experts_of_two_kernels_by_vmap(params, x):
    expert = lambda w, v: layer(x, w) @ v
    return squared(jax.vmap(expert)(params["ws"], params["vs"]))


@loss(projected="ws", params=kernel("ws", 3, 6, 8))
def experts_fed_by_a_dispatch_mask(params, x):
    dispatch = jax.nn.one_hot(jnp.arange(5) % 3, 3)
    fed = jnp.einsum("ne,ni->eni", dispatch, x)
    return squared(jnp.einsum("ne,eno->no", dispatch, layer(fed, params["ws"])))


# Experts chosen by their numbers.

taken = lambda ws, x, chosen: jnp.einsum("eni,eio->eno", x, jnp.take(ws, chosen, axis=0))
experts("experts gathered by jnp take", taken, (3, 5, 6), [2, 0, 2])
clipped = lambda ws, x, chosen: jnp.einsum("eni,eio->eno", x, ws.at[chosen].get(mode="clip"))
experts("experts gathered by indices that are clipped", clipped, (3, 5, 6), [2, 0, 9])
of_two_axes = lambda ws, x, chosen: jnp.einsum("ni,abio->abno", x, ws[chosen])
experts("experts gathered by indices of two axes", of_two_axes, (5, 6), [[2, 0], [1, 2]])
of_each = lambda ws, x, chosen: jnp.einsum("ni,nio->no", x, ws[chosen])
experts("an expert for each token", of_each, (5, 6), [2, 0, 1, 1, 2])
by_vmap = lambda ws, x, chosen: jax.vmap(lambda x, i: layer(x, ws[i]))(x, chosen)
experts("an expert for each token by vmap", by_vmap, (5, 6), [2, 0, 1, 1, 2])


@loss(
    projected="ws",
    params=kernel("ws", 3, 6, 8),
    batch=lambda: (inputs(3, 5, 6), jnp.array([2, 0, 9])),
)
def experts_gathered_with_zeros_for_those_that_are_missing(params, x, chosen):
    ws = params["ws"].at[chosen].get(mode="fill", fill_value=0)
    return squared(jnp.einsum("eni,eio->eno", x, ws))


two_axes = {"params": stack(2, 3)}
both = lambda ws, x, chosen: jnp.einsum("ni,eio->eno", x, ws[chosen, jnp.arange(3)])
experts("experts gathered from two axes at once", both, (5, 6), [1, 0, 1], **two_axes)
one_each = lambda ws, x, chosen: jax.vmap(lambda ws, i: layer(x, ws[i]))(ws, chosen)
experts("an expert of each layer by vmap", one_each, (5, 6), [2, 0], **two_axes)
second = lambda ws, x, chosen: jnp.einsum("ni,abio->nabo", x, jnp.take(ws, chosen, axis=1))
experts("experts taken along the second axis", second, (5, 6), [2, 0], **two_axes)
contracted = lambda ws, x: jnp.einsum("bani,abio->nabo", x, ws)
experts("two batch axes contracted in another order", contracted, (3, 2, 5, 6), **two_axes)
