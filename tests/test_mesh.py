"""The section `[mesh]`, and which meshes are possible."""

import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import Config, TrainingConfig
from galore_jax.training.config_file import load_config
from galore_jax.training.mesh import AXES, MeshConfig, check_training_mesh, make_mesh, mesh_sizes
from galore_jax.training.pretraining import Pretraining


def test_a_size_of_minus_1_takes_what_the_others_leave():
    assert mesh_sizes(MeshConfig(), 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_sizes(MeshConfig(fsdp=2, tensor=2), 8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_sizes(MeshConfig(data=1, fsdp=-1), 8) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_single_device_needs_no_mesh(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert make_mesh(MeshConfig(), jax.devices()[:1]) is None
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert make_mesh(MeshConfig()) is None


@pytest.mark.parametrize(
    ("sizes", "names", "product", "verb"),
    [
        ({"data": 2, "fsdp": 3}, "mesh.data × mesh.fsdp × mesh.tensor", 6, "is"),
        ({"fsdp": 3}, "mesh.fsdp × mesh.tensor", 3, "divides"),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(sizes, names, product, verb):
    with pytest.raises(InputError) as refused:
        mesh_sizes(MeshConfig(**sizes), 8)
    assert str(refused.value) == (
        f"{names} is {product}, but there are 8 devices: choose values whose product {verb} 8."
    )


@pytest.mark.parametrize(
    ("sizes", "accumulation", "sentence"),
    [
        ((8, 1, 1), 3, "mesh.data × mesh.fsdp is 8, which does not divide .* 4 rows: choose"),
        ((2, 2, 1), 2, "mesh.data × mesh.fsdp is 4, which does not divide .* 6 rows: choose"),
        ((1, 1, 8), 1, "mesh.tensor is 8, .* the model's num_heads, 12: choose a divisor of 4."),
        ((2, 1, 3), 1, "mesh.tensor is 3, .* the model's num_kv_heads, 4: choose a divisor of 4."),
        ((3, 1, 4), 1, None),
    ],
)
def test_what_a_mesh_cannot_divide_is_named_with_the_sizes_that_work(sizes, accumulation, sentence):
    mesh = AbstractMesh(sizes, AXES)
    sides = {"hidden_size": 96, "intermediate_size": 100, "num_heads": 12, "num_kv_heads": 4}
    model, training = (
        LlamaConfig(vocab_size=1000, **sides),
        TrainingConfig(accumulation=accumulation),
    )
    config = Config(model, DataConfig(batch_size=12), training=training)
    if sentence is None:
        check_training_mesh(Pretraining(config), mesh)
    else:
        with pytest.raises(InputError, match=sentence):
            check_training_mesh(Pretraining(config), mesh)


def test_the_commands_of_the_page_on_many_devices_divide_their_batches():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "scaling.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"scripts/train\.py --config (\S+)(.*)", text)
    # One node, eight, and two, in the order of the page.
    assert len(commands) == 3
    for (path, arguments), devices in zip(commands, (8, 64, 16), strict=True):
        overrides = re.findall(r"\S+\.\w+=\d+", arguments)
        config = load_config(root / path, overrides)
        sizes = mesh_sizes(config.mesh, devices)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        check_training_mesh(Pretraining(config), mesh)
