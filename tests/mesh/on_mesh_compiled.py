"""What steps at a width of 2048 move between 8 devices, as compiled; nothing is run.

Loops over parts of large arrays do not exist at the sizes at which tests can run.
"""

import functools

import jax
import numpy as np
import pytest
from analysis.collectives import collectives
from analysis.products import flops
from jax.sharding import AxisType

from galore_jax.data.batches import DataConfig
from galore_jax.models.llama import LlamaConfig
from galore_jax.models.loss import VOCAB_CHUNK
from galore_jax.training.config import Config, OptimizerConfig, TrainingConfig
from galore_jax.training.mesh import MeshConfig, make_mesh, on_mesh
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import abstract_state, batch_shapes
from galore_jax.training.step import make_train_step

LAYERS, WIDTH, HIDDEN, VOCAB, RANK = 4, 2048, 5632, 32000, 512
BFLOAT16, FLOAT32 = 2, 4
MODEL = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=16,
    dtype="bfloat16",
    remat=True,
)
MODES = {
    "projected": {},
    "projected, 8-bit, int8": {
        "name": "galore_adamw8bit",
        "galore": {"rank": RANK, "basis_dtype": "int8"},
    },
    "full": {"gradients": "full"},
    "layer-wise, 8-bit": {"name": "galore_adamw8bit"},
}
# Numbers in the kernels of a layer, in its bases, and in the largest kernel.
ATTENTION, MLP = 4 * WIDTH * WIDTH, 3 * WIDTH * HIDDEN
BASES = 7 * WIDTH * RANK
LARGEST = WIDTH * HIDDEN


@functools.cache
def compiled(mode, refreshes=False, mesh=(8, 1, 1), rows=8, accumulation=1):
    """A compiled step on a mesh of fsdp × data × tensor devices."""
    fsdp, data, tensor = mesh
    config = Config(
        MODEL,
        DataConfig(sequence_length=256, batch_size=rows),
        OptimizerConfig(**{"galore": {"rank": RANK}, "warmup_steps": 1, **MODES[mode]}),
        TrainingConfig(steps=10, accumulation=accumulation, layerwise="layer" in mode),
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    )
    grid = make_mesh(config.mesh)
    assert AxisType.Explicit not in grid.axis_types
    task = Pretraining(config)
    step = make_train_step(task, mesh=grid, refreshes=refreshes)
    with on_mesh(grid):
        return step.lower(
            abstract_state(Pretraining(config), grid), batch_shapes(Pretraining(config), grid)
        ).compile()


def gathered(program):
    return [found for found in collectives(program.as_text()) if found.kind == "all-gather"]


def is_of_vocabulary(found):
    """Whether a gathered array is the embedding, the head, or some of its columns."""
    whole = VOCAB * WIDTH * BFLOAT16
    return found.payload in (whole, 2 * whole, VOCAB_CHUNK * WIDTH * BFLOAT16)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_larger_than_a_kernel_is_gathered(mode):
    # A step of full gradients refreshes by itself.
    programs = [compiled(mode)] + ([compiled(mode, True)] if mode != "full" else [])
    for program in programs:
        sizes = [found.payload for found in gathered(program) if not is_of_vocabulary(found)]
        assert max(sizes) <= LARGEST * BFLOAT16


@pytest.mark.parametrize("mode", MODES)
def test_a_step_gathers_what_fsdp_must_and_little_else(mode):
    # Weights, in the forward and the backward pass; a layer-wise step computes attention once more,
    # to keep fewer activations. Bases, in bfloat16 for the backward pass of projected gradients, in
    # float32 to project full ones and to lift updates.
    passes = 3 if mode.startswith("layer-wise") else 2
    weights = LAYERS * (passes * ATTENTION + 2 * MLP) * BFLOAT16
    bases = LAYERS * BASES * (FLOAT32 + (FLOAT32 if mode == "full" else BFLOAT16))
    found = gathered(compiled(mode))
    total = sum(one.payload * one.times for one in found if not is_of_vocabulary(one))
    assert total <= 1.05 * (weights + bases)


def test_a_refresh_gathers_what_two_more_passes_of_fsdp_must_and_little_else():
    # A pass with the bases, and one with bases of the opposite sides, both in bfloat16.
    opposite = (4 * WIDTH + 3 * HIDDEN) * RANK
    passes = LAYERS * (3 * 2 * (ATTENTION + MLP) + 2 * BASES + opposite) * BFLOAT16
    found = gathered(compiled("projected", True))
    total = sum(one.payload * one.times for one in found if not is_of_vocabulary(one))
    assert total <= 1.05 * (passes + LAYERS * BASES * FLOAT32)


def test_micro_batches_share_one_reduction_and_cost_no_more_work():
    one, four = (compiled("projected", False, (1, 8, 1), 32, n) for n in (1, 4))
    for program in (one, four):
        reductions = [f for f in collectives(program.as_text()) if f.payload > 2**20]
        assert {(f.kind, f.times) for f in reductions} == {("all-reduce", 1)}
    moved = [
        sum(f.payload * f.times for f in collectives(program.as_text())) for program in (one, four)
    ]
    coordinates = LAYERS * RANK * (4 * WIDTH + 3 * HIDDEN) * FLOAT32
    np.testing.assert_allclose(moved, coordinates + 2 * VOCAB * WIDTH * FLOAT32, rtol=0.01)
    assert flops(four.as_text()) <= 1.1 * flops(one.as_text())


@pytest.mark.parametrize("mode", ["projected", "full"])
def test_a_shard_of_more_tokens_than_words_compiles(mode):
    # XLA ends the process here if the embedding is divided: see `whole_embeddings`.
    program = compiled(mode, False, (2, 2, 2), 512)
    # Nothing larger than the activations of a shard, for the embedding's gradient.
    assert max(found.payload for found in gathered(program)) == 512 // 2 * 256 * WIDTH * FLOAT32


@pytest.mark.parametrize("mode", ["projected", "layer-wise, 8-bit"])
def test_each_device_holds_an_eighth_of_the_state(mode):
    programs = compiled(mode), compiled(mode, False, (1, 8, 1))
    held = [program.memory_analysis().argument_size_in_bytes for program in programs]
    assert held[0] <= held[1] * (1 / 8 + 0.01)
    assert jax.device_count() == 8
