"""The task of GLUE: an encoder whose head classifies, or rates, texts or pairs of texts."""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from galore_jax.data import glue_tasks
from galore_jax.data.glue_tasks import predictions_of, scores
from galore_jax.data.packing import Rows
from galore_jax.data.text_pairs import batches
from galore_jax.interop.encoders import load_encoder, save_encoder
from galore_jax.interop.tokenizer_files import copy_tokenizer
from galore_jax.models import adapters
from galore_jax.models.encoder import Classifier
from galore_jax.settings import checked
from galore_jax.training.config import CheckpointConfig, GlueConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.mesh import TENSOR, MeshConfig, kernel_rules, on_mesh, put_batch, whole
from galore_jax.training.run_folder import RunFolder
from galore_jax.training.step import dropout_rngs
from galore_jax.training.task import Batch, Data, Line, Task
from galore_jax.types import PyTree

RESULT = "result.json"


@checked("")
@dataclass(frozen=True)
class SeedConfig:
    """The configuration of a fine-tuning with one seed, in the sections of its TOML file."""

    model: CheckpointConfig
    data: GlueConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig


@dataclass(frozen=True)
class Glue(Task):
    """A task of GLUE, to be learnt with one seed.

    A seed determines the order of the examples, dropout, and the head, unless the checkpoint has
    one for the same labels.

    Attributes:
      config: the configuration of the run.
      task: the task of GLUE.
      model: the encoder with a head, without adapters.
      rows: of tokens, by split.
    """

    config: SeedConfig
    task: glue_tasks.Task
    model: Classifier
    rows: Mapping[str, Rows]
    targets: ClassVar[str] = "examples"
    result_file: ClassVar[str] = RESULT
    arrays: ClassVar[Mapping[str, Any]] = {
        "tokens": (2, jnp.int32),
        "token_types": (2, jnp.int32),
        "labels": (1, jnp.float32),
        "weights": (1, jnp.float32),
    }
    less_memory: ClassVar[str] = "lower data.batch_size or data.sequence_length"
    has_dropout: ClassVar[bool] = True

    @property
    def metric(self) -> str:
        """The first metric of the task, on the first validation split."""
        return f"{self._validation[0]}_{self.task.metrics[0]}"

    @property
    def trains_adapters_only(self) -> bool:
        """With LoRA; the head is trained too."""
        return self.config.optimizer.adapter is not None

    @property
    def _adapted(self) -> Classifier:
        return self.model.clone(adapter=self.config.optimizer.adapter)

    def init_params(self, key: jax.Array) -> PyTree:
        """Random adapters, and zeros that `load_params` replaces."""
        head_key, _ = jax.random.split(key)
        key = jax.random.fold_in(head_key, 1)
        random = self._adapted.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return adapters.combine(jax.tree.map(jnp.zeros_like, random), adapters.factors(random))

    def load_params(self, params: PyTree) -> PyTree:
        """Those of the checkpoint, with a random head if it has none for these labels."""
        head_key, _ = jax.random.split(jax.random.key(self.config.training.seed))
        folder = self.config.model.checkpoint
        loaded = load_encoder(folder, self.model, head_key, self.task.labels)
        whole = adapters.combine(loaded, adapters.factors(params))
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), whole, params)

    def loss(self, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The sums of weighted cross-entropies, or squared errors, and of the weights."""
        outputs: Any = self._adapted.apply(
            {"params": params},
            batch["tokens"],
            batch["token_types"],
            deterministic=False,
            rngs=dropout_rngs(batch),
        )
        if self.task.labels:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
        else:
            losses = (outputs[:, 0] - batch["labels"]) ** 2
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    @property
    def tensor_rules(self) -> Mapping[Any, PartitionSpec]:
        """Attention by heads, the MLP by columns.

        Embeddings are not divided: few numbers divide the 50,265 rows of RoBERTa's.
        """
        by_columns = ("q", "k", "v", "up")
        biases = {f"*/{name}_proj/bias": PartitionSpec(None, TENSOR) for name in by_columns}
        return kernel_rules(by_columns) | biases

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of heads and MLP."""
        encoder = self.model.config
        return {"num_heads": encoder.num_heads, "intermediate_size": encoder.intermediate_size}

    def open_data(self, mesh: Mesh | None, report: Callable[[str], object] | None) -> Data:
        """Epoch after epoch of the examples; the metrics of the validation splits."""
        config = self.config
        pad_id, seed = self.model.config.pad_id, config.training.seed
        train = EpochBatches(self.rows["train"], config.data.batch_size, pad_id, seed)

        def evaluate(params: PyTree) -> dict[str, float]:
            found = {}
            for split in self._validation:
                outputs = self.outputs(params, split, mesh)
                metrics = dict.fromkeys(self.task.metrics, math.nan)
                if np.isfinite(outputs).all():
                    predicted = predictions_of(self.task, outputs)
                    metrics = scores(self.task, predicted, self.rows[split]["labels"])
                found |= {f"{split}_{name}": value for name, value in metrics.items()}
            return found

        def fingerprint() -> dict[str, int]:
            return {
                split: zlib.crc32(b"".join(array.tobytes() for array in rows.values()))
                for split, rows in self.rows.items()
            }

        return Data(train, evaluate, fingerprint)

    def describe(self, evaluation: Line) -> str:
        """The metrics."""
        return ", ".join(f"{name.replace('_', ' ')} {x:.4f}" for name, x in evaluation.items())

    def keep(self, run: RunFolder, params: PyTree, evaluations: Sequence[Line]) -> None:
        """Keeps the best model in the folder of the run, which Hugging Face's libraries load."""
        *others, last = [line[self.metric] for line in evaluations]
        if last > max(others, default=-math.inf):
            merged = adapters.merge(params, self.config.optimizer.adapter)
            save_encoder(run.path, self.model, merged, self.task.labels)
            copy_tokenizer(Path(self.config.model.checkpoint), run.path)

    def finish(self, run: RunFolder, evaluations: Sequence[Line], costs: Line) -> dict[str, Any]:
        """`best`, the best value of the metric, `optimizer_bytes` and `seconds`."""
        del run
        kept = {name: costs[name] for name in ("optimizer_bytes", "seconds")}
        return {"best": max(line[self.metric] for line in evaluations), **kept}

    @property
    def _validation(self) -> list[str]:
        """The validation splits."""
        return [split for split in self.rows if split != "train"]

    def outputs(self, params: PyTree, split: str, mesh: Mesh | None) -> np.ndarray:
        """The outputs of the head for all rows of a split, in order, float32 (rows, outputs)."""
        inputs = {name: self.rows[split][name] for name in ("tokens", "token_types")}
        compiled: Any = _compiled  # Modules are hashable, which Flax's types do not say.
        outputs, size = compiled(self._adapted, mesh), self.config.data.batch_size
        with on_mesh(mesh):
            return np.concatenate(
                [
                    np.asarray(outputs(params, put_batch(batch, mesh)))[batch["weights"] == 1]
                    for batch in batches(inputs, size, self.model.config.pad_id)
                ]
            )


@functools.lru_cache(maxsize=4)
def _compiled(model: Classifier, mesh: Mesh | None) -> Callable[..., Any]:
    """The model without dropout; all seeds share it."""

    def outputs(params: PyTree, batch: Batch) -> Any:
        return model.apply({"params": params}, batch["tokens"], batch["token_types"])

    return jax.jit(outputs, out_shardings=whole(mesh))


class EpochBatches:
    """Endless batches of `batches`: all rows, epoch after epoch, each in another order.

    The seed and the number of the epoch, from 1, determine the order.
    """

    def __init__(self, rows: Rows, batch_size: int, pad_id: int, seed: int):
        self._of_epoch = lambda epoch: batches(rows, batch_size, pad_id, (seed, epoch))
        self.set_state({"epoch": 1, "batches": 0})

    def __next__(self) -> Batch:
        """The next batch."""
        batch = next(self._left, None)
        if batch is None:
            self.set_state({"epoch": self._epoch + 1, "batches": 0})
            return next(self)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of the epoch, and how many of its batches have been taken."""
        return {"epoch": self._epoch, "batches": self._taken}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues at this position."""
        self._epoch, self._taken = state["epoch"], state["batches"]
        self._left: Iterator[Batch] = islice(self._of_epoch(self._epoch), self._taken, None)

    def close(self) -> None:
        """Does nothing: nothing reads in the background."""
