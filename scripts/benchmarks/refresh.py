"""`refresh`: time and captured energy of each method to refresh a basis, for a real gradient.

The gradient is that of a gate projection in a LLaMA of one layer, trained with GaLore on the source
of the standard library with a refresh every 50 updates. So the basis in the state just before a
refresh comes from the gradient of 50 updates earlier. The vocabulary has 4,096 pieces, because the
gradient's rank is at most that of the head, and an exact decomposition of a low-rank gradient skips
most of its work.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import Row
from benchmarks.timing import interleaved
from galore_jax.data.batches import DataConfig, train_batches
from galore_jax.data.stdlib_corpus import standard_library_texts
from galore_jax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from galore_jax.errors import require, require_choice
from galore_jax.models.llama import LlamaConfig
from galore_jax.optim.galore_state import galore_states
from galore_jax.subspace.new_basis import REFRESH
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state
from galore_jax.training.step import make_gradients, make_train_step

ROW_LENGTH = 256
GAP = 50  # updates
PIECES = 4096


class Size(NamedTuple):
    """The shape of a gate projection `(hidden, ffn)`, and the rank of its basis."""

    hidden: int
    ffn: int
    rank: int


SIZES = {
    "512": Size(512, 1376, 128),
    "1024": Size(1024, 2736, 256),
    "2048": Size(2048, 5461, 512),
}


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: a size is unknown, or a number of tokens is not a multiple of a row's.
    """

    sizes: str = ",".join(SIZES)
    tokens: int = 1024
    repeats: int = 3

    def __post_init__(self):
        for size in self.sizes.split(","):
            require_choice("sizes", size, SIZES)
        rows = self.tokens >= ROW_LENGTH and self.tokens % ROW_LENGTH == 0
        require("tokens", self.tokens, rows, f"a multiple of {ROW_LENGTH}")


def measure(settings: Settings) -> list[Row]:
    """The rows of every size and method."""
    sizes = [SIZES[name] for name in settings.sizes.split(",")]
    return [row for size in sizes for row in measure_size(size, settings)]


def measure_size(size: Size, settings: Settings) -> list[Row]:
    """The rows of every method, with `energy`, `‖PᵀG‖² / ‖G‖²`, also relative to the exact one."""
    title = f"{size.hidden} x {size.ffn}, rank {size.rank}"
    gradient, basis = gradient_and_old_basis(size, settings.tokens, title)
    arguments = gradient, basis, jnp.int32(1), jax.random.key(0)
    compiled = {
        name: functools.partial(_refresh(method).lower(*arguments).compile(), *arguments)
        for name, method in REFRESH.items()
    }

    def energy(basis: jax.Array) -> float:
        return float(jnp.sum((basis.T @ gradient) ** 2) / jnp.sum(gradient**2))

    energies = {name: energy(refresh()) for name, refresh in compiled.items()}
    median = interleaved(compiled, settings.repeats, f"refresh {title}")
    return [
        {
            "name": name,
            "size": f"{size.hidden}x{size.ffn}",
            "rank": size.rank,
            "seconds": median[name],
            "speedup": median["svd"] / median[name],
            "energy": energies[name],
            "relative_energy": energies[name] / energies["svd"],
        }
        for name in REFRESH
    ]


def _refresh(method: Callable[..., jax.Array]) -> jax.stages.Wrapped:
    def refresh(matrix: jax.Array, basis: jax.Array, rounds: jax.Array, key: jax.Array):
        return method(matrix, "left", basis, rounds, key)

    return jax.jit(refresh)


def gradient_and_old_basis(size: Size, tokens: int, title: str) -> tuple[jax.Array, jax.Array]:
    """A gradient `(hidden, ffn)` after 100 updates, and the basis `(hidden, rank)` before it.

    The basis was made 50 updates before the gradient, whose batch has twice the tokens of an
    update, so that 1,024 tokens give it full rank.
    """
    config = Config(
        model=LlamaConfig(
            vocab_size=PIECES,
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_layers=1,
            num_heads=max(size.hidden // 64, 1),
        ),
        data=DataConfig(sequence_length=ROW_LENGTH, batch_size=tokens // ROW_LENGTH),
        optimizer=OptimizerConfig(
            galore=GaloreConfig(rank=size.rank, update_proj_gap=GAP),
            warmup_steps=10,
            gradients="full",
        ),
        training=TrainingConfig(steps=1000),
    )
    batches = train_batches(config.data, _tokenizer())
    state, step = init_state(Pretraining(config)), make_train_step(Pretraining(config))
    for _ in tqdm(range(2 * GAP), f"training {title}"):
        state, _ = step(state, next(batches))
        jax.block_until_ready(state)
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), next(batches), next(batches))
    gradients, _ = jax.jit(make_gradients(Pretraining(config)))(
        state.params, state.opt_state, batch
    )
    basis = galore_states(state.opt_state.inner_states)[0].bases["layers"]["mlp"]["gate_proj"][
        "kernel"
    ]
    return gradients["layers"]["mlp"]["gate_proj"]["kernel"][0], basis.vectors["left"][0]


def _tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pieces.model"
        path.write_bytes(train_sentencepiece(standard_library_texts("train")[::8], PIECES))
        return load_tokenizer(str(path))
