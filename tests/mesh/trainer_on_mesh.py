"""Trains small models on meshes of 8 virtual devices; prints what it measured as JSON.

    python tests/mesh/trainer_on_mesh.py MODE MESH [MESH …]

Run it with XLA_FLAGS=--xla_force_host_platform_device_count=8. The first result is of one device.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax

from galore_jax.data.batches import DataConfig, train_batches, validation_batches
from galore_jax.data.tokenizers import ByteTokenizer
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.checkpoint import Checkpoints, load_for_inference
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.evaluate import make_evaluate
from galore_jax.training.layout import put_batch, training_mesh
from galore_jax.training.state import place_state
from galore_jax.training.stepper import Stepper

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
    OptimizerConfig(rank=16, warmup_steps=2, clip_norm=1.0, update_proj_gap=8),
    TrainingConfig(steps=STEPS, evaluation_tokens=2000),
)
MODES = {
    "projected": {},
    "accumulated": {"training": {"accumulation": 2}},
    "full": {"optimizer": {"gradients": "full"}, "training": {"accumulation": 2}},
    "adamw": {"optimizer": {"name": "adamw"}},
    # At three times this rate the loss of LoRA jumps in some steps, and rounding is multiplied.
    "lora": {"optimizer": {"name": "lora", "dropout": 0.0, "learning_rate": 0.003}},
    # A restart sets moments to 0, and Adam then divides gradients by their own size. With a usual
    # eps that turns those which are nothing but rounding into whole steps.
    "relora": {
        "optimizer": {"name": "relora", "dropout": 0.0, "eps": 1e-3},
        "training": {"accumulation": 2},
    },
    "lowrank": {"optimizer": {"name": "lowrank"}},
    "dropout": {"optimizer": {"name": "lora", "learning_rate": 0.003}},
    "muon": {"optimizer": {"name": "muon", "matrix_rate": 0.5}},
    "layerwise_muon": {
        "optimizer": {"name": "muon", "matrix_rate": 0.5},
        "training": {"layerwise": True},
    },
    "layerwise": {"training": {"layerwise": True}},
    "8bit": {"optimizer": {"name": "galore_adamw8bit", "basis_dtype": "int8"}},
    "layerwise_8bit": {
        "optimizer": {"name": "galore_adamw8bit", "basis_dtype": "int8"},
        "training": {"layerwise": True},
    },
}
MESHES = {
    "data": {},
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "zero": {"data": 4, "fsdp": 2, "shard_moments": True},
}


def changed(config, **sections):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def mesh_of(config, name):
    """The configuration with the mesh of this name, and the mesh; None: a single device."""
    if name is None:
        return config, None
    config = changed(config, mesh=MESHES[name])
    return config, training_mesh(config)


def steps(config, mesh, state, batches, number):
    """The state after some steps, and their losses."""
    stepper, losses = Stepper(config, state, mesh), []
    for _ in range(number):
        state, measured = stepper(state, put_batch(next(batches), mesh))
        losses.append(measured["loss"].item())
    return state, losses


def largest_part(tree):
    """Of what a device has, the bytes, on the device that has most."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return max(sizes.values())


def train(config, name):
    """Losses of all steps and of an evaluation, and the bytes of the state on a device."""
    config, mesh = mesh_of(config, name)
    state = place_state(config, mesh)
    start = {"params": largest_part(state.params), "optimizer": largest_part(state.opt_state)}
    batches = train_batches(config.data, ByteTokenizer())
    state, losses = steps(config, mesh, state, batches, STEPS)
    validation = itertools.islice(validation_batches(config.data, ByteTokenizer()), 5)
    losses.append(make_evaluate(config, mesh)(state.params, validation).loss)
    end = {"params": largest_part(state.params), "optimizer": largest_part(state.opt_state)}
    return {"losses": losses, "start": start, "end": end}


def move(config, names):
    """Losses of a training that a checkpoint moves from each mesh to the next."""
    losses, batches = [], train_batches(config.data, ByteTokenizer())
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            on_mesh, mesh = mesh_of(config, name)
            with Checkpoints(Path(folder, "checkpoints"), keep=1) as checkpoints:
                if number:
                    batches = train_batches(config.data, ByteTokenizer())
                    state = checkpoints.restore(on_mesh, batches, mesh)
                else:
                    state = place_state(on_mesh, mesh)
                state, new = steps(on_mesh, mesh, state, batches, STEPS // len(names))
                checkpoints.save(state, batches, on_mesh)
            losses += new
        _, params = load_for_inference(folder)
        assert (folder / "checkpoints" / str(len(losses))).is_dir()
        assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(params)} == {1}
    return {"losses": losses}


def main(mode, names):
    config = changed(CONFIG, **MODES[mode.removeprefix("moved_")])
    results = [train(config, None)]
    if mode.startswith("moved_"):
        results.append(move(config, [*names, None, *names[::-1]]))
    else:
        results += [train(config, name) for name in names]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
