"""`finetuning`: time of a step and bytes of state of the optimizers compared on GLUE."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import CONFIGS, Row
from benchmarks.timing import interleaved, seconds
from galore_jax.data.glue_tasks import TASKS
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config import FinetuneConfig, TrainingConfig
from galore_jax.training.config_file import load_comparison
from galore_jax.training.glue import Glue, SeedConfig
from galore_jax.training.state import init_state, tree_bytes
from galore_jax.training.step import make_train_step

# The sizes of MiniLM, of which configs/glue/minilm.toml names the checkpoint.
MINILM = EncoderConfig(
    architecture="bert",
    vocab_size=30522,
    hidden_size=384,
    intermediate_size=1536,
    num_layers=6,
    token_types=2,
    pad_id=0,
)
STEPS = 1000  # of the learning-rate schedule, which takes no time


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py."""

    repeats: int = 21


class Run:
    """A fine-tuning on one random batch, with new bases at every step or at none."""

    def __init__(self, config: FinetuneConfig, encoder: EncoderConfig, batch: Any, refreshes: bool):
        optimizer, task = config.optimizer, TASKS[config.data.task]
        if refreshes:
            optimizer = replace(optimizer, galore=replace(optimizer.galore, update_proj_gap=1))
        model, training = Classifier(encoder, task.num_outputs), TrainingConfig(steps=STEPS)
        of_seed = SeedConfig(config.model, config.data, optimizer, training, config.mesh)
        glue = Glue(of_seed, task, model, rows={})
        adapted, tokens = model.clone(adapter=optimizer.adapter), jnp.zeros((1, 1), jnp.int32)
        params = jax.jit(adapted.init)(jax.random.key(0), tokens)["params"]
        self.state = jax.jit(lambda: init_state(glue))()._replace(params=params)
        self.step, self.batch = make_train_step(glue, refreshes=refreshes), batch

    def __call__(self) -> jax.Array:
        """Makes a step; returns its loss."""
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]


def measure(settings: Settings) -> list[Row]:
    """The rows of every optimizer of configs/glue/minilm.toml, for a MiniLM of random numbers."""
    configs = load_comparison(CONFIGS / "glue" / "minilm.toml", kind=FinetuneConfig)
    return measure_encoder(MINILM, configs, settings.repeats)


def measure_encoder(
    encoder: EncoderConfig, configs: Mapping[str, FinetuneConfig], repeats: int
) -> list[Row]:
    """The rows for any encoder, and optimizers by label."""
    data = next(iter(configs.values())).data
    rows, shape = data.batch_size, (data.batch_size, data.sequence_length)
    batch = {
        "tokens": np.random.default_rng(0).integers(1, encoder.vocab_size, shape, dtype=np.int32),
        "token_types": np.zeros(shape, np.int32),
        "labels": np.zeros(rows, np.int32),
        "weights": np.ones(rows, np.float32),
    }
    runs = {
        (label, refreshes): Run(config, encoder, batch, refreshes)
        for label, config in configs.items()
        for refreshes in (False, True)
        if not refreshes or config.optimizer.has_refreshes
    }
    for run in tqdm(runs.values(), "compiling"):
        seconds(run)
    step, time = interleaved(runs, repeats, "steps"), {}
    for label, config in configs.items():
        plain = step[label, False]
        more = step.get((label, True), plain) - plain
        time[label] = plain + more / config.optimizer.galore.update_proj_gap
    return [
        {
            "name": label,
            "seconds": time[label],
            "bytes": tree_bytes(runs[label, False].state.opt_state),
            "of_adamw": time[label] / time["adamw"],
        }
        for label in configs
    ]
