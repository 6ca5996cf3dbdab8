"""The configuration of a fine-tuning on GLUE, in the sections of its TOML file."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, PositiveInt

from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import InputError, require_choice
from galore_jax.settings import checked
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.mesh import MeshConfig


@checked("model")
@dataclass(frozen=True)
class CheckpointConfig:
    """`[model]`: the encoder to start from.

    Attributes:
      checkpoint: a Hugging Face folder of a RoBERTa or BERT: config.json, safetensors, tokenizer.

    Raises:
      InputError: none is given.
    """

    checkpoint: Annotated[str, Field(min_length=1)] = ""


@checked("data")
@dataclass(frozen=True)
class GlueConfig:
    """`[data]`: the task and its rows of tokens.

    Attributes:
      task: one of `galore_jax.data.glue_tasks.TASKS`.
      source: a folder with a folder of GLUE's TSV files for each task.
      sequence_length: tokens per row; longer pairs are truncated.
      batch_size: rows per step.

    Raises:
      InputError: a value out of range.
    """

    task: str = "rte"
    source: str = "glue"
    sequence_length: Annotated[int, Field(ge=8)] = 128
    batch_size: PositiveInt = 16

    def __post_init__(self):
        require_choice("data.task", self.task, TASKS)


@checked("training")
@dataclass(frozen=True)
class EpochsConfig:
    """`[training]`: epochs, seeds, and the folder of the results.

    Attributes:
      epochs: passes over the training examples, each followed by an evaluation.
      seeds: number of runs, with the seeds 0, 1, 2, … of the head, the order and dropout.
      folder: where the results go: config.toml and summary.json, and for each seed seed-N/ with
        metrics.jsonl, the best checkpoint and result.json.

    Raises:
      InputError: a value out of range.
    """

    epochs: PositiveInt = 30
    seeds: PositiveInt = 5
    folder: Annotated[str, Field(min_length=1)] = "runs/glue"


@checked("")
@dataclass(frozen=True)
class FinetuneConfig:
    """The configuration, one attribute for each section of the file.

    With LoRA only the adapters and the head of the classifier are trained.

    Raises:
      InputError: the optimizer is for pre-training only.
    """

    model: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: GlueConfig = field(default_factory=GlueConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: EpochsConfig = field(default_factory=EpochsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.optimizer.name in ("relora", "lowrank"):
            raise InputError(
                f'optimizer.name = "{self.optimizer.name}" is for pre-training: choose "lora", '
                "which keeps the checkpoint's matrices."
            )
