"""`training`: steps of a real training on the standard library's source, or their estimate."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
from analysis.compile_targets import target
from analysis.memory import compile_fitting
from analysis.step_cost import trainer_steps
from tqdm import tqdm

from benchmarks import CONFIGS, SIZES, Row
from benchmarks.estimates import figures
from galore_jax.data.batches import train_batches
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import require, require_choice
from galore_jax.training.config import Config
from galore_jax.training.config_file import load_config
from galore_jax.training.mesh import AXES, on_mesh, put_batch
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import batch_shapes, init_state
from galore_jax.training.step import Stepper

PROGRAMS = ("train_step", "refresh_step")


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: an unknown size or program, or too few steps.
    """

    size: str = "350m"
    optimizer: str = ""
    rows: int = 16
    steps: int = 50
    weights: str = ""
    device: str = ""
    program: str = "train_step"

    def __post_init__(self):
        require_choice("size", self.size, SIZES)
        require("steps", self.steps, self.steps >= 3, "3 or more: two are compiled for")
        require_choice("program", self.program, PROGRAMS)


def measure(settings: Settings) -> list[Row]:
    """One row, of the training or of the program that is compiled for a device."""
    overrides = [
        *('data.source="python"', 'data.tokenizer="bytes"', 'data.rows="packed"'),
        *(f"data.batch_size={settings.rows}", "training.accumulation=1"),
        *(f"training.steps={settings.steps}", f"optimizer.warmup_steps={settings.steps // 5}"),
        *([f"optimizer.name={settings.optimizer}"] if settings.optimizer else []),
        *([f"model.weights={settings.weights}"] if settings.weights else []),
    ]
    config = load_config(CONFIGS / f"llama_{settings.size}.toml", overrides)
    if not settings.device:
        return [train(config)]
    with target(settings.device, dict.fromkeys(AXES, 1)) as sharding, jax.set_mesh(None):
        mesh: Any = sharding.mesh
        state, steps = trainer_steps(config, mesh)
        require_choice("program", settings.program, PROGRAMS[: len(steps)])
        with on_mesh(mesh):
            step = steps[PROGRAMS.index(settings.program)]
            lowered = step.lower(state, batch_shapes(Pretraining(config), mesh))
            compiled = compile_fitting(lowered)
    name = f"{config.optimizer.name}, {settings.program}"
    return [{"name": name, **figures(compiled, settings.device)}]


def train(config: Config) -> Row:
    """Trains, with a refresh of all bases at the first step.

    Returns:
      The median seconds of a step, without those that were compiled for or that refreshed; the
      losses; and the peak memory of the device, if it is known.
    """
    task, stepper = Pretraining(config), Stepper(Pretraining(config))
    batches = train_batches(config.data, load_tokenizer(config.data.tokenizer))
    state: Any = jax.jit(lambda: init_state(task))()
    seconds, losses = [], []
    for _ in tqdm(range(config.training.steps), f"training with {config.optimizer.name}"):
        batch = put_batch(next(batches), None)
        compiling, start = stepper.compile_seconds, time.perf_counter()
        state, metrics = stepper(state, batch)
        losses.append(float(metrics["loss"]))
        if stepper.compile_seconds == compiling:
            seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds)
    tokens = config.data.batch_size * config.data.sequence_length
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "name": config.optimizer.name,
        "steps": config.training.steps,
        "seconds": step,
        "tokens_per_second": tokens / step,
        "compile_seconds": stepper.compile_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }
