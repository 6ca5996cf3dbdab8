"""Devices that programs are compiled for on a machine without them."""

import dataclasses
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import memory
import pytest
from analysis.compile_targets import TPUS, place, target
from analysis.memory import DoesNotFit
from analysis.tpus import slice_shape
from benchmarks import step, training

from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig

ROOT = Path(__file__).parents[1]
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


@needs_libtpu
@pytest.mark.slow
def test_a_training_on_a_slice_has_its_memory_as_compiled(tmp_path, monkeypatch, capsys):
    figures, config = tmp_path / "memory.json", str(ROOT / "configs" / "llama_5m.toml")
    options = ["--config", config, "--device", "v6e", "--json", str(figures)]
    sizes = ["mesh.fsdp=4", "data.batch_size=8", "training.accumulation=1", "model.num_layers=1"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *options, *sizes])
    memory.main()
    assert "Compiled for 4 × TPU v6e, without such a device" in capsys.readouterr().out
    (row,) = json.loads(figures.read_text()).values()
    for program in row["programs"].values():
        assert 0 < program["total"] < TPUS["v6e"].usable


@needs_libtpu
@pytest.mark.slow
def test_a_step_is_estimated_for_a_tpu_that_is_absent():
    model = LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=512, num_layers=1, num_heads=2
    )
    adamw, projected, product, total = step.measure_model(
        model, step.Settings(device="v6e"), (2, 256), 32
    )
    assert (adamw["name"], projected["name"]) == ("adamw", "galore_projected")
    assert projected["ms_ratio"] == projected["ms"] / adamw["ms"]
    assert 0 < projected["gflop_ratio"] < 1
    assert "without_time" not in adamw
    assert 0.5 < product["of_peak"] <= 1
    assert 0 < total["of_peak"] <= 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_7b_step_compiles_for_the_chip_that_it_fits_and_not_for_a_smaller_one():
    settings = training.Settings(size="7b_24gb", device="v6e")
    (row,) = training.measure(settings)
    assert 0 < row["ms"] < 5000
    with pytest.raises(DoesNotFit) as refused:
        training.measure(dataclasses.replace(settings, device="v5e"))
    assert TPUS["v5e"].usable < refused.value.needed < TPUS["v6e"].usable
