"""Settings that make a training fit a device: the ladder, sizes, and scripts/memory.py --fit."""

import json
import re

import pytest
from analysis.compile_targets import TARGETS
from analysis.fit import larger_batches, next_rung, usable_bytes
from test_memory import run_script, tiny

from galore_jax.errors import InputError
from galore_jax.training.config_file import changed


def climbed(config):
    """The settings of all rungs, one after another."""
    rungs = []
    while rung := next_rung(config):
        changes = {}
        for setting in rung.setting.split():
            section, *names, value = re.split(r"[.=]", setting)
            number = {"true": True}.get(value, int(value) if value.isdigit() else value)
            *outer, name = names
            change = {name: number}
            changes[section] = {outer[0]: change} if outer else change
        config = changed(config, **changes)
        rungs.append(rung.setting)
    return rungs


def test_what_costs_least_is_tried_first_and_the_length_of_rows_last():
    config = changed(tiny(), data={"sequence_length": 600, "batch_size": 6})
    assert climbed(changed(config, model={"max_length": 600})) == [
        "training.accumulation=6",
        "optimizer.name=galore_adamw8bit",
        "optimizer.galore.basis_dtype=bfloat16",
        "optimizer.galore.basis_dtype=int8",
        "optimizer.galore.basis_dtype=int4",
        "training.layerwise=true",
        "model.weights=int8",
        "data.batch_size=1 training.accumulation=1",
        "data.sequence_length=300",
        "data.sequence_length=150",
    ]
    clipped = changed(tiny(), optimizer={"clip_norm": 1.0})
    assert climbed(clipped)[-1].endswith("accumulation=1 optimizer.clip_by=previous_step")
    assert climbed(tiny(name="lora")) == ["training.accumulation=2"]
    assert climbed(tiny(name="adamw")) == [
        "training.accumulation=2",
        "optimizer.name=adamw8bit",
        "training.layerwise=true",
        "model.weights=int8",
        "data.batch_size=1 training.accumulation=1",
    ]


def test_batches_and_micro_batches_grow_by_divisors_up_to_those_of_the_file():
    configured = changed(tiny(), data={"batch_size": 12}, training={"accumulation": 2})
    most = changed(configured, training={"accumulation": 12})
    numbers = [setting.partition("=")[2] for setting in larger_batches(most, configured)]
    assert numbers == ["6", "4", "3", "2"]
    one = changed(configured, data={"batch_size": 1}, training={"accumulation": 1})
    sizes = [f"data.batch_size={size}" for size in (2, 3, 4, 6, 12)]
    assert larger_batches(one, configured) == sizes


def test_a_size_is_that_of_the_smallest_card_that_has_it():
    assert usable_bytes("12GB") == ("rtx3060", 0.95 * 12 * 2**30)
    assert usable_bytes("20 GiB") == ("rtx4090", 0.95 * 20 * 2**30)
    assert usable_bytes("v6e") == ("v6e", TARGETS["v6e"].usable)
    for size, sentence in (("12", "give a size such as 12GB"), ("9999GB", "no card that is known")):
        with pytest.raises(InputError, match=sentence):
            usable_bytes(size)


@pytest.mark.slow
def test_the_script_ends_with_a_command_whose_training_fits(tmp_path, capsys):
    config = tiny()
    file = tmp_path / "figures.json"
    run_script(tmp_path, config, "--json", str(file))
    (row,) = json.loads(file.read_text()).values()
    needed = max(program["total"] for program in row["programs"].values())
    capsys.readouterr()
    run_script(tmp_path, config, "--fit", f"{0.999 * needed / 0.95 / 2**30:.9f}GB")
    *_, first, second, third, _, command = capsys.readouterr().out.splitlines()
    assert "as configured" in first
    assert "training.accumulation=2" in second
    assert "training.accumulation=1" in third  # the configured one, which is too large
    assert command.endswith("tiny.toml training.accumulation=2")
    with pytest.raises(InputError, match="no setting makes it fit"):
        run_script(tmp_path, config, "--fit", "0.0001GB")
    with pytest.raises(InputError, match="--fit is for one device"):
        run_script(tmp_path, config, "--fit", "12GB", "mesh.data=2")
