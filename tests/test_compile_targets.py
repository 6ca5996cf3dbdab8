"""Devices that programs are compiled for on a machine without them."""

import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from analysis.compile_targets import TPUS, place, target
from analysis.tpus import slice_shape

from galore_jax.errors import InputError

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install galore-jax[tpu]"
)


def test_a_slice_is_as_square_as_its_number_of_chips_allows():
    planes = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 256: (16, 16)}
    assert {number: slice_shape(number, 2) for number in planes} == planes
    # A host has 2 × 2 chips of a torus of three dimensions.
    solids = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 64: (4, 4, 4)}
    assert {number: slice_shape(number, 3) for number in solids} == solids
    with pytest.raises(InputError, match="12 chips make no slice: take 1, 2, 4, 8"):
        slice_shape(12, 2)


def test_what_is_missing_is_said_in_a_sentence(monkeypatch):
    with pytest.raises(InputError, match="the target = 'v7e' is unknown; did you mean"):
        target("v7e").__enter__()
    monkeypatch.setattr("analysis.tpus.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install galore-jax\[tpu\]"):
        target("v6e").__enter__()


@needs_libtpu
@pytest.mark.parametrize("name", TPUS)
@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 4}], ids=["one", "eight"])
def test_a_program_compiles_for_a_tpu_that_is_absent(name, axes):
    with target(name, axes) as sharding:
        mesh = sharding.mesh
        assert mesh.size == math.prod((axes or {}).values())
        x = place(jax.ShapeDtypeStruct((256, 256), jnp.bfloat16), sharding)
        compiled = jax.jit(lambda x: x @ x).lower(x).compile()
    assert "estimated_cycles" in compiled.as_text()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 256
