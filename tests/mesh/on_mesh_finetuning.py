"""Fine-tuning an encoder on a mesh of 8 devices equals that on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import share_of_one_device

from galore_jax.data.glue_tasks import TASKS
from galore_jax.models import adapters
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config import CheckpointConfig, GlueConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.glue import Glue, SeedConfig
from galore_jax.training.mesh import MeshConfig, make_mesh, put_batch
from galore_jax.training.state import place_state
from galore_jax.training.step import Stepper

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
GALORE = {"name": "galore_adamw", "galore": {"rank": 4, "scale": 4.0, "update_proj_gap": 2}}
LORA = {"name": "lora", "lora": {"rank": 4, "dropout": 0.0}}


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


class FromNoFolder(Glue):
    """A task with random parameters in place of those of a folder."""

    def load_params(self, params):
        start = self.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        whole = adapters.combine(start, adapters.factors(params))
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), whole, params)


def finetuned(config, encoder, sizes=None):
    """Losses of some steps, outputs after them, and the final state."""
    config = dataclasses.replace(config, mesh=MeshConfig(**sizes or {}))
    rows = {"validation": batch()}
    task = FromNoFolder(config, TASKS["rte"], Classifier(encoder, 2), rows)
    mesh = None if sizes is None else make_mesh(config.mesh)
    state, stepper, losses = place_state(task, mesh), Stepper(task, mesh), []
    for _ in range(STEPS):
        state, metrics = stepper(state, put_batch(batch(), mesh))
        losses.append(float(metrics["loss"]))
    return losses, task.outputs(state.params, "validation", mesh), state


@pytest.mark.parametrize(
    ("optimizer", "dropout", "sizes"),
    [
        (GALORE, 0.0, {"data": 2, "fsdp": 2, "tensor": 2}),
        # Shards of the axis "data" draw what to drop by themselves, those of others do not.
        (GALORE, 0.1, {"data": 1, "fsdp": 8}),
        (LORA, 0.0, {"data": 2, "fsdp": 4, "shard_moments": True}),
    ],
    ids=["galore", "dropout", "lora"],
)
def test_losses_and_outputs_are_those_of_one_device(optimizer, dropout, sizes, capfd):
    encoder = dataclasses.replace(ENCODER, dropout=dropout)
    settings = OptimizerConfig(**optimizer, learning_rate=1e-3, warmup_steps=0, eps=1e-4)
    data, training = GlueConfig(batch_size=ROWS), TrainingConfig(steps=STEPS)
    config = SeedConfig(CheckpointConfig("-"), data, settings, training, MeshConfig())
    losses, outputs, _ = finetuned(config, encoder)
    assert losses[-1] != losses[0]
    found, logits, state = finetuned(config, encoder, sizes)
    # Rounding of numbers of size 1, in another order, and a few steps that amplify it.
    np.testing.assert_allclose(found, losses, atol=1e-5)
    np.testing.assert_allclose(logits, outputs, atol=1e-4)
    # All but a few vectors are divided.
    for tree in (state.params, state.opt_state):
        assert share_of_one_device(tree) <= 1.1 / sizes["fsdp"]
    # XLA writes so where it gathers a matrix to divide it in another way.
    assert "rematerialization" not in capfd.readouterr().err
