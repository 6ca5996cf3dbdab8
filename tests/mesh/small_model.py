"""Twenty steps of a small model, with three refreshes, on one device or on a mesh."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax

STEPS, GAP = 20, 8
LAYERS, WIDTH, HIDDEN, VOCAB, BATCH, LENGTH = 2, 32, 64, 48, 16, 8
RULES = {"*/up": P(None, None, "tensor"), "*/down": P(None, "tensor", None)}


def make_mesh(sizes: dict[str, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def share_of_one_device(tree: Any) -> float:
    """The bytes on the first device relative to all bytes of the arrays, scalars aside."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    return held / sum(array.nbytes for array in arrays)


def init_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: (jax.random.normal(next(keys), shape) * shape[-2] ** -0.5).astype(dtype)
    return {
        "embed": {"embedding": normal(VOCAB, WIDTH)},
        "layers": {
            "mix": normal(LAYERS, WIDTH, WIDTH),
            "up": normal(LAYERS, WIDTH, HIDDEN),
            "down": normal(LAYERS, HIDDEN, WIDTH),
            "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
        },
        "head": normal(WIDTH, VOCAB),
    }


# On Explicit axes weights are gathered and activations divided by batch alone; else XLA decides.


def whole(array: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(array, P(*[None] * array.ndim)) if mesh.explicit_axes else array


def embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    rows = tuple(axis for axis in ("data", "fsdp") if axis in explicit)
    table = whole(params["embed"]["embedding"])
    return table.at[tokens].get(out_sharding=P(rows) if rows else None).astype(jnp.float32)


def block(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    layer = jax.tree.map(whole, layer)
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * layer["norm"]["scale"]
    mixed = jnp.cumsum(normed @ layer["mix"], axis=1) / LENGTH
    return x + jnp.tanh((normed + mixed) @ layer["up"]) @ layer["down"]


def head_loss(params: dict[str, Any], x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = (x @ whole(params["head"]))[:, :-1]
    chosen = jax.nn.one_hot(tokens[:, 1:], VOCAB)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * chosen, -1))


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = embed(params, tokens)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params["layers"])
    return head_loss(params, x, tokens)


MODEL = galore_jax.layerwise.LayeredModel(
    embed=lambda params, tokens: (embed(params, tokens), None),
    block=lambda layer, x, _: block(layer, x),
    head_loss=lambda params, x, tokens: (head_loss(params, x, tokens), None),
)


def batches() -> np.ndarray:
    """Tokens (steps, batch, length) of a process with something to learn."""
    random = np.random.RandomState(0)
    start = random.randint(0, VOCAB, (STEPS, BATCH, 1))
    step = random.randint(1, 4, (STEPS, BATCH, 1))
    return (start + step * np.arange(LENGTH)) % VOCAB


def train(
    mesh: Mesh | None,
    mode: str = "projected",
    *,
    make: Callable[..., Any] = galore_jax.adamw,
    over: tuple[str, ...] = (),
    steps: int = STEPS,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[float], Any, Any]:
    """Losses, parameters and state; on one device without a mesh.

    The mode says where gradients are projected: "projected" or "layerwise" in the backward pass,
    "full" or "layerwise full" by the optimizer. The options are those of `make_step`.
    """
    tx = make(0.02, rank=8, update_proj_gap=GAP, **settings)
    params = init_params()
    placed = lambda tokens: tokens
    if mesh is not None:
        rules = RULES if "tensor" in mesh.shape else {}
        params = jax.device_put(params, galore_jax.shardings(tx, params, mesh, rules))
        axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
        placed = functools.partial(jax.device_put, device=NamedSharding(mesh, P(axes)))
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    is_layerwise, projected = mode.startswith("layerwise"), "full" not in mode
    state = (galore_jax.layerwise if is_layerwise else galore_jax).init(tx, params, over=over)
    of = MODEL if is_layerwise else loss
    step_of = {
        due: jax.jit(
            galore_jax.make_step(of, tx, projected=projected, refreshes=due, **options or {}),
            donate_argnums=(0, 1),
        )
        for due in (False, True)
    }
    losses = []
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        for tokens in batches()[:steps]:
            # With full gradients, galore refreshes in the update.
            due = projected and bool(galore_jax.refresh_due(state))
            params, state, value = step_of[due](params, state, placed(jnp.asarray(tokens)))
            losses.append(float(value))
    return losses, params, state
