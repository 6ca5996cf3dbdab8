"""Where parameters and optimizer states lie on a mesh of 8 devices, and work on parts of arrays."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_model import init_params, loss, make_mesh, share_of_one_device

import galore_jax
from galore_jax.ops.quantization import Quantized
from galore_jax.optim import adam8bit

RANK = 8


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def trimmed(spec):
    entries = [*spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def specs(tree):
    """The specs of a tree's leaves by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): trimmed(leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def chosen(params, sizes, rules=None, tx=None):
    mesh = make_mesh(sizes)
    tree = galore_jax.shardings(tx or galore_jax.adamw(1e-3, rank=RANK), params, mesh, rules)
    return jax.tree.map(lambda sharding: trimmed(sharding.spec), tree)


def placed(params, sizes, tx, rules=None):
    return jax.device_put(params, galore_jax.shardings(tx, params, make_mesh(sizes), rules))


# Parameters


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # The axis that the projection keeps.
        ({"up": shape(16, 64), "down": shape(64, 16)}, {"up": (None, "fsdp"), "down": ("fsdp",)}),
        # The first axis of what is not projected, and the last of scales.
        (
            {"stack": shape(3, 16, 64), "embedding": shape(64, 16), "scale": shape(3, 16)},
            {"stack": (None, None, "fsdp"), "embedding": ("fsdp",), "scale": (None, "fsdp")},
        ),
        # Another axis where the first choice is not divisible.
        (
            {"gate": shape(16, 61), "embedding": shape(61, 16), "odd": shape(9)},
            {"gate": ("fsdp",), "embedding": (None, "fsdp"), "odd": ()},
        ),
    ],
)
def test_fsdp_divides_one_axis_of_each_parameter(params, expected):
    assert chosen(params, {"fsdp": 8}) == expected


def test_rules_place_tensor_axes_and_fsdp_divides_their_parts_further():
    params = {"up": shape(16, 64), "down": shape(64, 16)}
    rules = {"up": P(None, "tensor"), "down": P("tensor", None)}
    expected = {"up": (None, ("tensor", "fsdp")), "down": (("tensor", "fsdp"),)}
    assert chosen(params, {"fsdp": 2, "tensor": 4}, rules) == expected


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 8, "fsdp": 1, "tensor": 1}])
def test_axes_of_size_1_leave_parameters_whole(sizes):
    rules = {"up": P(None, "tensor")} if "tensor" in sizes else None
    assert chosen({"up": shape(16, 64)}, sizes, rules) == {"up": ()}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"nothing/*": P("tensor")}, r"the rule 'nothing/\*' matches no parameter"),
        ({"up": P("model")}, r"up cannot be divided by .* not found in mesh: \('fsdp', 'tensor'\)"),
        (
            {"up": P(None, None, "tensor")},
            "up cannot be divided by .* applied to a value of rank 2",
        ),
        ({re.compile("^up$"): P("tensor")}, "up cannot be .* axis 0 is partitioned 2 times"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        chosen({"up": shape(15, 64)}, {"fsdp": 4, "tensor": 2}, rules)


def test_numbers_and_patterns_have_shardings():
    params = {"up": shape(16, 64), "temperature": 1.0}
    rules, expected = {re.compile("^u"): P("tensor")}, {"up": ("tensor", "fsdp"), "temperature": ()}
    assert chosen(params, {"fsdp": 4, "tensor": 2}, rules) == expected


# Optimizer states


OPTIMIZERS = {
    "adamw": galore_jax.adamw(1e-3, rank=RANK),
    "full": galore_jax.adamw(1e-3, rank=RANK, proj_type="full"),
    "lion": galore_jax.lion(1e-3, rank=RANK),
    "muon": galore_jax.muon(1e-3, rank=RANK),
    "adafactor": galore_jax.adafactor(1e-3, rank=RANK),
    "fira": galore_jax.fira(1e-3, rank=RANK),
    "apollo": galore_jax.apollo(1e-3, rank=1),
    "chain": galore_jax.chain(galore_jax.galore(RANK), optax.adamw(1e-3)),
    "stock chain": optax.chain(galore_jax.galore(RANK), optax.adamw(1e-3)),
    "plain": optax.adamw(1e-3),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rules", [None, {"*": P()}], ids=["fsdp", "whole"])
def test_a_state_lies_where_its_shardings_say_and_has_the_values_of_one_device(tx, rules):
    params = {"layers": {"up": jnp.ones((2, 32, 64))}, "embed": {"embedding": jnp.ones((48, 32))}}
    on_mesh = placed(params, {"data": 2, "fsdp": 4}, tx, rules)
    state = galore_jax.init(tx, on_mesh)
    shardings = galore_jax.state_shardings(tx, on_mesh)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    for leaf, to in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
    single = galore_jax.init(tx, params)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)


def test_each_device_holds_its_share_of_the_state_and_no_more():
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = placed(init_params(), {"fsdp": 8}, tx)
    assert share_of_one_device(galore_jax.init(tx, params)) < 1 / 8 + 0.01


def test_moments_are_divided_over_data_axes_on_request():
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = placed(init_params(), {"data": 8}, tx)
    state = galore_jax.init(tx, params, over="data")
    moments = state.inner_states[1]
    assert share_of_one_device((moments.mu, moments.nu)) < 1 / 8 + 0.01
    assert share_of_one_device(state.inner_states[0].bases) == 1


def test_moments_are_not_divided_twice_nor_over_an_unknown_axis():
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = placed(init_params(), {"data": 2, "fsdp": 4}, tx)
    one, other = (
        galore_jax.state_shardings(tx, params, over=over) for over in ("data", ("fsdp", "data"))
    )
    assert jax.tree.leaves(one) == jax.tree.leaves(other)
    with pytest.raises(ValueError, match='over: the mesh has no axis "model"'):
        galore_jax.init(tx, params, over="model")


def test_the_rank_is_divided_where_the_kept_axis_is_not():
    tx = galore_jax.adamw(1e-3, rank=16)
    params = placed({"gate": jnp.ones((32, 61))}, {"fsdp": 8}, tx)
    state = galore_jax.init(tx, params)
    assert specs(state.inner_states[1].mu) == {"gate/value": ("fsdp",)}


def test_8_bit_codes_are_divided_between_blocks_only(monkeypatch):
    monkeypatch.setattr(adam8bit, "MIN_QUANTIZED_SIZE", 256)
    tx = galore_jax.adamw(1e-3, rank=RANK, eight_bit=True)
    params = {"wide": jnp.ones((16, 4096)), "narrow": jnp.ones((16, 512))}
    state = galore_jax.init(tx, placed(params, {"fsdp": 8}, tx))
    expected = {"narrow/value/codes": ("fsdp",), "narrow/value/scales": ("fsdp",)}
    expected |= {"wide/value/codes": (None, "fsdp"), "wide/value/scales": (None, "fsdp")}
    assert specs(state.inner_states[1].mu) == expected

    # Blocks down the columns leave the columns free.
    tx = galore_jax.adamw(1e-3, rank=256, eight_bit=True)
    state = galore_jax.init(tx, placed({"high": jnp.ones((512, 520))}, {"fsdp": 8}, tx))
    expected = {"high/value/codes": (None, "fsdp"), "high/value/scales": (None, "fsdp")}
    assert specs(state.inner_states[1].mu) == expected


def test_shardings_of_a_state_need_parameters_on_a_mesh():
    with pytest.raises(ValueError, match=r"state_shardings: the parameters have no .*NamedShardin"):
        galore_jax.state_shardings(galore_jax.adamw(1e-3, rank=RANK), init_params())


def test_a_layer_wise_state_lies_where_its_shardings_say():
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = placed(init_params(jnp.bfloat16), {"fsdp": 8}, tx)
    state = galore_jax.layerwise.init(tx, params)
    shardings = galore_jax.layerwise.state_shardings(tx, params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    assert share_of_one_device(state) < 1 / 8 + 0.01


# Steps


@pytest.mark.parametrize("width", [64, 72])
def test_random_bits_of_the_lift_do_not_depend_on_the_mesh(width):
    # A width of 72 gives parts of 9 columns, and random bits are drawn for four at once.
    tx = galore_jax.adamw(1e-2, rank=RANK)
    params = {"up": jax.random.normal(jax.random.key(0), (2, 16, width)).astype(jnp.bfloat16)}
    grads = {"up": jax.random.normal(jax.random.key(1), (2, 16, width))}

    @jax.jit
    def step(params, state):
        return galore_jax.apply_gradients(tx, grads, state, params, key=jax.random.key(2))[0]

    on_mesh = placed(params, {"fsdp": 8}, tx)
    one, other = (np.asarray(step(p, galore_jax.init(tx, p))["up"]) for p in (params, on_mesh))
    # Where the updates differ in their last bits, one in some thousand numbers is rounded the other
    # way; other random bits would change a third of them.
    assert np.mean(one != other) < 0.01


def test_8_bit_adam_on_parts_equals_that_of_whole_arrays_up_to_rounding(monkeypatch):
    monkeypatch.setattr(adam8bit, "MIN_QUANTIZED_SIZE", 256)
    tx = optax.chain(galore_jax.scale_by_adam8bit(), optax.scale(-1e-3))
    params = {"w": jnp.ones((16, 2048)), "v": jnp.ones((2048,))}
    grads = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    on_mesh = placed(params, {"fsdp": 8}, tx, {"w": P(None, "fsdp")})

    @jax.jit
    def steps(params, state):
        for _ in range(3):
            params, state = galore_jax.apply_gradients(tx, grads, state, params)
        return params, state

    results = [steps(p, galore_jax.init(tx, p)) for p in (params, on_mesh)]
    leaves = [jax.tree.leaves(result) for result in results]
    for one, other in zip(*leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype == np.uint8:
            # Rounding in the last place of a float32 moves one code in some ten thousand.
            assert np.mean(one != other) < 0.001
        else:
            np.testing.assert_allclose(one, other, rtol=1e-6)
    is_code = lambda node: isinstance(node, Quantized)
    codes = [node for node in jax.tree.leaves(results[1][1], is_leaf=is_code) if is_code(node)]
    assert all(node.partition is not None for node in codes)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_shards_take_arrays_by_keyword_and_return_numbers(axis_type):
    def loss(params, x, *, key, scale, squared=True):
        y = scale * x @ params["w"] * jax.random.bernoulli(key, 0.5, (16,))
        return jnp.mean(y**2 if squared else y), {"rows": x.shape[0]}

    tx = galore_jax.adamw(1e-3, rank=2)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 16))}
    x = jax.random.normal(jax.random.key(1), (16, 8))
    unsplit = {"key": jax.random.key(2), "scale": jnp.float32(2), "squared": True}

    def coordinates(params, x, **options):
        state = galore_jax.init(tx, params)
        state = galore_jax.refresh(loss, has_aux=True, **options)(params, state, x, **unsplit)
        gradients = galore_jax.value_and_grad(loss, has_aux=True, **options)
        (value, aux), grads = gradients(params, state, x, **unsplit)
        return value, aux["rows"], grads["w"].value

    value, _, expected = coordinates(params, x)
    mesh = make_mesh({"data": 8}, axis_type)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, NamedSharding(mesh, P()))
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = coordinates(on_mesh, rows, data_axes="data")
    # Sums of 16 products, in another order, in bases that differ by rounding.
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    assert found[1] == 2
    np.testing.assert_allclose(found[2], expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("sizes", "axis", "rows", "message"),
    [
        ({"data": 8}, "data", 12, r"\(12, 8\).* cannot be split into 8 shards"),
        ({"fsdp": 8}, "fsdp", 16, 'the mesh axis "fsdp" divides the parameter layers/'),
        ({"fsdp": 8}, "data", 16, "there is no mesh with the axes data"),
    ],
)
def test_data_axes_that_cannot_divide_the_batch_are_refused(sizes, axis, rows, message):
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = placed(init_params(), sizes, tx)
    gradients = galore_jax.value_and_grad(loss, data_axes=axis)
    with pytest.raises(ValueError, match=message):
        gradients(params, galore_jax.init(tx, params), jnp.zeros((rows, 8), jnp.int32))


def test_parameters_of_two_galores_have_coordinates_each():
    one, other = (galore_jax.adamw(1e-3, rank=rank) for rank in (4, 2))
    tx = optax.partition({"one": one, "other": other}, {"up": "one", "down": "other"})
    params = placed({"up": jnp.ones((16, 64)), "down": jnp.ones((64, 16))}, {"fsdp": 8}, tx)
    loss = lambda params, x: jnp.mean((x @ params["up"] @ params["down"]) ** 2)
    gradients = jax.jit(galore_jax.value_and_grad(loss))
    _, grads = jax.eval_shape(gradients, params, galore_jax.init(tx, params), jnp.ones((8, 16)))
    assert (grads["up"].projection.rank, grads["down"].projection.rank) == (4, 2)


def test_boxes_with_logical_axes_lie_as_the_rules_of_the_context_say():
    kernel = nn.LogicallyPartitioned(jnp.ones((16, 64)), names=("model", "mlp"))
    tx = galore_jax.adamw(1e-3, rank=RANK)
    with nn.logical_axis_rules([("mlp", "tensor"), ("model", None)]):
        tree = galore_jax.shardings(tx, {"up": kernel}, make_mesh({"fsdp": 2, "tensor": 4}))
    assert trimmed(tree["up"].value.spec) == (None, ("tensor", "fsdp"))


def test_the_table_of_what_is_projected_does_not_depend_on_the_mesh():
    tx = galore_jax.adamw(1e-3, rank=RANK)
    params = init_params()
    on_mesh = jax.device_put(params, NamedSharding(make_mesh({"data": 8}), P()))
    assert galore_jax.describe(on_mesh, tx) == galore_jax.describe(params, tx)
