"""How a loss is rewritten: layouts of primitives, scopes, shardings, and our own product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from projected import compared, inputs, started

from galore_jax import describe, value_and_grad
from galore_jax.grads import jaxpr
from galore_jax.grads.jaxpr import take_matrices
from galore_jax.models.dense import matmul


def params():
    return {"stack": inputs(2, 12, 12), "last": inputs(12, 9)}


def last():
    return {"last": inputs(12, 9)}


def loss(params, x):
    """With an equation of each primitive that has a rule of its own."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    last = jax.lax.cond(x[0, 0] > 9, lambda x, w: 2 * x @ w, lambda x, w: x @ w, x, params["last"])
    again = jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, params["stack"][1])
    return jnp.mean(last**2) + jnp.mean(again**2)


STRUCTURES = ["scan", "cond", "remat2"]


@pytest.mark.parametrize(
    ("change", "primitive"),
    [("other names", name) for name in (*STRUCTURES, "dot_general", "slice")]
    # Of the others the equation itself is evaluated, whatever else it is told.
    + [("one more", name) for name in STRUCTURES],
)
def test_an_unknown_layout_of_a_primitive_is_a_reason_and_no_crash(monkeypatch, change, primitive):
    assert compared(loss, params(), inputs(5, 12)) == {"stack", "last"}
    rule = jaxpr.RULES[primitive]

    def unknown(equation, params, operands, report):
        others = {f"new_{name}": value for name, value in params.items()}
        params = others if change == "other names" else {**params, "new": None}
        return rule(equation, params, operands, report)

    monkeypatch.setitem(jaxpr.RULES, primitive, unknown)
    assert compared(loss, params(), inputs(5, 12)) != {"stack", "last"}
    report = describe(params(), started(params())[0], loss, inputs(5, 12)).uses
    reasons = [reason for uses in report.values() for reason in uses.reasons]
    assert any(reason.startswith(f"{primitive} at ") for reason in reasons)


def test_a_scan_over_layers_keeps_no_copy_of_their_kernels():
    kernels = {"stack": inputs(3, 12, 12)}

    def scanned(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return jnp.mean(x**2)

    _, state = started(kernels)
    closed = jax.make_jaxpr(value_and_grad(scanned))(kernels, state, inputs(5, 12))
    found = [one for one in jaxpr.all_equations(closed.jaxpr) if one.primitive.name == "scan"]
    assert len(found) == 2  # forwards and backwards
    outputs = [var.aval.shape for scan in found for var in scan.outvars]
    assert (3, 12, 12) not in outputs
    assert (3, 4, 12) in outputs  # coordinates


@pytest.fixture
def new_rematerialisation():
    """JAX's `jax_remat3`, a future default; not every version has it."""
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has no jax_remat3")
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", False)


@pytest.mark.parametrize("saved", [None, "hidden"])
def test_products_are_projected_under_the_new_rematerialisation(new_rematerialisation, saved):
    policy = saved and jax.checkpoint_policies.save_only_these_names(saved)

    def named(params, x):
        body = lambda x, w: (jnp.tanh(checkpoint_name(x @ checkpoint_name(w, "w"), "hidden")), None)
        x, _ = jax.lax.scan(jax.checkpoint(body, policy=policy), x, params["stack"])
        layer = jax.checkpoint(lambda x, w: body(x, w)[0] @ params["last"], policy=policy)
        return jnp.mean(layer(x, params["stack"][0]) ** 2)

    x = inputs(5, 12)
    assert "RematTraced" in str(jax.make_jaxpr(named)(params(), x))
    assert compared(named, params(), x) == {"stack", "last"}


@pytest.mark.parametrize("policy", ["dots_saveable", "nothing_saveable"])
def test_a_policy_of_the_new_rematerialisation_sees_our_products(new_rematerialisation, policy):
    if jax.__version_info__ < (0, 12):
        pytest.skip("its policies are not complete before JAX 0.12")

    def saved(params, x):
        layer = lambda x, w: jnp.tanh(x @ w)
        x = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))(
            x, params["last"]
        )
        return jnp.mean(x**2)

    _, state = started(last())
    text = jax.jit(value_and_grad(saved)).lower(last(), state, inputs(5, 12)).as_text()
    # The product, two for the coordinates, and the product again.
    assert text.count("dot_general") == {"dots_saveable": 3, "nothing_saveable": 4}[policy]


def test_scopes_of_the_loss_name_the_products_of_the_backward_pass():
    def scoped(params, x):
        with jax.named_scope("outer"):
            return jax.jit(lambda x, w: jnp.mean(jnp.sin(x @ w) ** 2))(x, params["last"])

    _, state = started(params())
    step = jax.jit(value_and_grad(scoped))
    text = step.lower(params(), state, inputs(5, 12)).as_text(debug_info=True)
    assert "transpose(jvp(outer" in text
    assert "jvp(outer)/outer" not in text


def test_a_jit_that_is_inlined_keeps_its_shardings():
    mesh = Mesh(jax.devices()[:1], ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    product = jax.jit(lambda x, w: jnp.sin(x @ w), in_shardings=(rows, None), out_shardings=rows)
    sharded = lambda params, x: jnp.mean(product(x, params["last"]) ** 2)
    _, state = started(last())
    step = value_and_grad(sharded)
    jaxpr = jax.make_jaxpr(step)(last(), state, inputs(5, 12))
    assert str(jaxpr).count("sharding_constraint") >= 2
    assert compared(sharded, last(), inputs(5, 12)) == {"last"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_of_our_models_is_projected_and_keeps_its_own_derivative(dtype):
    kernels = jax.tree.map(lambda leaf: leaf.astype(dtype), params())

    def ours(params, x):
        x = jnp.tanh(matmul(x.astype(dtype), params["stack"][0], "float32"))
        return jnp.mean(jnp.sin(matmul(x.astype(dtype), params["last"], "float32")) ** 2)

    x = inputs(5, 12)
    assert compared(ours, kernels, x, dtype=dtype) == {"stack", "last"}
    _, state = started(kernels)
    text = jax.jit(value_and_grad(ours)).lower(kernels, state, x).as_text()
    # Its cotangents are of the kernels' type, where JAX's derivative would keep float32.
    mixed = [line for line in text.splitlines() if "dot_general" in line and "bf16" in line]
    assert all("(tensor<5x9xf32>" not in line for line in mixed)
    assert bool(mixed) == (dtype == "bfloat16")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_vmap_of_our_product_is_exact_along_any_axis(axis):
    def mapped(params, x):
        product = jax.vmap(lambda x: matmul(x, params["last"], "float32"), axis, axis)
        return jnp.mean(jnp.sin(product(x)) ** 2)

    shape = [5, 12]
    shape.insert(axis, 3)
    compared(mapped, last(), inputs(*shape))


def test_a_derivative_of_ones_own_is_kept_and_its_kernel_full():
    @jax.custom_vjp
    def doubled(x, w):
        return x @ w

    doubled.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda saved, dy: (dy @ saved[1].T, 2 * saved[0].T @ dy)
    )
    own = lambda params, x: jnp.mean(jnp.sin(doubled(x, params["last"])) ** 2)
    assert compared(own, last(), inputs(5, 12)) == set()


def test_parts_with_bases_of_their_own_are_not_gathered_as_one_matrix():
    _, state = started(last())

    def of_device(params, state, x):
        gathered = lambda params: jax.lax.all_gather(params["last"], "data", tiled=True)
        loss = lambda params, x: jnp.mean((x @ gathered(params)) ** 2)
        return value_and_grad(loss)(params, state, x)[1]["last"]

    mesh = Mesh(jax.devices()[:1], ("data",))
    sharded = jax.shard_map(
        of_device, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    assert jax.jit(sharded)(last(), state, inputs(5, 12)).shape == (12, 9)  # full


def test_matrices_that_are_not_consecutive_are_gathered():
    stack = inputs(4, 2, 3)
    indices = np.array([[3, 1], [0, 0]])
    np.testing.assert_array_equal(take_matrices(indices, stack), stack[indices])
    np.testing.assert_array_equal(take_matrices(np.arange(1, 3), stack), stack[1:3])
    outside = jax.jit(take_matrices)(jnp.array([3, 4]), stack)
    np.testing.assert_array_equal(outside, np.stack([stack[3], np.zeros((2, 3))]))
