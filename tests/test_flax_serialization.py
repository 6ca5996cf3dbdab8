"""States of optimizers as the bytes of `flax.serialization`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from trees import random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore, init

SHAPES = {"stack": (2, 72, 300), "tall": (300, 72), "bias": (300,)}


@pytest.mark.parametrize(
    "tx",
    [
        galore_jax.adamw(0.1, 16, weight_decay=0.1),
        galore_jax.adamw(0.1, 16, eight_bit=True, basis_dtype=jnp.int8),
        galore_jax.adamw(0.1, 16, moments="rotate", basis_dtype=jnp.bfloat16),
        galore_jax.adafactor(0.1, 16, proj_type="full"),
        galore_jax.fira(0.1, 16),
        galore_jax.apollo(0.1, 1),
        optax.chain(galore(16), optax.adam(0.1)),
        galore_jax.adamw8bit(0.1),
    ],
    ids=["adamw", "int8", "rotate", "adafactor", "fira", "apollo", "stock", "without galore"],
)
def test_a_state_comes_back_from_its_bytes_and_goes_on_as_it_would(tx):
    params, grads = random_params(SHAPES), random_params(SHAPES, seed=1)
    _, state = apply_gradients(tx, grads, init(tx, params), params)
    for target in (init(tx, params), jax.eval_shape(lambda: init(tx, params))):
        found = serialization.from_bytes(target, serialization.to_bytes(state))
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    one, other = (apply_gradients(tx, grads, s, params)[0] for s in (state, found))
    for leaf, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


def test_bytes_of_another_optimizer_are_refused_by_name():
    params = random_params({"wide": (12, 20)})
    written = serialization.to_bytes(chain(galore(4), optax.trace(0.9)).init(params))
    with pytest.raises(ValueError, match="inner_states"):
        serialization.from_bytes(galore_jax.adamw(0.1, 4).init(params), written)


@pytest.mark.parametrize("settings", [{}, {"eight_bit": True, "basis_dtype": jnp.int8}], ids=str)
def test_bytes_of_another_rank_are_refused_by_name(settings):
    params = random_params({"wide": (12, 20)})
    written = serialization.to_bytes(galore_jax.adamw(0.1, 4, **settings).init(params))
    with pytest.raises(
        ValueError, match=r"restored .* of wide/kernel has the shapes .*: restore into the state"
    ):
        serialization.from_bytes(galore_jax.adamw(0.1, 6, **settings).init(params), written)


def test_flax_may_be_imported_after_galore_and_is_not_by_it():
    code = (
        "import sys, galore_jax, jax.numpy as jnp\n"
        "params = {'kernel': jnp.ones((8, 12))}\n"
        "state = galore_jax.adamw(0.1, 4).init(params)\n"
        "assert 'flax' not in sys.modules\n"
        "from flax import serialization\n"
        "state = galore_jax.adamw(0.1, 4).init(params)\n"
        "print(len(serialization.to_bytes(state)) > 4 * 4 * 12)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
