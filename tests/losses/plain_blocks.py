"""Blocks of current models, with kernels of the shapes in Flax, MaxText and Tunix."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from optax.contrib import GaLoreDimensionNumbers as Numbers

from losses.table import Table, filled, given, squared

CASES = Table()

# Sizes by letter: features, query and kv heads, their size, hidden features, experts, layers.
D, N, K, H, F, E, L = 8, 4, 2, 4, 12, 3, 2


def shaped(**shapes):
    """Parameters of these shapes."""
    own = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return lambda: filled(own)


def block(params, batch=(2, 5, D), **settings):
    """Declares a block: all its kernels are projected."""
    return CASES.loss(
        params=params,
        batch=given(*batch),
        projected=" ".join(name for name, leaf in params().items() if leaf.ndim > 1),
        rank=2,
        **settings,
    )


def normed(x, scale=None):
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x if scale is None else x * (1 + scale)


def rotated(x):
    """Heads (batch, length, heads, size) by rotary positions."""
    first, second = jnp.split(x, 2, axis=-1)
    angle = jnp.arange(x.shape[1])[:, None, None] * 0.5 ** jnp.arange(first.shape[-1])
    turned = (jnp.cos(angle) * first - jnp.sin(angle) * second), jnp.cos(angle) * second + first
    return jnp.concatenate(turned, axis=-1)


def attended(q, k, v, cap=None, window=None):
    """Causal attention of groups of heads (batch, length, heads, size)."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    seen = seen if window is None else seen & jnp.triu(seen, 1 - window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    return mixed.reshape(*q.shape[:3], v.shape[-1])


# Gemma in Flax and Tunix: heads before the features, keys and values in one kernel.
gemma = {
    "scale": (D,),
    "q_einsum": (N, D, H),
    "kv_einsum": (2, K, D, H),
    "attn_vec_einsum": (N, H, D),
    "gate_proj": (D, F),
    "up_proj": (D, F),
    "down_proj": (F, D),
}
# One matrix for all heads in place of one for each.
of_all_heads = {name: Numbers(0, 1) if "proj" in name else None for name in gemma} | {
    "q_einsum": Numbers(1, (0, 2)),
    "kv_einsum": Numbers(2, (0, 1, 3)),
    "attn_vec_einsum": Numbers((0, 1), 2),
}


def a_block_of_gemma(p, x):
    h = normed(x, p["scale"])
    q = normed(jnp.einsum("btd,ndh->btnh", h, p["q_einsum"]))
    k, v = jnp.einsum("bsd,ckdh->cbskh", h, p["kv_einsum"])
    mixed = attended(rotated(q), rotated(normed(k)), v, cap=5.0, window=3)
    x = x + normed(jnp.einsum("btnh,nhd->btd", mixed, p["attn_vec_einsum"]))
    h = normed(x)
    x = x + normed((jax.nn.gelu(h @ p["gate_proj"]) * (h @ p["up_proj"])) @ p["down_proj"])
    return squared(x)


def a_block_of_gemma_with_one_matrix_for_all_heads(p, x):
    return jax.checkpoint(a_block_of_gemma)(p, x)


block(shaped(**gemma))(a_block_of_gemma)
whole = block(shaped(**gemma), weight_dimension_numbers=of_all_heads)
whole(a_block_of_gemma_with_one_matrix_for_all_heads)

# The gate and the hidden features of Gemma in one kernel, in either order of its axes.
gated = {"gating_einsum": (2, D, F), "transposed_gating_einsum": (2, F, D), "linear": (F, D)}


@block(shaped(**gated))
def gating_einsums_indexed_and_whole(p, x):
    h = jax.nn.gelu(x @ p["gating_einsum"][0]) * (x @ p["gating_einsum"][1])
    gate, up = jnp.einsum("btd,cfd->cbtf", x, p["transposed_gating_einsum"])
    return squared((h + jax.nn.gelu(gate) * up) @ p["linear"])


# Qwen in Tunix, with a mixture of experts.
qwen = {
    "q_proj": (D, N, H),
    "k_proj": (D, K, H),
    "v_proj": (D, K, H),
    "q_bias": (N * H,),
    "o_proj": (N, H, D),
    "router": (D, E),
    "gate": (E, D, F),
    "up": (E, D, F),
    "down": (E, F, D),
}
of_qwen = {name: Numbers(0, (1, 2)) for name in ("q_proj", "k_proj", "v_proj")}
of_qwen |= {"o_proj": Numbers((0, 1), 2), "q_bias": None}
of_qwen |= {name: Numbers(-2, -1) for name in ("router", "gate", "up", "down")}


def routed(p, x):
    """The two experts of each token, and their weights."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    return weights / weights.sum(axis=-1, keepdims=True), chosen


def expert(p, x, multiply, parts=("gate", "up", "down")):
    gate, up, down = (p[name] for name in parts)
    return multiply(jax.nn.silu(multiply(x, gate)) * multiply(x, up), down)


@block(shaped(**qwen), weight_dimension_numbers=of_qwen)
def a_block_of_qwen_with_experts_by_ragged_dot(p, x):
    h = normed(x)
    q = jnp.einsum("btd,dnh->btnh", h, p["q_proj"]) + p["q_bias"].reshape(N, H)
    k = normed(jnp.einsum("bsd,dkh->bskh", h, p["k_proj"]))
    v = jnp.einsum("bsd,dkh->bskh", h, p["v_proj"])
    mixed = attended(rotated(normed(q)), rotated(k), v)
    x = x + jnp.einsum("btnh,nhd->btd", mixed, p["o_proj"])
    tokens = normed(x).reshape(-1, D)
    weights, chosen = routed(p, tokens)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=E)
    ragged = lambda x, w: jax.lax.ragged_dot(x, w, sizes)
    y = expert(p, jnp.repeat(tokens, 2, axis=0)[order], ragged)
    y = y[jnp.argsort(order)].reshape(-1, 2, D)
    return squared(x + jnp.einsum("tcd,tc->td", y, weights).reshape(x.shape))


@block(shaped(**{name: qwen[name] for name in ("router", "gate", "up", "down")}))
def experts_one_by_one_with_a_dispatch_mask(p, x):
    weights, chosen = routed(p, x)
    mask = jax.nn.one_hot(chosen, E)
    fed = jnp.einsum("btd,btce->bted", x, mask)
    one = lambda e: {name: p[name][e] for name in ("gate", "up", "down")}
    y = jnp.stack([expert(one(e), fed[:, :, e], jnp.matmul) for e in range(E)], axis=2)
    return squared(jnp.einsum("bted,btce,btc->btd", y, mask, weights))


# DeepSeek in MaxText: latent attention by products of low rank, a mixture of experts with a
# capacity beside one that all tokens share, and layers on the second axis.
Q, KV, ROPE, V = 6, 5, 2, 3
deepseek = {
    "wq_a": (D, L, Q),
    "wq_b": (Q, L, N, H + ROPE),
    "wkv_a": (D, L, KV + ROPE),
    "wkv_b": (KV, L, N, H + V),
    "out": (N, L, V, D),
    "router": (D, L, E),
    "wi_0": (E, L, D, F),
    "wi_1": (E, L, D, F),
    "wo": (E, L, F, D),
    "shared_0": (D, L, F),
    "shared_1": (D, L, F),
    "shared_o": (F, L, D),
}
of_deepseek = {name: Numbers(0, -1) for name in deepseek}
of_deepseek |= {name: Numbers(0, (-2, -1)) for name in ("wq_b", "wkv_b")}
of_deepseek |= {name: Numbers(-2, -1) for name in ("wi_0", "wi_1", "wo")}
of_deepseek["out"] = Numbers((0, -2), -1)


def latent_attention(p, x):
    q = jnp.einsum("btq,qnh->btnh", normed(x @ p["wq_a"]), p["wq_b"])
    q = jnp.concatenate([q[..., :H], rotated(q[..., H:])], axis=-1)
    low = checkpoint_name(x @ p["wkv_a"], "low")
    shared = jnp.repeat(rotated(low[..., None, KV:]), N, axis=2)
    kv = jnp.einsum("bsc,cnh->bsnh", normed(low[..., :KV]), p["wkv_b"])
    k = jnp.concatenate([kv[..., :H], shared], axis=-1)
    return jnp.einsum("btnv,nvd->btd", attended(q, k, kv[..., H:]), p["out"])


def capacity_experts(p, x, capacity=3):
    weights, chosen = routed(p, x)
    mask = jax.nn.one_hot(chosen, E)
    place = jnp.cumsum(mask.astype(int), axis=1) - 1
    place = jax.nn.one_hot(place, capacity) * mask[..., None]
    combine = jnp.einsum("bskec,bsk->bsec", place, weights)
    fed = jnp.einsum("bsd,bsec->ebcd", x, combine > 0)
    multiply = lambda x, w: jnp.einsum("ebcm,emh->ebch", x, w)
    return jnp.einsum("ebcd,bsec->bsd", expert(p, fed, multiply, ("wi_0", "wi_1", "wo")), combine)


@block(shaped(**deepseek), weight_dimension_numbers=of_deepseek)
def layers_of_deepseek_on_the_second_axis(p, x):
    def layer(x, p):
        x = x + latent_attention(p, normed(x))
        h = normed(x)
        shared = expert(p, h, jnp.matmul, ("shared_0", "shared_1", "shared_o"))
        return x + shared + capacity_experts(p, h), None

    saved = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("low"))
    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), p)
    return squared(jax.lax.scan(saved, x, layers)[0])


# Fused kernels in MaxText, whose products are split, and the same split before.
maxtext = {"qkv_proj": (D, 3, N, H), "wi": (D, 2, F), "wo": (F, D)}
of_maxtext = {"qkv_proj": Numbers(0, (1, 2, 3)), "wi": Numbers(0, (1, 2)), "wo": Numbers(0, 1)}


def fused(in_three, in_two):
    def loss(p, x):
        q, k, v = in_three(normed(x), p["qkv_proj"])
        gate, up = in_two(attended(q, k, v).reshape(*x.shape[:2], -1)[..., :D] + x, p["wi"])
        return squared((jax.nn.silu(gate) * up) @ p["wo"])

    return loss


after = lambda x, w: jnp.unstack(jnp.einsum("btd,dc...->btc...", x, w), axis=2)
before = lambda x, w: [jnp.einsum("btd,d...->bt...", x, w[:, i]) for i in range(w.shape[1])]
for name, split in (("after", after), ("before", before)):
    loss = fused(split, split)
    loss.__name__ = f"fused_kernels_that_are_split_{name}_their_products"
    block(shaped(**maxtext), weight_dimension_numbers=of_maxtext)(loss)
