"""`finetuning`: time of a step and bytes of state of the optimizers compared on GLUE."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import CONFIGS, Row
from benchmarks.timing import interleaved, seconds
from galore_jax.data.glue import TASKS
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.config_file import load_comparison
from galore_jax.training.finetune_config import FinetuneConfig
from galore_jax.training.finetune_steps import make_steps
from galore_jax.training.state import tree_bytes

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
    """A fine-tuning on one random batch."""

    def __init__(self, config: FinetuneConfig, encoder: EncoderConfig, batch: Any):
        model = Classifier(encoder, TASKS[config.data.task].num_outputs)
        steps = make_steps(config, model, STEPS)
        key, self.key = jax.random.split(jax.random.key(0))
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        self.params = steps.adapt(params, key)
        self.state, self.steps = steps.init(self.params), steps
        self.batch = steps.put(batch)

    def __call__(self) -> jax.Array:
        """Makes a step; returns its loss."""
        self.params, self.state, loss = self.steps.update(
            self.params, self.state, self.batch, self.key
        )
        return loss

    def refresh(self) -> Any:
        """Finds new bases if the optimizer has any; returns its state."""
        if self.steps.refresh is not None:
            self.state = self.steps.refresh(self.params, self.state, self.batch, self.key)
        return self.state


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
    runs = {label: Run(config, encoder, batch) for label, config in configs.items()}
    for run in tqdm(runs.values(), "compiling"):
        seconds(run.refresh)
        seconds(run)
    step = interleaved(runs, repeats, "steps")
    refresh = interleaved({label: run.refresh for label, run in runs.items()}, repeats, "refreshes")

    time = {
        label: step[label] + refresh[label] / config.optimizer.galore.update_proj_gap
        for label, config in configs.items()
    }
    return [
        {
            "name": label,
            "seconds": time[label],
            "bytes": tree_bytes(run.state),
            "of_adamw": time[label] / time["adamw"],
        }
        for label, run in runs.items()
    ]
