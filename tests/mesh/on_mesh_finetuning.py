"""Fine-tuning an encoder on a mesh of 8 devices equals that on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.finetune_config import CheckpointConfig, FinetuneConfig, GlueConfig
from galore_jax.training.finetune_steps import finetuning_mesh, make_steps
from galore_jax.training.mesh import MeshConfig

STEPS, ROWS, LENGTH = 4, 8, 12
ENCODER = EncoderConfig(
    "bert",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    max_length=16,
    token_types=2,
    pad_id=0,
    dropout=0.0,
    attention_dropout=0.0,
)
GALORE = {
    "name": "galore_adamw",
    "galore": {"rank": 4, "scale": 4.0, "update_proj_gap": 2},
}
MESHES = {
    "data": {},
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "zero": {"data": 2, "fsdp": 4, "shard_moments": True},
}


def batch():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, ENCODER.vocab_size, (ROWS, LENGTH), np.int32)
    tokens[:, LENGTH // 2 :] *= np.arange(ROWS)[:, None] % 3 > 0
    return {
        "tokens": tokens,
        "token_types": (np.arange(LENGTH) > 4).astype(np.int32) * np.ones_like(tokens),
        "labels": generator.integers(0, 2, ROWS, np.int32),
        "weights": (np.arange(ROWS) < ROWS - 1).astype(np.float32),
    }


def share_of_one_device(tree):
    """The bytes on the first device relative to all bytes of the arrays."""
    held = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim
    )
    return held / sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def finetuned(config, encoder, mesh):
    """Losses of some steps, outputs after them, and the final parameters and state."""
    model = Classifier(encoder, 2)
    steps = make_steps(config, model, STEPS, mesh)
    start = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = steps.adapt(start, jax.random.key(1))
    state, losses = steps.init(params), []
    for step in range(STEPS):
        rows, key = steps.put(batch()), jax.random.key(2 + step)
        if steps.refresh is not None and galore_jax.refresh_due(state):
            state = steps.refresh(params, state, rows, key)
        params, state, loss = steps.update(params, state, rows, key)
        losses.append(float(loss))
    return losses, np.asarray(steps.outputs(params, steps.put(batch()))), params, state


@pytest.mark.parametrize(
    ("optimizer", "dropout", "meshes"),
    [
        (GALORE, 0.0, ["data", "all", "zero"]),
        # Shards of the axis "data" draw what to drop by themselves, those of others do not.
        (GALORE, 0.1, ["fsdp"]),
        ({"name": "galore_muon", "galore": {"rank": 8, "update_proj_gap": 2}}, 0.0, ["all"]),
        ({"name": "lora", "lora": {"rank": 4, "dropout": 0.0}}, 0.0, ["all", "zero"]),
        ({"name": "adamw"}, 0.0, ["zero"]),
    ],
    ids=["galore", "dropout", "muon", "lora", "adamw"],
)
def test_losses_and_outputs_are_those_of_one_device(optimizer, dropout, meshes, capfd):
    encoder = dataclasses.replace(ENCODER, dropout=dropout)
    settings = OptimizerConfig(**optimizer, learning_rate=1e-3, warmup_steps=0, eps=1e-4)
    config = FinetuneConfig(CheckpointConfig("-"), GlueConfig(batch_size=ROWS), settings)
    losses, outputs, *_ = finetuned(config, encoder, None)
    assert losses[-1] != losses[0]
    for sizes in (MESHES[name] for name in meshes):
        placed = dataclasses.replace(config, mesh=MeshConfig(**sizes))
        mesh = finetuning_mesh(placed, encoder)
        found, logits, params, state = finetuned(placed, encoder, mesh)
        # Rounding of numbers of size 1, in another order, and a few steps that amplify it.
        np.testing.assert_allclose(found, losses, atol=1e-5)
        np.testing.assert_allclose(logits, outputs, atol=1e-4)
        if "fsdp" in sizes:
            # All but a few vectors are divided.
            assert share_of_one_device(params) <= 1.1 / sizes["fsdp"]
            assert share_of_one_device(state) <= 1.1 / sizes["fsdp"]
    # XLA writes so where it gathers a matrix to divide it in another way.
    assert "rematerialization" not in capfd.readouterr().err
