"""The model sizes of configs/ against the published table."""

import functools
import math
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from galore_jax.models.llama import Llama, LlamaConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = ("9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "3b", "7b")

# Millions of parameters, and of those projected: the q, k, v, o, gate, up and down kernels.
PUBLISHED = {
    "60m": (58.07, 25.30),
    "130m": (134.11, 84.93),
    "350m": (367.97, 302.38),
    "1b": (1339.1, 1207.9),
    "7b": (6738.4, 6476.0),
}
SHAPES = {  # hidden, ffn, layers, heads
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
# rank, gap, learning rate, steps, warm-up, clip
PUBLISHED_OPTIMIZERS = {
    "60m": (128, 200, 0.01, 10_000, 1_000, 0),
    "130m": (256, 200, 0.01, 20_000, 2_000, 0),
    "350m": (256, 200, 0.01, 60_000, 6_000, 0),
    "1b": (512, 200, 0.01, 100_000, 10_000, 0),
    "7b": (1024, 500, 0.005, 150_000, 15_000, 1.0),
}


def read(size: str) -> dict:
    return tomllib.loads((CONFIGS / f"llama_{size}.toml").read_text())


@functools.cache
def count(size: str) -> tuple[int, int]:
    """Parameters and projected parameters, from shapes alone."""
    model = Llama(LlamaConfig(**read(size)["model"]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    sizes = [
        (path[-2].key, math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    ]
    return sum(n for _, n in sizes), sum(n for name, n in sizes if name.endswith("_proj"))


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_those_of_the_table(size: str):
    model = read(size)["model"]
    keys = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    assert tuple(model[key] for key in keys) == SHAPES[size]
    assert model["vocab_size"] == 32000
    assert model["max_length"] == (2048 if size == "7b" else 1024)
    assert model["dtype"] == "bfloat16"


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(size: str):
    digits = 2 if PUBLISHED[size][0] < 1000 else 1
    assert tuple(round(n / 1e6, digits) for n in count(size)) == PUBLISHED[size]


@pytest.mark.parametrize("size", SIZES)
def test_the_header_names_the_command_and_the_true_cost(size: str):
    header = (CONFIGS / f"llama_{size}.toml").read_text().split("\n\n")[0]
    everything, projected = count(size)
    digits = 2 if everything < 1e9 else 1
    assert f"--config configs/llama_{size}.toml" in header
    assert f"{everything / 1e6:.{digits}f}M parameters, {projected / 1e6:.{digits}f}M" in header
    config = read(size)
    tokens = config["training"]["steps"] * 512 * 256
    assert f"{tokens / 1e9:.2f}B tokens" in header


@pytest.mark.parametrize("size", PUBLISHED_OPTIMIZERS)
def test_optimizers_have_the_published_numbers(size: str):
    config = read(size)
    optimizer, training = config["optimizer"], config["training"]
    assert PUBLISHED_OPTIMIZERS[size] == (
        optimizer["galore"]["rank"],
        optimizer["galore"]["update_proj_gap"],
        optimizer["learning_rate"],
        training["steps"],
        optimizer["warmup_steps"],
        optimizer.get("clip_norm", 0),
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_size_follows_the_reference_in_data_and_schedule(size: str):
    config = read(size)
    assert config["data"] == {
        "source": "data",
        "tokenizer": "data/t5-spiece.model",
        "rows": "documents",
        "sequence_length": 256,
        "batch_size": 512,
    }
    assert config["optimizer"]["name"] == "galore_adamw"
    assert config["optimizer"]["galore"]["scale"] == 0.25
    assert config["optimizer"]["warmup_steps"] * 10 == config["training"]["steps"]
    assert config["training"]["evaluation_tokens"] == 10_000_000
    assert config["data"]["batch_size"] % config["training"]["accumulation"] == 0
