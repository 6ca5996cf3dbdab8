"""Kernels that hold several, split along their rows or columns before they are used."""

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from losses.table import Table, kernel, squared

CASES = Table()


def of_w(f):
    """A loss of one kernel and the batch."""
    return lambda params, *batch: squared(f(params["w"], *batch))


# Queries, keys and values of four features each, from six inputs.
fused = CASES.rows(of_w, params=kernel("w", 6, 12), projected="w")
# The same from the transposed kernel, whose rows are split.
transposed = CASES.rows(of_w, params=kernel("w", 12, 6), projected="w")


def attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def of_columns(w, x):
    return attention(*(x @ part for part in jnp.split(w, 3, axis=1)))


def of_rows(w, x):
    return attention(*(x @ part.T for part in jnp.split(w, 3)))


def of_inputs(w, x):
    return sum(jnp.tanh(x[:, part] @ w[part]) for part in (slice(0, 5), slice(5, 12)))


for sides in ("left", "right", "full"):
    fused(f"columns split by a basis of the side {sides}", of_columns, proj_type=sides)
    transposed(f"rows split by a basis of the side {sides}", of_rows, proj_type=sides)
    rows_of_inputs = f"rows that read parts of the inputs by a basis of the side {sides}"
    transposed(rows_of_inputs, of_inputs, (5, 12), proj_type=sides)
    block = f"a block of rows and columns by a basis of the side {sides}"
    fused(block, lambda w, x: x[:, 2:] @ w[2:, 1:8], proj_type=sides)
    narrow = f"columns fewer than the rank by a basis of the side {sides}"
    fused(narrow, lambda w, x: jnp.tanh(x @ w[:, 3:5]) * (x @ w[:, :3])[:, 1:], proj_type=sides)

thin = lambda w, x: jnp.sin(x @ w[:, 3]) * (jnp.tile(x, 2) @ w[2])
fused("a column and a row that are much fewer than the rank", thin, projected="", full="w")
gated = lambda gate, up: jax.nn.silu(gate) * up
interleaved = lambda w, x: gated(x @ w[:, ::2], x @ w[:, 1::2])
fused("gate and up in turns by strided slices", interleaved)
fused("columns in reversed order", lambda w, x: (x @ w[:, ::-1]) * jnp.arange(12.0))
fused("a kernel with all its columns twice", lambda w, x: x @ jnp.tile(w, (1, 2)))
fused("a slice of a slice", lambda w, x: x @ w[:, 2:][:, :7])
fused("a slice of the transposed kernel", lambda w, x: x @ w.T[4:9].T)
fused("a split kernel that is cast before and after", lambda w, x: x @ w.astype(float)[:, :5].T.T)
fused("columns split with bases in int8", of_columns, basis_dtype=jnp.int8)
fused("columns split from a kernel used as a whole", lambda w, x: x @ w[:, :6] @ w)
some = lambda w, x: x @ w[:, jnp.array([7, 0, 0, 3])]
fused("columns in any order by their indices", some, projected="", full="w")
rolled = lambda w, x: (x @ jnp.roll(w, 5, axis=1)) * jnp.arange(12.0)
fused("columns rotated by jnp roll", rolled, projected="", full="w")


def by_chunks(w, x):
    """The logarithm of a sum of exponentials over columns, four at a time."""
    logits = lambda start: x @ jax.lax.dynamic_slice_in_dim(w, start, 4, axis=1)
    body = lambda total, start: (total + jnp.exp(logits(start)).sum(axis=1), None)
    return jnp.log(jax.lax.scan(body, jnp.zeros(5), jnp.arange(0, 12, 4))[0])


fused("columns by chunks in a scan", by_chunks)
clamped = lambda w, x, start: x @ jax.lax.dynamic_slice_in_dim(w, start, 4, axis=1)
fused("columns by a dynamic slice that is clamped", clamped, (5, 6), 10)

# Three kernels of two heads of two features, on an axis between the sides.
three = {
    "params": kernel("w", 6, 3, 2, 2),
    "weight_dimension_numbers": GaLoreDimensionNumbers(0, (1, 2, 3)),
}
of_heads = CASES.rows(of_w, projected="w", **three)
by_head = lambda w, x: jnp.einsum("td,dnh->tnh", x, w)
of_heads("three kernels indexed", lambda w, x: by_head(w[:, 0], x) * by_head(w[:, 2], x))
iterated = lambda w, x: sum(jnp.tanh(by_head(part, x)) for part in jnp.unstack(w, axis=1))
of_heads("three kernels unstacked", iterated)
of_heads("one of three kernels by a traced index", lambda w, x, i: by_head(w[:, i], x), (5, 6), 2)
missing = lambda w, x, i: (
    by_head(w.at[:, i].get(mode="fill", fill_value=0), x) + by_head(w[:, 0], x)
)
of_heads("a kernel that is missing", missing, (5, 6), 3)
merged = lambda w, x: x @ w.reshape(6, 12)[:, 3:7]
of_heads("columns of heads merged by a reshape", merged)
split = lambda w, x: attention(
    *(x @ w.reshape(6, 2, 3, 2)[:, :, i].reshape(6, 4) for i in range(3))
)
fused("kernels in turns by head split by a reshape", split)
swapped = lambda w, x: jnp.einsum("td,hdn->tnh", x, w.transpose(3, 0, 1, 2)[:, :, 1])
of_heads("three kernels indexed after a transpose", swapped)


def scanned(ws, x):
    body = lambda x, w: (x + gated(x @ w[:, :6], x @ w[:, 6:]), None)
    return jax.lax.scan(body, x, ws)[0]


layers = CASES.rows(of_w, params=kernel("w", 3, 6, 12), projected="w")
layers("layers scanned whose kernels are split", scanned)
layers("layers split before the scan", lambda ws, x: scanned(ws[1:, :, ::-1], x), proj_type="full")
both = lambda ws, x, i, j: x @ ws[i, :, j]
layers("a column of a layer by two traced indices", both, (5, 6), 1, 7, rank=2)
pairs = lambda ws, x: x @ ws[jnp.array([0, 2]), :, jnp.array([3, 4])].T
layers("columns of layers by pairs of indices", pairs, projected="", full="w")
of_experts = lambda ws, x, i: jnp.tanh(x @ ws[i][:, :6]) @ ws[i][:, 6:]
layers("halves of a layer by a traced index", of_experts, (5, 6), 2)


@CASES.loss(partly="w", params=kernel("w", 6, 12))
def a_penalty_on_some_columns(params, x):
    return squared(x @ params["w"][:, :8]) + jnp.sum(params["w"][:, 4:] ** 2)
