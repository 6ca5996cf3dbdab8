"""Products with kernels that are transposed, reshaped or contracted in part, on plain JAX."""

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from galore_jax import Rule
from losses.table import Table, given, kernel, mlp, network, normal, output, squared, sum_of_squares

CASES = Table()
loss = CASES.loss


def of_w(f):
    """A loss of one kernel and the batch."""
    return lambda params, *batch: squared(f(params["w"], *batch))


# A kernel of 6 × 8.
one = kernel("w", 6, 8)
projected = CASES.rows(of_w, params=one, projected="w")
full = CASES.rows(of_w, params=one, full="w")

projected("a single input without a batch axis", lambda w, x: x @ w, (6,))
projected("activations with three batch axes", lambda w, x: x @ w, (2, 3, 5, 6))
projected("a kernel on the left contracted on its in axis", lambda w, x: w.T @ x, (6, 5))
projected("a kernel on the left contracted on its out axis", lambda w, x: w @ x, (8, 5))
projected("a kernel transposed on the right", lambda w, x: x @ w.T, (5, 8))
transposed = lambda w: w.T.astype(jnp.float32).swapaxes(0, 1).mT
projected("a kernel transposed three times", lambda w, x: x @ transposed(w), (5, 8))
features_first = lambda w, x: jnp.einsum("dbn,do->obn", x, w)
projected("features on the first axis of the activations", features_first, (6, 2, 5))
projected("a kernel used for inputs and tied for outputs", lambda w, x: jnp.tanh(x @ w) @ w.T)
bilinear = lambda w, x, y: jnp.einsum("ni,io,mo->nm", x, w, y)
projected("a bilinear form by einsum", bilinear, (5, 6), (7, 8))
full("a kernel contracted on both its axes", lambda w, x: jnp.tensordot(x, w, 2), (5, 6, 8))
full("an outer product with a kernel", lambda w, x: jnp.tensordot(x, w, 0), (5,))
full("an elementwise product summed by hand", lambda w, x: jnp.sum(x[:, :, None] * w, axis=1))

indexed = lambda w, x: x @ w[:, None, :].squeeze(1)[None][0]
projected("axes of one inserted and removed by indices", indexed)
reshaped = lambda w, x: x @ w[None].reshape(6, 1, 8).reshape(6, 8)
projected("axes of one inserted and removed by reshapes", reshaped)
broadcast = lambda w, x: jnp.einsum("bni,bio->bno", x, jnp.broadcast_to(w, (3, 6, 8)))
projected("a kernel broadcast over the batch", broadcast, (3, 5, 6))
tiled = lambda w, x: x @ jnp.tile(w.reshape(1, 6, 8), (3, 1, 1))
projected("a kernel tiled over the batch", tiled, (3, 5, 6))
split = lambda w, x: jnp.einsum("nd,dhk->hnk", x, w.reshape(6, 2, 4))
projected("heads split by a reshape of the kernel", split)

square = kernel("w", 6, 6)
projected("a kernel used twice", lambda w, x: jnp.tanh(x @ w) @ w, params=square)
full("the square of a kernel", lambda w, x: x @ (w @ w), params=square)
solved = lambda w, x: jnp.linalg.solve(w + 3 * jnp.eye(6), x)
full("a linear system with a kernel", solved, (6, 5), params=square)


@loss(projected="w", params=one)
def a_kernel_repeated_along_an_axis_of_one_between_its_sides(params, x):
    repeated = jnp.broadcast_to(params["w"].reshape(6, 1, 8), (6, 3, 8))
    return squared(jnp.einsum("nd,dhk->nhk", x, repeated) * jnp.arange(3.0)[:, None])


@loss(projected="w", params=one)
def a_product_that_is_split_after_it(params, x):
    first, second = jnp.split(x @ params["w"], 2, axis=1)
    return squared(jnp.tanh(first) * second)


@loss(full="w1 w2")
def a_product_of_two_kernels(params, x):
    return squared(x @ (params["w1"] @ params["w2"]) + params["b1"][:6])


@loss(projected="w1", params=lambda: {"w1": normal(6, 8), "c": normal(8)})
def the_product_of_a_kernel_with_a_parameter_of_one_axis(params, x):
    return squared(x @ (params["w1"] @ params["c"]))


@loss(full="w1 v1", projected="w2", params=lambda: mlp() | {"v1": normal(6, 8, seed=4)})
def two_kernels_concatenated_along_their_out_axes(params, x):
    joint = x @ jnp.concatenate([params["w1"], params["v1"]], axis=1)
    return squared(jnp.tanh(joint[:, :8]) * joint[:, 8:] @ params["w2"] + params["b1"][:6])


# A kernel whose out features are two heads.
heads = {
    "params": kernel("w", 6, 2, 4),
    "weight_dimension_numbers": GaLoreDimensionNumbers(0, (1, 2)),
}
stored = lambda w, x: jnp.einsum("nd,dhk->hnk", x, w)
projected("heads stored on axes of their own", stored, **heads)
projected("heads merged by a reshape of the kernel", lambda w, x: x @ w.reshape(6, 8), **heads)
of_each = lambda w, x: jnp.einsum("nhd,dhk->nhk", x, w)
full("heads that each read inputs of their own", of_each, (5, 2, 6), **heads)


@loss(full="w", **heads)
def heads_repeated_for_groups_of_queries(params, x):
    repeated = jnp.repeat(params["w"], 2, axis=1)
    return squared(jnp.einsum("nd,dhk->hnk", x, repeated) * jnp.arange(4.0)[:, None, None])


middle = {"params": kernel("w", 6, 2, 8), "weight_dimension_numbers": GaLoreDimensionNumbers(0, 2)}
projected("heads as a batch axis in the middle", of_each, (5, 2, 6), **middle)
contracted = lambda w, x: jnp.einsum("nhk,hkd->nd", x, w)
out = {
    "params": kernel("w", 2, 4, 6),
    "weight_dimension_numbers": GaLoreDimensionNumbers((0, 1), 2),
}
projected("heads contracted together with their size", contracted, (5, 2, 4), **out)


# One head of keys.
head = kernel("kernel", 6, 1, 8)
for_all_queries = CASES.rows(
    lambda repeat: (
        lambda params, x: squared(
            jnp.einsum("nd,dhk->nhk", x, repeat(params["k_proj"]["kernel"]))
            * jnp.arange(3.0)[:, None]
        )
    ),
    params=lambda: {"k_proj": head()},
    projected="k_proj/kernel",
)
repeated = lambda w: jnp.broadcast_to(w, (6, 3, 8))
for_all_queries("one head of keys repeated for all queries", repeated)
for_all_queries("one head of keys tiled for all queries", lambda w: jnp.tile(w, (1, 3, 1)))


@loss(partly="k_proj/kernel", params=lambda: {"k_proj": head()})
def a_sum_over_no_heads(params, x):
    kernel = params["k_proj"]["kernel"]
    return squared(jnp.einsum("nd,dhk->nhk", x, kernel)) + jnp.sum(kernel[:, 1:])


# A kernel that reads 2 × 3 features and writes 2 × 4.
many = {
    "params": kernel("w", 2, 3, 2, 4),
    "weight_dimension_numbers": GaLoreDimensionNumbers((0, 1), (2, 3)),
}
merged = lambda w, x: x @ w.reshape(6, 8)
projected("in and out axes each merged by a reshape", merged, (5, 6), **many)
full("a reshape that mixes in and out axes", lambda w, x: x @ w.reshape(12, 4), (5, 12), **many)
one_axis = lambda w, x: jnp.einsum("nj,ijkl->nikl", x, w)
full("a product that contracts only one of two in axes", one_axis, (5, 3), **many)
reordered = lambda w, x: jnp.einsum("nji,ijkl->nlk", x, w)
many["weight_dimension_numbers"] = GaLoreDimensionNumbers((1, 0), (3, 2))
projected("dimension numbers in other orders than the product", reordered, (5, 3, 2), **many)

# Two heads, which the default view takes for a batch of matrices.
two = {"params": kernel("w", 2, 6, 8)}
summed = lambda w, x: jnp.einsum("tnh,nhd->td", x, w)
projected("a sum over heads whose kernels are a batch", summed, (5, 2, 6), **two)
projected("a sum over heads projected on both sides", summed, (5, 2, 6), **two, proj_type="full")
weighted = lambda w, x, weights: jnp.einsum("tkf,kfd,tk->td", x, w, weights)
projected("a weighted sum of experts", weighted, (5, 2, 6), (5, 2), **two)
out_of_range = lambda w, x: jnp.einsum("td,tdf->tf", x, w[jnp.array([1, 1, 9, 0])])
projected("indices out of range that have no gradient", out_of_range, (4, 6), **two)


@loss(projected="w", **two)
def tiled_layers(params, x):
    return sum(squared(x @ layer) for layer in jnp.tile(params["w"], (2, 1, 1)))


convolved = lambda w, x: jax.lax.conv_general_dilated(
    x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
)
full("a convolution", convolved, (2, 7, 6), params=kernel("w", 3, 6, 8))


embedding = {
    "params": kernel("embedding", 9, 6),
    "batch": lambda: (jnp.array([0, 3, 3, 8]),),
    "rules": {"embedding": Rule(rank=3)},
}


@loss(full="embedding", **embedding)
def an_embedding_that_a_rule_projects(params, tokens):
    return squared(params["embedding"][tokens])


@loss(partly="embedding", **embedding)
def an_embedding_tied_to_the_output(params, tokens):
    return squared(jnp.tanh(params["embedding"][tokens]) @ params["embedding"].T)


@loss(projected="w1", params=lambda: mlp() | {"scale": normal(6)}, rules={"w2": None})
def a_normalisation_next_to_a_kernel_that_a_rule_leaves_whole(params, x):
    x = params["scale"] * x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return squared(network(params, x))


@loss(projected="w1 w2")
def comparisons_with_a_kernel(params, x):
    positive = jnp.where(params["w1"] > 0, x[:1].T, 1.0)
    largest = jnp.mean(params["w2"].argmax(axis=0))
    return squared(network(params, x)) * (jnp.mean(positive) + largest)


@loss(projected="w", params=one, batch=given(0, 6), zero=("w",))
def a_batch_without_rows(params, x):
    return jnp.sum(jnp.sin(x @ params["w"]))


whole = CASES.rows(output, projected="w1 w2")
whole("kernels projected on both sides", network, proj_type="full")
whole("kernels projected on their larger sides", network, proj_type="reverse_std")


@loss(partly="w1 w2", proj_type="full")
def a_penalty_on_kernels_projected_on_both_sides(params, x):
    return squared(network(params, x)) + sum_of_squares(params)
