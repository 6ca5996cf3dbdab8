"""The table of what is projected, and of the bytes that the optimizer's state saves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax
from galore_jax import chain, describe, galore

KERNEL, BIAS = jnp.zeros((64, 256)), jnp.zeros(256)
RANK = 8
# Two moments of (64, 256), less two of (8, 256), the basis (64, 8), nine counters and scalars, and
# whether the last update refreshed and was finite.
SAVED = 4 * (2 * 64 * 256 - 2 * 8 * 256 - 64 * 8 - 9) - 2
ADAM = chain(galore(RANK), optax.adam(1e-3))


def rows(params, tx=ADAM):
    """By path, the other columns."""
    lines = [line.split("  ") for line in describe(params, tx).table.splitlines()[1:]]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    return {path: tuple(rest) for path, *rest in cells}


def projected(saved=SAVED):
    return "64 x 256", "left", str(RANK), f"{saved:,}"


WHOLE = "-", "-", "-", "0"


@pytest.mark.parametrize("kind", [list, tuple])
def test_parameters_in_a_list_have_a_line_each(kind):
    params = kind([KERNEL, BIAS, KERNEL])
    for tx in (ADAM, optax.chain(galore(RANK), optax.adam(1e-3))):
        assert rows(params, tx) == {
            "0": projected(),
            "1": WHOLE,
            "2": projected(),
            "total": (f"{2 * SAVED:,}",),
        }


def test_arrays_and_scalars_of_python_are_leaves():
    assert f"{SAVED:,}" in describe(KERNEL, ADAM).table.splitlines()[1]
    assert rows({"kernel": KERNEL, "temperature": 1.0})["temperature"] == WHOLE


@pytest.mark.parametrize("label", ["kernel", "bias", "inner_states", "bases", "mu"])
def test_labels_of_a_partition_may_be_the_names_of_leaves(label):
    labels = {"kernel": label, "bias": "rest"}
    tx = optax.partition({label: ADAM, "rest": optax.adam(1e-3)}, labels)
    found = rows({"kernel": KERNEL, "bias": BIAS}, tx)
    assert found == {"kernel": projected(), "bias": WHOLE, "total": (f"{SAVED:,}",)}


def test_an_optimizer_with_rules_and_a_wrapper_is_described():
    tx = optax.MultiSteps(galore_jax.adamw(1e-3, RANK, rules={"bias": None}), 2)
    full = 4 * 64 * 256  # The accumulated gradient.
    assert rows({"kernel": KERNEL, "bias": BIAS}, tx)["kernel"] == projected(SAVED - full)


class Module(eqx.Module):
    value: jax.Array


def test_a_field_that_is_called_value_has_its_name():
    paths = ["module/value", "total"]
    assert list(rows({"module": Module(KERNEL)})) == paths


def test_boxed_parameters_and_variables_have_the_names_of_their_boxes(linen, nnx):
    boxed = {
        "dense": {
            "kernel": linen.Partitioned(jnp.zeros((64, 256)), ("in", "out")),
            "bias": jnp.zeros(256),
        }
    }
    variables = {"dense": nnx.state(nnx.Linear(64, 256, rngs=nnx.Rngs(0)))}
    for params in (boxed, variables):
        for tx in (ADAM, galore_jax.adamw(1e-3, RANK, moments="rotate")):
            found = rows(params, tx)
            assert found["dense/kernel"] == projected()
            assert found["dense/bias"] == WHOLE


def test_with_a_loss_it_says_how_each_gradient_comes_about_and_why():
    params = {"penalised": KERNEL, "plain": KERNEL, "bias": BIAS, "squared": KERNEL}

    def loss(params, x, *, weight):
        y = x @ params["penalised"] + x @ params["plain"] + params["bias"]
        penalty = jnp.sum(jnp.abs(params["penalised"])) + jnp.sum(params["squared"] ** 2)
        return jnp.sum(y) + weight * penalty

    shape = jax.ShapeDtypeStruct((5, 64), jnp.float32)
    for batch in (jnp.zeros((5, 64)), shape):
        lines = describe(params, ADAM, loss, batch, weight=2.0).table.splitlines()
        found = {line.split()[0]: line for line in lines}
        assert found["path"].endswith("bytes saved  gradient")
        assert found["plain"].endswith(f"{SAVED:,}  projected")
        assert "  partly: abs at " in found["penalised"]
        assert "  full: integer_pow at " in found["squared"]
        assert "test_describe.py:" in found["squared"]
        assert found["bias"].endswith("  0")
