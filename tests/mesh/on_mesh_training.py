"""Training on meshes of 8 devices equals training on one."""

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import GaLoreDimensionNumbers as Numbers
from pairwise import pairwise
from projected import compared
from small_model import (
    BATCH,
    LENGTH,
    RULES,
    VOCAB,
    WIDTH,
    batches,
    init_params,
    loss,
    make_mesh,
    train,
)
from test_integrations import run

import galore_jax
from galore_jax.models.layers import attention_mask, causal_attention
from galore_jax.optim import adam8bit
from galore_jax.training.mesh import ACTIVATIONS

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "hybrid": {"data": 2, "fsdp": 2, "tensor": 2},
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Rounding in another order moves a loss by a few units in its last place, 2.4e-7 each, and the
# following losses by up to ten times as much; where it changes an 8-bit code, by more.
EXACT, EIGHT_BIT = 1e-5, 1e-3


@functools.cache
def on_one_device(mode="projected", **settings):
    return train(None, mode, **settings)[0]


def assert_equal_losses(losses, expected, bound=EXACT):
    assert expected[-1] < 0.4 * expected[0]
    assert np.abs(np.subtract(losses, expected)).max() <= bound


MODES = ("projected", "full", "layerwise")
OPTIMIZERS = {
    "adamw": ({}, EXACT),
    "muon": ({"make": galore_jax.muon}, EXACT),
    "rotate": ({"moments": "rotate"}, 1e-4),
    "8 bits": ({"eight_bit": True, "basis_dtype": "int8"}, EIGHT_BIT),
}


@pytest.mark.parametrize(
    ("mesh", "axis_type", "mode", "optimizer"),
    pairwise(MESHES, (AUTO, EXPLICIT), MODES, OPTIMIZERS),
    ids=str,
)
def test_losses_are_those_of_one_device(mesh, axis_type, mode, optimizer, monkeypatch):
    monkeypatch.setattr(adam8bit, "MIN_QUANTIZED_SIZE", 256)
    settings, bound = OPTIMIZERS[optimizer]
    losses, _, state = train(make_mesh(MESHES[mesh], axis_type), mode, **settings)
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    assert len(codes) == (8 if optimizer == "8 bits" else 0)
    assert_equal_losses(losses, on_one_device(mode, **settings), bound)


@pytest.mark.parametrize(
    ("mesh", "axis_type", "mode"), [("fsdp", AUTO, "full"), ("hybrid", EXPLICIT, "layerwise full")]
)
@pytest.mark.parametrize("make", [galore_jax.fira, galore_jax.apollo])
def test_steps_along_full_gradients_are_those_of_one_device(make, mesh, axis_type, mode):
    losses, *_ = train(make_mesh(MESHES[mesh], axis_type), mode, make=make)
    assert_equal_losses(losses, on_one_device(mode, make=make))


@pytest.mark.parametrize(
    ("mesh", "axis_type", "over", "micro_batches"),
    pairwise(("data", "hybrid"), (AUTO, EXPLICIT), ((), ("data",)), (1, 2)),
    ids=str,
)
def test_one_reduction_per_step_gives_the_losses_of_one_device(
    mesh, axis_type, over, micro_batches
):
    options = {"data_axes": ("data",), "micro_batches": micro_batches}
    losses, *_ = train(make_mesh(MESHES[mesh], axis_type), over=over, options=options)
    assert_equal_losses(losses, on_one_device())


def test_exact_refreshes_divide_whole_matrices_among_devices():
    losses, *_ = train(make_mesh({"data": 4, "fsdp": 2}), "full", refresh="svd")
    assert_equal_losses(losses, on_one_device("full", refresh="svd"))


@pytest.mark.parametrize("mode", ["projected", "layerwise"])
def test_a_step_leaves_everything_where_it_lies(mode):
    mesh = make_mesh(MESHES["hybrid"])
    options = {"over": ("data",), "moments": "rotate"}
    before, after = (train(mesh, mode, steps=steps, **options)[1:] for steps in (0, 2))
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


# A Flax model whose parameters are in boxes.

INIT = nn.initializers.lecun_normal()


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, embedding_init=nn.with_partitioning(INIT, ("tensor", None)))
        x = embed(tokens)
        for _ in range(2):
            up = nn.Dense(64, kernel_init=nn.with_partitioning(INIT, (None, "tensor")))
            down = nn.Dense(WIDTH, kernel_init=nn.with_logical_partitioning(INIT, ("mlp", "model")))
            x = x + down(nn.tanh(up(nn.LayerNorm()(jnp.cumsum(x, axis=1) / LENGTH + x))))
        return nn.Dense(VOCAB, name="head")(x)


def boxed_loss(params, tokens):
    logits = Boxed().apply({"params": nn.meta.unbox(params)}, tokens)[:, :-1]
    chosen = jax.nn.one_hot(tokens[:, 1:], VOCAB)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(logits * chosen, -1))


def train_boxed(mesh, mode):
    tx = galore_jax.adamw(0.02, rank=8, update_proj_gap=8)
    params = Boxed().init(jax.random.key(0), jnp.zeros((BATCH, LENGTH), jnp.int32))["params"]
    placed = lambda tokens: tokens
    if mesh is not None:
        with nn.logical_axis_rules([("mlp", "tensor"), ("model", None)]):
            shardings = galore_jax.shardings(tx, params, mesh)
        params = jax.device_put(params, shardings)
        placed = functools.partial(jax.device_put, device=NamedSharding(mesh, P(("data", "fsdp"))))
    state = galore_jax.init(tx, params)
    projected = mode == "projected"

    def compiled(refreshes):
        step = galore_jax.make_step(boxed_loss, tx, projected=projected, refreshes=refreshes)
        run = lambda *arguments: tuple(step(*arguments))
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            # Flax's layers do not know sharding types.
            types = jax.tree.map(lambda leaf: leaf.sharding.spec, (params, state))
            run = jax.sharding.auto_axes(run, out_sharding=(*types, P()))
        return jax.jit(run)

    steps, losses = {flag: compiled(flag) for flag in (False, True)}, []
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for tokens in batches():
            due = projected and bool(galore_jax.refresh_due(state))
            params, state, value = steps[due](params, state, placed(jnp.asarray(tokens)))
            losses.append(float(value))
    return losses, params, state


@pytest.mark.parametrize(("axis_type", "mode"), [(AUTO, "projected"), (EXPLICIT, "full")], ids=str)
def test_a_boxed_flax_model_trains_as_on_one_device(axis_type, mode):
    losses, params, state = train_boxed(make_mesh(MESHES["hybrid"], axis_type), mode)
    assert_equal_losses(losses, train_boxed(None, mode)[0])
    # The specs of the boxes are honoured, and "fsdp" divides their parts further.
    for name, spec in (
        ("Dense_0", P(None, ("tensor", "fsdp"))),
        ("Dense_1", P(("tensor", "fsdp"))),
    ):
        kernel = params[name]["kernel"].value
        assert kernel.sharding.is_equivalent_to(NamedSharding(kernel.sharding.mesh, spec), 2)
    moments = state.inner_states[1].mu["Dense_0"]["kernel"].value
    assert moments.addressable_shards[0].data.size == moments.size // 4


def test_a_step_is_compiled_once_for_the_first_state_and_for_its_own():
    tx = galore_jax.adamw(0.02, rank=8)
    params = init_params()
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    params = jax.device_put(params, galore_jax.shardings(tx, params, mesh, RULES))
    state = galore_jax.init(tx, params)
    step = jax.jit(galore_jax.make_step(loss, tx), donate_argnums=(0, 1))
    for tokens in batches()[:2]:
        params, state, _ = step(params, state, tokens)
    assert step._cache_size() == 1


# The optimizer of Flax NNX, as in docs/integrations.md.


def test_flax_nnx_trains_with_a_divided_state_as_on_one_device():
    names = run("flax_nnx")
    tx, (x, y) = names["tx"], names["batches"][0]
    placed = optax.GradientTransformationExtraArgs(
        functools.partial(galore_jax.init, tx), tx.update
    )
    mesh = make_mesh({"fsdp": 8})
    values = []
    for on_mesh in (False, True):
        model = nnx.clone(names["model"])
        if on_mesh:
            params = nnx.state(model, nnx.Param)
            shardings = galore_jax.shardings(tx, params, mesh)
            nnx.update(model, jax.device_put(params, shardings))
            x, y = jax.device_put((x, y), NamedSharding(mesh, P("fsdp")))
        with jax.set_mesh(mesh):
            optimizer = nnx.Optimizer(model, placed, wrt=nnx.Param)
            names["new_bases"](model, optimizer, x, y)
            values += [[float(names["projected_step"](model, optimizer, x, y)) for _ in range(3)]]
    for one, other in zip(*values, strict=True):
        assert abs(one - other) < 1e-5
    moments = optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu")["layers"][0]["kernel"].value
    assert moments.shape == (16, 256)
    assert moments.sharding.spec == P(None, "fsdp")


# Experts, of which each device has some.

EXPERTS = 8


def expert_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {
            "up": jax.random.normal(keys[0], (2, EXPERTS, 32, 64)) / 6,
            "down": jax.random.normal(keys[1], (2, EXPERTS, 64, 32)) / 8,
        },
        "last": jax.random.normal(keys[2], (32, 16)),
    }


def expert_loss(params, x):
    def layer(x, kernels):
        hidden = jnp.tanh(jnp.einsum("bd,edf->ebf", x, kernels["up"]))
        return x + jnp.einsum("ebf,efd->bd", hidden, kernels["down"]) / EXPERTS, None

    y, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.mean((y @ params["last"] - jnp.sin(3 * x[:, :16])) ** 2)


def train_experts(mesh, mode, make=galore_jax.adamw, **settings):
    """Losses, and the text of the compiled step."""
    tx = make(0.01, rank=8, update_proj_gap=6, **settings)
    params, x = expert_params(), jax.random.normal(jax.random.key(1), (16, 32))
    if mesh is not None:
        rules = {"layers/*": P(None, "expert")}
        params = jax.device_put(params, galore_jax.shardings(tx, params, mesh, rules))
    state = galore_jax.init(tx, params)
    step = galore_jax.make_step(expert_loss, tx, projected=mode == "projected", refreshes=True)
    run: Any = jax.jit(lambda params, state: tuple(step(params, state, x)))
    # A compiled step takes only what lies as it did at the start.
    run, losses = run.lower(params, state).compile(), []
    for _ in range(15):
        params, state, value = run(params, state)
        losses.append(float(value))
    return losses, run.as_text()


@pytest.mark.parametrize(
    ("mode", "make", "settings"),
    [
        ("projected", galore_jax.adamw, {"moments": "rotate"}),
        ("full", galore_jax.adamw, {"moments": "rotate"}),
        ("full", galore_jax.fira, {}),
        ("full", galore_jax.apollo, {}),
    ],
    ids=["projected", "full", "fira", "apollo"],
)
def test_experts_stay_on_their_devices(mode, make, settings):
    expected, _ = train_experts(None, mode, make, **settings)
    losses, program = train_experts(make_mesh({"expert": 8}), mode, make, **settings)
    assert "all-gather" not in program
    # Losses start at 37 and are sums of squares, so rounding shows in the sixth digit.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < 0.3 * losses[0]


def test_attention_by_the_kernel_for_cards_is_divided_over_the_axes_that_are_left(monkeypatch):
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    parts = []

    def kernel(queries, keys, values, *, mask, is_causal, implementation):
        parts.append((queries.shape, keys.shape, mask.shape))
        return plain(queries, keys, values, mask=mask, is_causal=is_causal)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = (jax.random.normal(jax.random.key(i), (8, 6, 4 - 2 * (i > 0), 8)) for i in range(3))
    mask = attention_mask(jnp.arange(48).reshape(8, 6) // 4)
    blocks = causal_attention(q, k, v, mask, "blocks")
    by_data = jax.shard_map(
        lambda *operands: causal_attention(*operands, "cudnn"),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    with jax.set_mesh(make_mesh(MESHES["hybrid"])), nn.logical_axis_rules(ACTIVATIONS):
        np.testing.assert_allclose(jax.jit(by_data)(q, k, v, mask), blocks, atol=1e-6)
    assert parts[-1] == ((2, 6, 2, 8), (2, 6, 1, 8), (2, 1, 6, 6))


@pytest.mark.parametrize(
    ("proj_type", "check_vma"), [("left", True), ("right", False), ("full", True)]
)
def test_kernels_that_a_shard_map_divides_are_projected(proj_type, check_vma):
    shapes = {"ws": (4, 6, 8), "up": (6, 2, 6), "heads": (6, 2, 4), "down": (12, 6)}
    shapes |= {"rows": (6, 8), "columns": (6, 8), "experts": (4, 6, 8)}
    keys = jax.random.split(jax.random.key(0), 8)
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    numbers = {name: Numbers(-2, -1) for name in shapes}
    numbers |= {"up": Numbers(0, (1, 2)), "heads": Numbers(0, (1, 2))}
    # The heads are divided within, so that their part is not one of rows or columns of the matrix.
    specs = {"ws": P("fsdp"), "up": P(None, "tensor"), "heads": P(None, None, "tensor")}
    specs |= {"down": P("tensor"), "rows": P("fsdp"), "columns": P(None, "fsdp")}
    specs |= {"experts": P("fsdp")}
    x, sizes = jax.random.normal(keys[7], (12, 6)), jnp.array([3, 2, 4, 3])
    gathered = functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)

    def of_shard(params, x):
        first = 2 * jax.lax.axis_index("fsdp")
        own = jnp.roll(x, -jnp.where(jnp.arange(4) < first, sizes, 0).sum(), axis=0)
        y = jax.lax.ragged_dot(own, params["ws"], jax.lax.dynamic_slice_in_dim(sizes, first, 2))
        h = jnp.tanh(jnp.einsum("td,dnh->tnh", x, params["up"])).reshape(12, -1)
        z = jax.lax.psum(h @ params["down"], "tensor")
        heads = jnp.sin(jnp.einsum("td,dnh->tnh", x, params["heads"]))
        whole = x @ gathered(params["rows"]) + x @ gathered(params["columns"], axis=1)
        every = jnp.einsum("td,edh->teh", x, gathered(params["experts"]))
        of_fsdp = jnp.sum(jnp.sin(y) ** 2) + jnp.sum(jnp.sin(whole)) + jnp.sum(jnp.sin(every))
        of_tensor = jnp.sum(heads**2)
        return jax.lax.psum(of_fsdp, "fsdp") + jax.lax.psum(of_tensor, "tensor") + jnp.sum(z**2)

    def divided(params, x):
        return jax.shard_map(
            of_shard, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=check_vma
        )(params, x)

    mesh = make_mesh(MESHES["hybrid"])
    settings = {"rank": 3, "weight_dimension_numbers": numbers, "proj_type": proj_type}
    assert compared(divided, params, x, **settings) == params.keys() - {"heads"}
