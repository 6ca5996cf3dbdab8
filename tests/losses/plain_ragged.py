"""Experts of groups of tokens, multiplied by `lax.ragged_dot` or by hand."""

import jax
import jax.numpy as jnp
from optax.contrib import GaLoreDimensionNumbers

from losses.table import Table, given, kernel, normal, squared

CASES = Table()


def of_experts(f):
    """A loss of the experts' kernels, the tokens and the sizes of their groups."""
    return lambda params, *batch: squared(f(params["ws"], *batch))


def ragged_dot(ws, x, sizes, **options):
    return jax.lax.ragged_dot(x, ws, sizes, **options)


tokens, sizes = (7, 6), [2, 0, 5]
experts = CASES.rows(of_experts, params=kernel("ws", 3, 6, 8), projected="ws")
for sides in ("left", "right", "full"):
    name = f"experts of groups of tokens by a basis of the side {sides}"
    experts(name, ragged_dot, tokens, sizes, proj_type=sides)
experts("tokens of no expert", ragged_dot, tokens, [2, 1, 1])
experts("transposed experts", lambda ws, x, n: ragged_dot(ws.mT, x, n), (7, 8), sizes)
experts("experts with bases in int8", ragged_dot, tokens, sizes, basis_dtype=jnp.int8)
experts("experts in another order", lambda ws, x, n: ragged_dot(ws[::-1], x, n), tokens, sizes)
halves = lambda ws, x, n: ragged_dot(ws[:, :, :3], x, n) * ragged_dot(ws[:, :, 5:], x, n)
experts("experts that are split", halves, tokens, sizes)
of_bfloat16 = lambda ws, x, n: ragged_dot(
    ws.astype(jnp.bfloat16), x.astype(jnp.bfloat16), n, preferred_element_type=jnp.float32
)
experts("experts in bfloat16", of_bfloat16, tokens, sizes, tolerance=2e-2)


def by_numbers(middle, group, batch=((), ())):
    """Numbers of a ragged product of experts whose sides are in any order."""
    return jax.lax.RaggedDotDimensionNumbers((middle, batch), [0], [group])


general = jax.lax.ragged_dot_general
two_heads = lambda ws, x, n: general(x, ws, n, by_numbers(((1, 2), (3, 1)), 0))
experts(
    "experts whose in side has two axes",
    two_heads,
    (7, 2, 3),
    sizes,
    params=kernel("ws", 3, 3, 8, 2),
    weight_dimension_numbers=GaLoreDimensionNumbers((3, 1), 2),
)
in_the_middle = lambda ws, x, n: general(x, ws, n, by_numbers(((1,), (0,)), 1))
numbers = GaLoreDimensionNumbers(0, 2)
middle = {"params": kernel("ws", 6, 3, 8), "weight_dimension_numbers": numbers}
experts("experts on an axis in the middle", in_the_middle, tokens, sizes, **middle)
by_vmap = lambda ws, x, n: jax.vmap(ragged_dot)(ws, x, n)
two = {"params": kernel("ws", 2, 3, 6, 8), "full": "ws", "projected": ""}
experts("experts of two mixtures by vmap", by_vmap, (2, 7, 6), [sizes, [3, 3, 1]], **two)


def layers(ws, x, n):
    body = lambda h, w: (jnp.tanh(ragged_dot(w, h, n)), None)
    return jax.lax.scan(jax.checkpoint(body), x, ws)[0]


experts("experts of layers scanned", layers, tokens, sizes, params=kernel("ws", 2, 3, 6, 6))


last, split = GaLoreDimensionNumbers(-2, -1), GaLoreDimensionNumbers(1, (2, 3))


@CASES.loss(
    projected="gate_up down router",
    params=lambda: {"gate_up": normal(3, 6, 2, 8), "down": normal(3, 8, 6), "router": normal(6, 3)},
    batch=given(5, 6),
    weight_dimension_numbers=lambda params: {**dict.fromkeys(params, last), "gate_up": split},
    rank=2,
)
def a_mixture_of_experts_by_sorted_tokens(params, x):
    """Each token goes to two of three experts."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=3)
    of_expert = x[order // 2]
    gate, up = (ragged_dot(params["gate_up"][:, :, i], of_expert, sizes) for i in range(2))
    y = ragged_dot(params["down"], jax.nn.silu(gate) * up, sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(5, 2, 6)
    return squared(jnp.einsum("tkd,tk->td", y, weights))
