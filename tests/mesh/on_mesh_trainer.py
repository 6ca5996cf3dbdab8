"""The trainer on meshes of 8 devices: its losses, its checkpoints, and what each device holds."""

import collections
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from generate import load_model
from model_folder import random_params, save

from galore_jax.data.batches import DataConfig, train_batches, validation_batches
from galore_jax.data.tokenizers import ByteTokenizer
from galore_jax.interop import decoders
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import (
    Config,
    GaloreConfig,
    LoraConfig,
    OptimizerConfig,
    TrainingConfig,
)
from galore_jax.training.config_file import changed
from galore_jax.training.mesh import make_mesh, put_batch
from galore_jax.training.pretraining import Pretraining, make_evaluate
from galore_jax.training.state import place_state
from galore_jax.training.step import Stepper

# Rounding in another order moves a loss by a few units in its last place, 2.4e-7, and 20 steps by
# ten times as much. Where it changes an 8-bit code, by a fraction of a step of that code.
EXACT, EIGHT_BIT = 1e-5, 1e-3
STEPS = 20
CONFIG = Config(
    LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        max_length=32,
    ),
    DataConfig(sequence_length=32, batch_size=16),
    # Bases are refreshed in steps 0, 8 and 16.
    OptimizerConfig(
        warmup_steps=2,
        clip_norm=1.0,
        galore=GaloreConfig(rank=16, update_proj_gap=8),
        lora=LoraConfig(rank=16, restart_gap=8),
    ),
    TrainingConfig(steps=STEPS, evaluation_tokens=2000),
)
LAYERWISE, ACCUMULATED = {"layerwise": True}, {"accumulation": 2}
MUON = {"name": "muon", "matrix_rate": 0.5}
QUANTIZED = {"name": "galore_adamw8bit", "galore": {"basis_dtype": "int8"}}
# Settings of the sections [optimizer] and [training].
MODES = {
    "projected": ({}, {}),
    "accumulated": ({}, ACCUMULATED),
    "full": ({"gradients": "full"}, ACCUMULATED),
    "adamw": ({"name": "adamw"}, {}),
    # At three times this rate the loss of LoRA jumps in some steps, and rounding is multiplied.
    "dropout": ({"name": "lora", "learning_rate": 0.003}, {}),
    # A restart sets moments to 0, and Adam then divides gradients by their own size. With a usual
    # eps that turns those which are nothing but rounding into whole steps.
    "relora": ({"name": "relora", "lora": {"dropout": 0.0}, "eps": 1e-3}, ACCUMULATED),
    "lowrank": ({"name": "lowrank"}, {}),
    "muon": (MUON, {}),
    "layerwise muon": (MUON, LAYERWISE),
    "layerwise": ({}, LAYERWISE),
    "8bit": (QUANTIZED, {}),
    "muon8bit": ({"name": "muon8bit", "matrix_rate": 0.5}, LAYERWISE),
    "layerwise 8bit": (QUANTIZED, LAYERWISE),
}
MESHES = {
    "data": {},
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "zero": {"data": 4, "fsdp": 2, "shard_moments": True},
}


@functools.cache
def config_of(mode, mesh=None):
    """The configuration of a mode on the mesh of this name, and that mesh; None: one device."""
    optimizer, training = MODES[mode]
    config = changed(CONFIG, optimizer=optimizer, training=training, mesh=MESHES.get(mesh, {}))
    return config, mesh and make_mesh(config.mesh)


def steps(config, mesh, state, batches, number):
    """The state after some steps, and their losses."""
    stepper, losses = Stepper(Pretraining(config), mesh), []
    for _ in range(number):
        state, measured = stepper(state, put_batch(next(batches), mesh))
        losses.append(measured["loss"].item())
    return state, losses


def held(state):
    """Of parameters and of the optimizer's state, the bytes on the device that has most."""
    sizes = []
    for tree in (state.params, state.opt_state):
        of_device = collections.Counter()
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                of_device[shard.device] += shard.data.nbytes
        sizes.append(max(of_device.values()))
    return np.array(sizes)


@functools.cache
def trained(mode, mesh=None):
    """Losses of all steps and of an evaluation, and what a device holds before and after."""
    config, mesh = config_of(mode, mesh)
    state = place_state(Pretraining(config), mesh)
    start = held(state)
    batches = train_batches(config.data, ByteTokenizer())
    state, losses = steps(config, mesh, state, batches, STEPS)
    validation = itertools.islice(validation_batches(config.data, ByteTokenizer()), 5)
    losses.append(
        make_evaluate(Pretraining(config), mesh)(state.params, validation)["validation_loss"]
    )
    return losses, start, held(state)


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        ("projected", "fsdp"),
        ("accumulated", "data"),
        ("full", "zero"),
        ("adamw", "zero"),
        # Shards of the axis "data" draw what to drop by themselves, those of others do not.
        ("dropout", "fsdp"),
        ("relora", "all"),
        ("lowrank", "data"),
        ("muon", "zero"),
        ("layerwise muon", "fsdp"),
        ("layerwise", "data"),
        ("8bit", "all"),
        ("muon8bit", "fsdp"),
    ],
)
def test_losses_on_a_mesh_are_those_of_one_device(mode, mesh):
    expected, whole, _ = trained(mode)
    losses, start, end = trained(mode, mesh)
    assert expected[-1] < 4
    np.testing.assert_allclose(
        losses, expected, rtol=0, atol=EIGHT_BIT if "8bit" in mode else EXACT
    )
    np.testing.assert_array_equal(end, start)
    if mesh == "fsdp":
        # An eighth, and what is not divided: the scales of norms, counters and schedules.
        assert (start <= whole / 8 * [1.05, 1.1]).all()


@pytest.mark.parametrize(
    ("mode", "meshes", "bound"),
    [
        ("projected", ("fsdp", "all", None, "zero"), EXACT),
        ("layerwise 8bit", ("all", "fsdp"), EIGHT_BIT),
    ],
)
def test_a_checkpoint_moves_a_training_to_another_mesh(mode, meshes, bound, tmp_path):
    losses = []
    for mesh in meshes:
        config, mesh = config_of(mode, mesh)
        batches = train_batches(config.data, ByteTokenizer())
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            if losses:
                state = checkpoints.restore(Pretraining(config), batches, mesh)
            else:
                state = place_state(Pretraining(config), mesh)
            state, new = steps(config, mesh, state, batches, STEPS // len(meshes))
            checkpoints.save(state, batches, config)
        losses += new
    np.testing.assert_allclose(losses, trained(mode)[0][:-1], rtol=0, atol=bound)
    _, params = load_model(tmp_path)
    assert (tmp_path / "checkpoints" / str(STEPS)).is_dir()
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(params)} == {1}


# Checkpoints of Hugging Face.

PARAMS = jax.tree.map(lambda leaf: leaf / 20, random_params(CONFIG.model))


@pytest.fixture
def read_sizes(monkeypatch):
    """The numbers of elements that are read of each leaf, one for each time."""
    sizes, open_model = collections.defaultdict(list), decoders.open_model

    def opened(folder, config):
        def recorded(path, index):
            part = read(path, index)
            sizes[path].append(part.size)
            return part

        read = open_model(folder, config)
        return recorded

    monkeypatch.setattr(decoders, "open_model", opened)
    return sizes


@pytest.mark.parametrize(("mesh", "parts"), [("fsdp", 8), ("all", 4)])
def test_each_device_reads_its_part_of_a_model_folder_and_no_more(
    mesh, parts, tmp_path, read_sizes
):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    save(tmp_path, CONFIG.model, PARAMS, shard_bytes=50_000)
    config = changed(CONFIG, model={"checkpoint": str(tmp_path)}, mesh=MESHES[mesh])
    state = place_state(Pretraining(config), make_mesh(config.mesh))
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert set(read_sizes[key]) == {size}
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2]
    assert all(math.prod(k.sharding.shard_shape(k.shape)) == k.size // parts for k in kernels)
