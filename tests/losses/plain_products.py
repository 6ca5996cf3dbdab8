"""Products with kernels that are transposed, reshaped or contracted in part, on plain JAX."""

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from galore_jax import Rule
from losses.table import Table, inputs, mlp, network, normal, squared

CASES = Table()
loss = CASES.loss


def one():
    return {"w": normal(6, 8)}


def many():
    """A kernel that reads 2 × 3 features and writes 2 × 4."""
    return {"w": normal(2, 3, 2, 4)}


GROUPED = GaLoreDimensionNumbers((0, 1), (2, 3))


@loss(projected="w", params=one, batch=lambda: (inputs(6),))
def a_single_input_without_a_batch_axis(params, x):
    return squared(x @ params["w"])


@loss(projected="w", params=one, batch=lambda: (inputs(2, 3, 5, 6),))
def activations_with_three_batch_axes(params, x):
    return squared(x @ params["w"])


@loss(projected="w", params=one, batch=lambda: (inputs(6, 5),))
def a_kernel_on_the_left_contracted_on_its_in_axis(params, x):
    return squared(params["w"].T @ x)


@loss(projected="w", params=one, batch=lambda: (inputs(8, 5),))
def a_kernel_on_the_left_contracted_on_its_out_axis(params, x):
    return squared(params["w"] @ x)


@loss(projected="w", params=one, batch=lambda: (inputs(5, 8),))
def a_kernel_transposed_on_the_right(params, x):
    return squared(x @ params["w"].T)


@loss(projected="w", params=one, batch=lambda: (inputs(5, 8),))
def a_kernel_transposed_three_times(params, x):
    return squared(x @ params["w"].T.astype(jnp.float32).swapaxes(0, 1).mT)


@loss(projected="w", params=one, batch=lambda: (inputs(6, 2, 5),))
def features_on_the_first_axis_of_the_activations(params, x):
    return squared(jnp.einsum("dbn,do->obn", x, params["w"]))


@loss(projected="w", params=one)
def a_kernel_used_for_inputs_and_tied_for_outputs(params, x):
    return squared(jnp.tanh(x @ params["w"]) @ params["w"].T)


@loss(projected="w", params=lambda: {"w": normal(6, 6)})
def a_kernel_used_twice(params, x):
    return squared(jnp.tanh(x @ params["w"]) @ params["w"])


@loss(full="w1 w2")
def a_product_of_two_kernels(params, x):
    return squared(x @ (params["w1"] @ params["w2"]) + params["b1"][:6])


@loss(full="w", params=lambda: {"w": normal(6, 6)})
def the_square_of_a_kernel(params, x):
    return squared(x @ (params["w"] @ params["w"]))


@loss(projected="w1", params=lambda: {"w1": normal(6, 8), "c": normal(8)})
def the_product_of_a_kernel_with_a_parameter_of_one_axis(params, x):
    return squared(x @ (params["w1"] @ params["c"]))


@loss(projected="w", params=one, batch=lambda: (inputs(5, 6), inputs(7, 8)))
def a_bilinear_form_by_einsum(params, x, y):
    return squared(jnp.einsum("ni,io,mo->nm", x, params["w"], y))


@loss(full="w", params=one, batch=lambda: (inputs(5, 6, 8),))
def a_kernel_contracted_on_both_its_axes(params, x):
    return squared(jnp.tensordot(x, params["w"], 2))


@loss(full="w", params=one, batch=lambda: (inputs(5),))
def an_outer_product_with_a_kernel(params, x):
    return squared(jnp.tensordot(x, params["w"], 0))


@loss(full="w", params=one, batch=lambda: (inputs(5, 6),))
def an_elementwise_product_summed_by_hand(params, x):
    return squared(jnp.sum(x[:, :, None] * params["w"], axis=1))


@loss(full="w", params=lambda: {"w": normal(6, 6)}, batch=lambda: (inputs(6, 5),))
def a_linear_system_with_a_kernel(params, x):
    return squared(jnp.linalg.solve(params["w"] + 3 * jnp.eye(6), x))


@loss(projected="w", params=one)
def axes_of_one_inserted_and_removed_by_indices(params, x):
    return squared(x @ params["w"][:, None, :].squeeze(1)[None][0])


@loss(projected="w", params=one)
def axes_of_one_inserted_and_removed_by_reshapes(params, x):
    return squared(x @ params["w"][None].reshape(6, 1, 8).reshape(6, 8))


@loss(projected="w", params=one, batch=lambda: (inputs(3, 5, 6),))
def a_kernel_broadcast_over_the_batch(params, x):
    repeated = jnp.broadcast_to(params["w"], (3, 6, 8))
    return squared(jnp.einsum("bni,bio->bno", x, repeated))


@loss(projected="w", params=one, batch=lambda: (inputs(3, 5, 6),))
def a_kernel_tiled_over_the_batch(params, x):
    return squared(x @ jnp.tile(params["w"].reshape(1, 6, 8), (3, 1, 1)))


@loss(projected="w", params=one)
def a_kernel_repeated_along_an_axis_of_one_between_its_sides(params, x):
    repeated = jnp.broadcast_to(params["w"].reshape(6, 1, 8), (6, 3, 8))
    return squared(jnp.einsum("nd,dhk->nhk", x, repeated) * jnp.arange(3.0)[:, None])


@loss(full="w", params=one)
def a_product_with_half_of_the_in_axis(params, x):
    return squared(x[:, :3] @ params["w"][:3])


@loss(full="w", params=one)
def a_kernel_split_along_its_out_axis(params, x):
    first, second = jnp.split(params["w"], 2, axis=1)
    return squared(jnp.tanh(x @ first) * (x @ second))


@loss(full="w1 v1", projected="w2", params=lambda: mlp() | {"v1": normal(6, 8, seed=4)})
def two_kernels_concatenated_along_their_out_axes(params, x):
    joint = x @ jnp.concatenate([params["w1"], params["v1"]], axis=1)
    return squared(jnp.tanh(joint[:, :8]) * joint[:, 8:] @ params["w2"] + params["b1"][:6])


@loss(projected="w", params=one)
def a_product_that_is_split_after_it(params, x):
    first, second = jnp.split(x @ params["w"], 2, axis=1)
    return squared(jnp.tanh(first) * second)


@loss(projected="w", params=lambda: {"w": normal(6, 8)})
def heads_split_by_a_reshape_of_the_kernel(params, x):
    return squared(jnp.einsum("nd,dhk->hnk", x, params["w"].reshape(6, 2, 4)))


@loss(
    projected="w",
    params=lambda: {"w": normal(6, 2, 4)},
    weight_dimension_numbers=GaLoreDimensionNumbers(0, (1, 2)),
)
def heads_stored_on_axes_of_their_own(params, x):
    return squared(jnp.einsum("nd,dhk->hnk", x, params["w"]))


@loss(
    projected="w",
    params=lambda: {"w": normal(6, 2, 4)},
    weight_dimension_numbers=GaLoreDimensionNumbers(0, (1, 2)),
)
def heads_merged_by_a_reshape_of_the_kernel(params, x):
    return squared(x @ params["w"].reshape(6, 8))


@loss(
    full="w",
    params=lambda: {"w": normal(6, 2, 4)},
    weight_dimension_numbers=GaLoreDimensionNumbers(0, (1, 2)),
)
def heads_repeated_for_groups_of_queries(params, x):
    repeated = jnp.repeat(params["w"], 2, axis=1)
    return squared(jnp.einsum("nd,dhk->hnk", x, repeated) * jnp.arange(4.0)[:, None, None])


def one_head():
    return {"k_proj": {"kernel": normal(6, 1, 8)}}


@loss(projected="k_proj/kernel", params=one_head)
def one_head_of_keys_repeated_for_all_queries(params, x):
    repeated = jnp.broadcast_to(params["k_proj"]["kernel"], (6, 3, 8))
    return squared(jnp.einsum("nd,dhk->nhk", x, repeated) * jnp.arange(3.0)[:, None])


@loss(projected="k_proj/kernel", params=one_head)
def one_head_of_keys_tiled_for_all_queries(params, x):
    repeated = jnp.tile(params["k_proj"]["kernel"], (1, 3, 1))
    return squared(jnp.einsum("nd,dhk->nhk", x, repeated) * jnp.arange(3.0)[:, None])


@loss(partly="k_proj/kernel", params=one_head)
def a_sum_over_no_heads(params, x):
    kernel = params["k_proj"]["kernel"]
    return squared(jnp.einsum("nd,dhk->nhk", x, kernel)) + jnp.sum(kernel[:, 1:])


@loss(
    projected="w",
    params=lambda: {"w": normal(2, 4, 6)},
    batch=lambda: (inputs(5, 2, 4),),
    weight_dimension_numbers=GaLoreDimensionNumbers((0, 1), 2),
)
def heads_contracted_together_with_their_size(params, x):
    return squared(jnp.einsum("nhk,hkd->nd", x, params["w"]))


@loss(
    projected="w",
    params=many,
    batch=lambda: (inputs(5, 3, 2),),
    weight_dimension_numbers=GaLoreDimensionNumbers((1, 0), (3, 2)),
)
def dimension_numbers_in_other_orders_than_the_product(params, x):
    return squared(jnp.einsum("nji,ijkl->nlk", x, params["w"]))


@loss(
    projected="w",
    params=many,
    batch=lambda: (inputs(5, 6),),
    weight_dimension_numbers=GROUPED,
)
def in_and_out_axes_each_merged_by_a_reshape(params, x):
    return squared(x @ params["w"].reshape(6, 8))


@loss(
    full="w",
    params=many,
    batch=lambda: (inputs(5, 12),),
    weight_dimension_numbers=GROUPED,
)
def a_reshape_that_mixes_in_and_out_axes(params, x):
    return squared(x @ params["w"].reshape(12, 4))


@loss(
    full="w",
    params=many,
    batch=lambda: (inputs(5, 3),),
    weight_dimension_numbers=GROUPED,
)
def a_product_that_contracts_only_one_of_two_in_axes(params, x):
    return squared(jnp.einsum("nj,ijkl->nikl", x, params["w"]))


@loss(
    full="w",
    params=lambda: {"w": normal(6, 2, 4)},
    batch=lambda: (inputs(5, 2, 6),),
    weight_dimension_numbers=GaLoreDimensionNumbers(0, (1, 2)),
)
def heads_that_each_read_inputs_of_their_own(params, x):
    return squared(jnp.einsum("nhd,dhk->nhk", x, params["w"]))


@loss(
    projected="w",
    params=lambda: {"w": normal(6, 2, 8)},
    batch=lambda: (inputs(5, 2, 6),),
    weight_dimension_numbers=GaLoreDimensionNumbers(0, 2),
)
def heads_as_a_batch_axis_in_the_middle(params, x):
    return squared(jnp.einsum("nhd,dhk->nhk", x, params["w"]))


@loss(full="w", params=lambda: {"w": normal(3, 6, 8)}, batch=lambda: (inputs(2, 7, 6),))
def a_convolution(params, x):
    y = jax.lax.conv_general_dilated(
        x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return squared(y)


@loss(
    full="embedding",
    params=lambda: {"embedding": normal(9, 6)},
    batch=lambda: (jnp.array([0, 3, 3, 8]),),
    rules={"embedding": Rule(rank=3)},
)
def an_embedding_that_a_rule_projects(params, tokens):
    return squared(params["embedding"][tokens])


@loss(
    partly="embedding",
    params=lambda: {"embedding": normal(9, 6)},
    batch=lambda: (jnp.array([0, 3, 3, 8]),),
    rules={"embedding": Rule(rank=3)},
)
def an_embedding_tied_to_the_output(params, tokens):
    return squared(jnp.tanh(params["embedding"][tokens]) @ params["embedding"].T)


@loss(
    projected="w1",
    params=lambda: mlp() | {"scale": normal(6)},
    rules={"w2": None},
)
def a_normalisation_next_to_a_kernel_that_a_rule_leaves_whole(params, x):
    x = params["scale"] * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return squared(network(params, x))


@loss(projected="w1 w2")
def comparisons_with_a_kernel(params, x):
    positive = jnp.where(params["w1"] > 0, x[:1].T, 1.0)
    largest = jnp.mean(params["w2"].argmax(axis=0))
    return squared(network(params, x)) * (jnp.mean(positive) + largest)


@loss(projected="w", params=one, batch=lambda: (inputs(0, 6),), zero=("w",))
def a_batch_without_rows(params, x):
    return jnp.sum(jnp.sin(x @ params["w"]))


@loss(projected="w1 w2", proj_type="full")
def kernels_projected_on_both_sides(params, x):
    return squared(network(params, x))


@loss(projected="w1 w2", proj_type="reverse_std")
def kernels_projected_on_their_larger_sides(params, x):
    return squared(network(params, x))


@loss(partly="w1 w2", proj_type="full")
def a_penalty_on_kernels_projected_on_both_sides(params, x):
    return squared(network(params, x)) + sum(jnp.sum(a**2) for a in jax.tree.leaves(params))


def heads():
    """Kernels of two heads, which the default view takes for a batch of matrices."""
    return {"w": normal(2, 6, 8)}


@loss(projected="w", params=heads, batch=lambda: (inputs(5, 2, 6),))
def a_sum_over_heads_whose_kernels_are_a_batch(params, x):
    return squared(jnp.einsum("tnh,nhd->td", x, params["w"]))


@loss(projected="w", params=heads, batch=lambda: (inputs(5, 2, 6),), proj_type="full")
def a_sum_over_heads_projected_on_both_sides(params, x):
    return squared(jnp.einsum("tnh,nhd->td", x, params["w"]))


@loss(projected="w", params=heads, batch=lambda: (inputs(5, 2, 6), inputs(5, 2)))
def a_weighted_sum_of_experts(params, x, weights):
    return squared(jnp.einsum("tkf,kfd,tk->td", x, params["w"], weights))


@loss(projected="w", params=heads)
def tiled_layers(params, x):
    return sum(squared(x @ layer) for layer in jnp.tile(params["w"], (2, 1, 1)))


@loss(projected="w", params=heads, batch=lambda: (inputs(4, 6),))
def indices_out_of_range_that_have_no_gradient(params, x):
    return squared(jnp.einsum("td,tdf->tf", x, params["w"][jnp.array([1, 1, 9, 0])]))
