"""Twenty steps of a small model, with three refreshes, on one device or on a mesh."""

import contextlib
import functools
from collections.abc import Callable
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


def block(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * layer["norm"]["scale"]
    mixed = jnp.cumsum(normed @ layer["mix"], axis=1) / LENGTH
    return x + jnp.tanh((normed + mixed) @ layer["up"]) @ layer["down"]


def loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = params["embed"]["embedding"][tokens].astype(jnp.float32)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params["layers"])
    logits = (x @ params["head"])[:, :-1]
    chosen = jax.nn.one_hot(tokens[:, 1:], VOCAB)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * chosen, -1))


# The same model, written for a mesh with Explicit axes: activations are divided by batch alone.


def _typed(array: jax.Array, *spec: Any) -> jax.Array:
    return jax.sharding.reshard(array, P(*spec))


def _batch_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.explicit_axes)


def typed_block(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    whole = jax.tree.map(lambda leaf: _typed(leaf, *[None] * leaf.ndim), layer)
    return block(whole, x)


def typed_embed(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    table = _typed(params["embed"]["embedding"], None, None)
    return table.at[tokens].get(out_sharding=P(_batch_axes())).astype(jnp.float32)


def typed_loss(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = typed_embed(params, tokens)
    x, _ = jax.lax.scan(lambda x, layer: (typed_block(layer, x), None), x, params["layers"])
    return _head_loss(_typed(params["head"], None, None), x, tokens)


TYPED_MODEL = galore_jax.layerwise.LayeredModel(
    embed=lambda params, tokens: (typed_embed(params, tokens), None),
    block=lambda layer, x, _: typed_block(layer, x),
    head_loss=lambda params, x, tokens: (
        _head_loss(_typed(params["head"], None, None), x, tokens),
        None,
    ),
)


def batches() -> np.ndarray:
    """Tokens (steps, batch, length) of a process with something to learn."""
    random = np.random.RandomState(0)
    start = random.randint(0, VOCAB, (STEPS, BATCH, 1))
    step = random.randint(1, 4, (STEPS, BATCH, 1))
    return (start + step * np.arange(LENGTH)) % VOCAB


MODEL = galore_jax.layerwise.LayeredModel(
    embed=lambda params, tokens: (params["embed"]["embedding"][tokens].astype(jnp.float32), None),
    block=lambda layer, x, _: block(layer, x),
    head_loss=lambda params, x, tokens: (_head_loss(params["head"], x, tokens), None),
)


def _head_loss(head, x, tokens):
    logits = (x @ head)[:, :-1]
    chosen = jax.nn.one_hot(tokens[:, 1:], VOCAB)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * chosen, -1))


def train(
    mesh: Mesh | None,
    mode: str = "projected",
    *,
    make: Callable[..., Any] = galore_jax.adamw,
    data_axes: tuple[str, ...] = (),
    over: tuple[str, ...] = (),
    micro_batches: int = 1,
    steps: int = STEPS,
    **settings: Any,
) -> tuple[list[float], Any, Any]:
    """Losses, parameters and state; on one device without a mesh.

    The mode says where gradients are projected: "projected" or "layerwise" in the backward pass,
    "full" or "layerwise full" by the optimizer.
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
    of, model = (typed_loss, TYPED_MODEL) if explicit else (loss, MODEL)
    options = {"data_axes": data_axes, "micro_batches": micro_batches}
    if mode.startswith("layerwise"):
        state = galore_jax.layerwise.init(tx, params, over=over)
        projected = {"projected": mode == "layerwise"}
        make_step = functools.partial(galore_jax.make_step, model, tx, **projected)
        steps_of = {
            flag: jax.jit(make_step(refreshes=flag), donate_argnums=(0, 1)) for flag in (0, 1)
        }
    else:
        state = galore_jax.init(tx, params, over=over)

    refresh = jax.jit(galore_jax.refresh(of, **options))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        if mode == "projected":
            value, grads = galore_jax.value_and_grad(of, **options)(params, state, tokens)
        else:
            value, grads = jax.value_and_grad(of)(params, tokens)
        return value, *galore_jax.apply_gradients(tx, grads, state, params)

    losses = []
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        for tokens in batches()[:steps]:
            tokens = placed(jnp.asarray(tokens))
            # Full gradients are refreshed from in the update.
            due = "full" not in mode and bool(galore_jax.refresh_due(state))
            if mode.startswith("layerwise"):
                params, state, value = steps_of[due](params, state, tokens)
            else:
                if due:
                    state = refresh(params, state, tokens)
                value, params, state = step(params, state, tokens)
            losses.append(float(value))
    return losses, params, state
