"""Kernels stacked over layers or experts: sliced, gathered, scanned and multiplied together."""

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from losses.table import Table, inputs, normal, squared, stack

CASES = Table()
loss = CASES.loss


def layer(h, w):
    return jnp.tanh(h @ w)


def scanned(h, w):
    return layer(h, w), None


def experts():
    return {"ws": normal(3, 6, 8)}


@loss(projected="ws", params=stack(3))
def layers_unrolled_by_their_number(params, x):
    for i in range(3):
        x = layer(x, params["ws"][i])
    return squared(x)


@loss(projected="ws", params=stack(3))
def layers_unrolled_by_iteration(params, x):
    for w in params["ws"]:
        x = layer(x, w)
    return squared(x)


@loss(projected="ws", params=stack(3))
def layers_split_by_jnp_split(params, x):
    for w in jnp.split(params["ws"], 3):
        x = layer(x, w[0])
    return squared(x)


@loss(projected="ws", params=stack(3))
def layers_split_into_unequal_parts(params, x):
    first, rest = jnp.split(params["ws"], [1])
    return squared(jax.lax.scan(scanned, layer(x, first.squeeze(0)), rest)[0])


@loss(projected="ws", params=stack(3))
def layers_unstacked(params, x):
    for w in jnp.unstack(params["ws"]):
        x = layer(x, w)
    return squared(x)


@loss(projected="ws", params=stack(3))
def the_last_layer_by_a_negative_index(params, x):
    return squared(layer(layer(x, params["ws"][-1]), params["ws"][0]))


@loss(projected="ws", params=stack(3), batch=lambda: (inputs(5, 6), jnp.int32(1)))
def a_layer_by_a_traced_index(params, x, index):
    return squared(layer(x, params["ws"][index]))


@loss(projected="ws", params=stack(3), batch=lambda: (inputs(5, 6), jnp.int32(1)))
def a_layer_by_dynamic_index_in_dim(params, x, index):
    w = jax.lax.dynamic_index_in_dim(params["ws"], index, keepdims=False)
    return squared(layer(x, w))


@loss(projected="ws", params=stack(3), batch=lambda: (inputs(5, 6), jnp.int32(7)))
def a_layer_by_an_index_that_is_clamped(params, x, index):
    w = jax.lax.dynamic_index_in_dim(params["ws"], index, keepdims=False)
    return squared(layer(x, w))


@loss(projected="ws", params=stack(4), batch=lambda: (inputs(5, 6), jnp.int32(1)))
def two_layers_by_a_dynamic_slice(params, x, start):
    ws = jax.lax.dynamic_slice_in_dim(params["ws"], start, 2)
    return squared(jax.lax.scan(scanned, x, ws)[0])


@loss(projected="ws", params=stack(3))
def a_traced_index_in_a_loop_over_all_layers(params, x):
    return squared(jax.lax.fori_loop(0, 3, lambda i, h: layer(h, params["ws"][i]), x))


@loss(projected="ws", params=stack(3))
def layers_in_reversed_order(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"][::-1])[0])


@loss(projected="ws", params=stack(3))
def layers_in_reversed_order_unrolled(params, x):
    for w in reversed(list(params["ws"])):
        x = layer(x, w)
    return squared(x)


@loss(projected="ws", params=stack(4))
def every_other_layer_by_a_strided_slice(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"][::2])[0])


@loss(projected="ws", params=stack(3))
def all_layers_but_the_first(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"][1:])[0])


@loss(projected="ws", params=stack(2))
def layers_repeated_before_the_scan(params, x):
    return squared(jax.lax.scan(scanned, x, jnp.repeat(params["ws"], 2, axis=0))[0])


@loss(projected="w", params=lambda: {"w": normal(6, 6)})
def one_kernel_broadcast_over_the_layers_of_a_scan(params, x):
    return squared(jax.lax.scan(scanned, x, jnp.broadcast_to(params["w"], (3, 6, 6)))[0])


@loss(full="ws", params=stack(3))
def layers_rotated_by_jnp_roll(params, x):
    return squared(jax.lax.scan(scanned, x, jnp.roll(params["ws"], 1, axis=0))[0])


@loss(projected="ws", params=stack(3))
def layers_scanned(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"])[0])


@loss(projected="ws", params=stack(3), proj_type="full")
def layers_scanned_with_both_sides_projected(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"])[0])


@loss(projected="ws", params=stack(3))
def layers_scanned_from_the_last_one(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"], reverse=True)[0])


@loss(projected="ws", params=stack(4))
def layers_scanned_and_unrolled_by_two(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"], unroll=2)[0])


@loss(projected="ws", params=stack(3))
def layers_scanned_under_remat(params, x):
    return squared(jax.lax.scan(jax.checkpoint(scanned), x, params["ws"])[0])


@loss(projected="ws", params=stack(3), tolerance=2e-2)
def layers_scanned_after_a_cast_of_the_whole_stack(params, x):
    half = params["ws"].astype(jnp.bfloat16)
    return squared(jax.lax.scan(scanned, x.astype(jnp.bfloat16), half)[0])


@loss(projected="ws", params=stack(3))
def layers_scanned_with_transposed_kernels(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"].mT)[0])


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


@loss(full="ws", params=stack(3))
def layers_scanned_and_scaled_inside(params, x):
    return squared(jax.lax.scan(lambda h, w: (layer(h, 2 * w), None), x, params["ws"])[0])


@loss(projected="ws w", params=lambda: stack(3)() | {"w": normal(6, 6)})
def layers_scanned_next_to_a_kernel_that_all_share(params, x):
    body = lambda h, w: (layer(layer(h, w), params["w"]), None)
    return squared(jax.lax.scan(body, x, params["ws"])[0])


@loss(projected="ws", params=stack(2, 2))
def nested_scans(params, x):
    inner = lambda h, ws: jax.lax.scan(scanned, h, ws)
    outer = lambda h, ws: (inner(h, ws)[0], None)
    return squared(jax.lax.scan(outer, x, params["ws"])[0])


@loss(projected="ws", params=stack(2, 2))
def two_layer_axes_unrolled_by_a_pair_of_indices(params, x):
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x = layer(x, params["ws"][i, j])
    return squared(x)


@loss(projected="ws", params=stack(2, 2))
def two_layer_axes_merged_by_a_reshape(params, x):
    return squared(jax.lax.scan(scanned, x, params["ws"].reshape(4, 6, 6))[0])


@loss(projected="ws", params=stack(4))
def layers_grouped_by_a_reshape(params, x):
    body = lambda h, pair: (layer(layer(h, pair[0]), pair[1]), None)
    return squared(jax.lax.scan(body, x, params["ws"].reshape(2, 2, 6, 6))[0])


@loss(
    projected="ws",
    params=lambda: {"ws": normal(6, 3, 6)},
    weight_dimension_numbers=GaLoreDimensionNumbers(0, 2),
)
def layers_on_a_middle_axis_moved_before_the_scan(params, x):
    return squared(jax.lax.scan(scanned, x, jnp.moveaxis(params["ws"], 1, 0))[0])


@loss(
    projected="ws",
    params=lambda: {"ws": normal(6, 6, 3)},
    weight_dimension_numbers=GaLoreDimensionNumbers(0, 1),
)
def layers_on_the_last_axis_unrolled(params, x):
    for i in range(3):
        x = layer(x, params["ws"][..., i])
    return squared(x)


@loss(projected="ws", params=stack(2, 3))
def two_layer_axes_transposed_before_nested_scans(params, x):
    inner = lambda h, ws: jax.lax.scan(scanned, h, ws)
    outer = lambda h, ws: (inner(h, ws)[0], None)
    return squared(jax.lax.scan(outer, x, params["ws"].swapaxes(0, 1))[0])


@loss(projected="ws", params=stack(3))
def layers_that_are_scanned_and_indexed(params, x):
    body = lambda h, w: (layer(h, w) @ params["ws"][0], None)
    return squared(jax.lax.scan(body, x, params["ws"])[0])


@loss(full="ws", params=stack(3))
def layers_that_a_scan_returns_scaled(params, x):
    _, ws = jax.lax.scan(lambda factor, w: (factor + 1, factor * w), 1.0, params["ws"])
    return squared(jax.lax.scan(scanned, x, ws)[0])


@loss(full="ws", params=stack(3))
def a_kernel_in_the_carry_of_a_scan(params, x):
    body = lambda carry, w: ((layer(carry[0], carry[1]), w), None)
    (x, w), _ = jax.lax.scan(body, (x, jnp.eye(6)), params["ws"])
    return squared(x @ w)


@loss(projected="ws", params=experts)
def experts_by_lax_map(params, x):
    return squared(jax.lax.map(lambda w: layer(x, w), params["ws"]))


@loss(projected="ws", params=experts)
def experts_by_vmap_that_share_activations(params, x):
    return squared(jax.vmap(lambda w: layer(x, w))(params["ws"]))


@loss(projected="ws", params=experts, batch=lambda: (inputs(3, 5, 6),))
def experts_by_vmap_with_activations_of_their_own(params, x):
    return squared(jax.vmap(layer)(x, params["ws"]))


@loss(projected="ws", params=experts, proj_type="full")
def a_mixture_of_experts_weighted_by_a_router(params, x):
    weights = jax.nn.softmax(x[:, :3])
    return squared(jnp.einsum("ne,neo->no", weights, jnp.einsum("ni,eio->neo", x, params["ws"])))


@loss(projected="ws vs", params=lambda: {"ws": normal(3, 6, 8), "vs": normal(3, 8, 6)})
def experts_of_two_kernels_by_vmap(params, x):
    expert = lambda w, v: layer(x, w) @ v
    return squared(jax.vmap(expert)(params["ws"], params["vs"]))


@loss(projected="ws", params=experts)
def experts_fed_by_a_dispatch_mask(params, x):
    dispatch = jax.nn.one_hot(jnp.arange(5) % 3, 3)
    fed = jnp.einsum("ne,ni->eni", dispatch, x)
    return squared(jnp.einsum("ne,eno->no", dispatch, layer(fed, params["ws"])))


@loss(projected="ws", params=experts, batch=lambda: (inputs(3, 5, 6), jnp.array([2, 0, 2])))
def experts_gathered_by_jnp_take(params, x, chosen):
    return squared(jnp.einsum("eni,eio->eno", x, jnp.take(params["ws"], chosen, axis=0)))


@loss(projected="ws", params=experts, batch=lambda: (inputs(3, 5, 6), jnp.array([2, 0, 9])))
def experts_gathered_by_indices_that_are_clipped(params, x, chosen):
    return squared(jnp.einsum("eni,eio->eno", x, params["ws"].at[chosen].get(mode="clip")))


@loss(projected="ws", params=experts, batch=lambda: (inputs(3, 5, 6), jnp.array([2, 0, 9])))
def experts_gathered_with_zeros_for_those_that_are_missing(params, x, chosen):
    ws = params["ws"].at[chosen].get(mode="fill", fill_value=0)
    return squared(jnp.einsum("eni,eio->eno", x, ws))


@loss(projected="ws", params=experts, batch=lambda: (inputs(5, 6), jnp.array([[2, 0], [1, 2]])))
def experts_gathered_by_indices_of_two_axes(params, x, chosen):
    return squared(jnp.einsum("ni,abio->abno", x, params["ws"][chosen]))


@loss(projected="ws", params=stack(2, 3), batch=lambda: (inputs(5, 6), jnp.array([1, 0, 1])))
def experts_gathered_from_two_axes_at_once(params, x, chosen):
    return squared(jnp.einsum("ni,eio->eno", x, params["ws"][chosen, jnp.arange(3)]))


@loss(projected="ws", params=stack(2, 3), batch=lambda: (inputs(5, 6), jnp.array([2, 0])))
def an_expert_of_each_layer_by_vmap(params, x, chosen):
    return squared(jax.vmap(lambda ws, i: layer(x, ws[i]))(params["ws"], chosen))


@loss(projected="ws", params=stack(2, 3), batch=lambda: (inputs(5, 6), jnp.array([2, 0])))
def experts_taken_along_the_second_axis(params, x, chosen):
    ws = jnp.take(params["ws"], chosen, axis=1)
    return squared(jnp.einsum("ni,abio->nabo", x, ws))


@loss(projected="ws", params=experts, batch=lambda: (inputs(5, 6), jnp.array([2, 0, 1, 1, 2])))
def an_expert_for_each_token(params, x, chosen):
    return squared(jnp.einsum("ni,nio->no", x, params["ws"][chosen]))


@loss(projected="ws", params=experts, batch=lambda: (inputs(5, 6), jnp.array([2, 0, 1, 1, 2])))
def an_expert_for_each_token_by_vmap(params, x, chosen):
    return squared(jax.vmap(lambda x, i: layer(x, params["ws"][i]))(x, chosen))


@loss(full="ws", params=experts, batch=lambda: (inputs(5, 6), jnp.array([2, 0, 3])))
def a_ragged_product(params, x, sizes):
    return squared(jax.lax.ragged_dot(x, params["ws"], sizes))


@loss(projected="ws", params=experts, batch=lambda: (inputs(5, 3, 6),))
def stacked_kernels_by_einsum_over_a_later_axis(params, x):
    return squared(jnp.einsum("nbi,bio->nbo", x, params["ws"]))


@loss(projected="ws", params=experts, batch=lambda: (inputs(6, 5, 3),))
def stacked_kernels_on_the_left_by_einsum_in_another_order(params, x):
    return squared(jnp.einsum("bio,inb->nob", params["ws"], x))


@loss(projected="ws", params=stack(2, 3), batch=lambda: (inputs(3, 2, 5, 6),))
def two_batch_axes_contracted_in_another_order(params, x):
    return squared(jnp.einsum("bani,abio->nabo", x, params["ws"]))


@loss(full="ws", params=experts)
def stacked_kernels_summed_over_their_batch_axis_by_einsum(params, x):
    return squared(jnp.einsum("ni,eio->no", x, params["ws"]))


@loss(full="ws", params=experts)
def the_mean_of_all_experts(params, x):
    return squared(x @ params["ws"].mean(axis=0))


@loss(full="ws", params=stack(3))
def layers_mixed_by_a_matrix(params, x):
    mixed = jnp.tensordot(jnp.cos(jnp.arange(9.0)).reshape(3, 3), params["ws"], 1)
    return squared(jax.lax.scan(scanned, x, mixed)[0])


@loss(projected="w0 w1 w2", params=lambda: {f"w{i}": normal(6, 6, seed=i) for i in range(3)})
def separate_kernels_one_after_another(params, x):
    for i in range(3):
        x = layer(x, params[f"w{i}"])
    return squared(x)


@loss(full="w0 w1 w2", params=lambda: {f"w{i}": normal(6, 6, seed=i) for i in range(3)})
def separate_kernels_stacked_before_a_scan(params, x):
    ws = jnp.stack([params[f"w{i}"] for i in range(3)])
    return squared(jax.lax.scan(scanned, x, ws)[0])
