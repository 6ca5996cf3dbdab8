"""The task of a decoder that predicts the next token: of text, or of the answers in conversations.

Pre-training and instruction tuning are this one task; `model.checkpoint` makes the difference.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from galore_jax.data.batches import fingerprint, train_batches, validation_batches
from galore_jax.data.tokenizers import Tokenizer, load_tokenizer
from galore_jax.errors import InputError
from galore_jax.grads.layerwise import LayeredModel
from galore_jax.grads.micro_batches import split
from galore_jax.models import llama_layerwise
from galore_jax.models.adapters import Adapter, combine, is_factor
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss
from galore_jax.ops.int8 import Int8, is_int8, quantized
from galore_jax.training.config import Config
from galore_jax.training.mesh import TENSOR, kernel_rules, on_mesh, put_batch, whole
from galore_jax.training.metrics import format_bytes
from galore_jax.training.plots import plot_curves
from galore_jax.training.run_folder import SUMMARY, RunFolder
from galore_jax.training.step import dropout_rngs
from galore_jax.training.task import Batch, Data, Line, Task
from galore_jax.types import PyTree


def batch_loss(
    model: LlamaConfig, params: PyTree, batch: Batch, adapter: Adapter | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses in nats, and the number of targets, of a batch of (B, T) arrays.

    A batch of `with_seeds` has dropout in the adapters.
    """
    logits: Any = Llama(model, adapter).apply(
        {"params": params},
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        rngs=dropout_rngs(batch),
    )
    return next_token_loss(logits, batch["targets"])


@dataclass(frozen=True)
class Pretraining(Task):
    """A LLaMA that predicts the next token.

    Attributes:
      config: the configuration of the run.
    """

    config: Config
    metric: ClassVar[str] = "validation_loss"
    targets: ClassVar[str] = "tokens"
    result_file: ClassVar[str] = SUMMARY
    arrays: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("tokens", "segments", "positions", "targets"), (2, jnp.int32)
    )
    less_memory: ClassVar[str] = (
        "lower data.batch_size, raise training.accumulation or set training.layerwise = true; "
        "scripts/memory.py shows how much a configuration needs"
    )

    @property
    def trains_adapters_only(self) -> bool:
        """As usual with LoRA for a trained model."""
        return self.config.optimizer.name == "lora" and bool(self.config.model.checkpoint)

    @property
    def has_dropout(self) -> bool:
        """In the adapters."""
        adapter = self.config.optimizer.adapter
        return adapter is not None and adapter.dropout > 0

    def init_params(self, key: jax.Array) -> PyTree:
        """Random parameters; leaves that all models have are equal whatever the optimizer."""
        tokens = jnp.zeros((1, self.config.data.sequence_length), jnp.int32)
        model, adapter = self.config.model, self.config.optimizer.adapter
        plain = Llama(model).init(key, tokens)["params"]
        if adapter is None:
            return plain
        adapted = Llama(model, adapter).init(key, tokens)["params"]
        # Flax draws other kernels where a layer has more parameters.
        return combine(adapted, plain) if adapter.has_kernel else adapted

    def load_params(self, params: PyTree) -> PyTree:
        """Those of `model.checkpoint`, of which each process reads what its devices have.

        Raises:
          InputError: the checkpoint cannot be read or does not fit the model.
        """
        if not self.config.model.checkpoint:
            return params
        from galore_jax.interop.decoders import open_model  # needs an extra of its own

        read_part = open_model(Path(self.config.model.checkpoint), self.config.model)

        def read(path: Any, old: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if is_factor(name.split("/")):
                return old
            where = jax.tree.map(lambda array: array.sharding, old)
            jax.tree.map(lambda array: array.delete(), old)  # Never are all of both in memory.
            read_index: Any = functools.partial(read_part, name)
            if is_int8(old):
                return jax.device_put(_read_int8(read_index, old), where)
            return jax.make_array_from_callback(old.shape, where, read_index)

        return jax.tree_util.tree_map_with_path(read, params, is_leaf=is_int8)

    def loss(self, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`batch_loss` of the configured model."""
        return batch_loss(self.config.model, params, batch, self.config.optimizer.adapter)

    @property
    def layered_model(self) -> LayeredModel:
        """The functions of `llama_layerwise`."""
        of_model = lambda function: functools.partial(function, self.config.model)
        return LayeredModel(
            embed=of_model(llama_layerwise.embed),
            block=of_model(llama_layerwise.block),
            head_loss=of_model(llama_layerwise.head_loss),
        )

    @property
    def tensor_rules(self) -> Mapping[Any, PartitionSpec]:
        """Attention by heads, the MLP by columns, embedding and head by the vocabulary."""
        model = self.config.model
        rules = kernel_rules(("q", "k", "v", "gate", "up"))
        if model.attention_bias:
            rules |= {
                f"*/{name}_proj/bias": PartitionSpec(None, TENSOR) for name in ("q", "k", "v")
            }
        if not model.tie_embeddings:
            rules["lm_head/kernel"] = PartitionSpec(None, TENSOR)
        return rules | {"embed_tokens/embedding": PartitionSpec(TENSOR, None)}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of heads, MLP and vocabulary."""
        model = self.config.model
        return {
            "num_heads": model.num_heads,
            "num_kv_heads": model.kv_heads,
            "intermediate_size": model.intermediate_size,
            "vocab_size": model.vocab_size,
        }

    def open_data(self, mesh: Mesh | None, report: Callable[[str], object] | None) -> Data:
        """Batches of `data.batches`.

        Raises:
          InputError: the text or the tokenizer cannot be used, or the vocabulary is too small.
        """
        data = self.config.data
        tokenizer = load_tokenizer(data.tokenizer)
        self._check_vocabulary(tokenizer)
        batches = train_batches(data, tokenizer, report)
        validation = validation_batches(data, tokenizer, report)
        evaluate = make_evaluate(self, mesh)
        return Data(
            batches,
            lambda params: evaluate(params, validation),
            functools.partial(fingerprint, data),
        )

    def _check_vocabulary(self, tokenizer: Tokenizer) -> None:
        model, path = self.config.model, self.config.data.tokenizer
        if tokenizer.vocab_size > model.vocab_size:
            raise InputError(
                f"the tokenizer {path} has {tokenizer.vocab_size} tokens, more than "
                f"model.vocab_size, {model.vocab_size}: enlarge that, a checkpoint's by "
                "resize_token_embeddings of transformers."
            )

    def describe(self, evaluation: Line) -> str:
        """The loss and the perplexity."""
        loss = evaluation["validation_loss"]
        return f"validation loss {loss:.4f}, perplexity {perplexity(loss):,.2f}"

    def finish(self, run: RunFolder, evaluations: Sequence[Line], costs: Line) -> dict[str, Any]:
        """Draws the curves and prints a table; returns what summary.json has.

        That are the `name` of the folder, `steps`, `validation_loss` in nats per token,
        `validation_perplexity` and the costs.
        """
        plot_curves([run.path], run.curves)
        loss = evaluations[-1]["validation_loss"]
        rows = {
            "run": run.path.name,
            "steps": f"{self.config.training.steps:,}",
            "parameters": f"{costs['parameters']:,}",
            "validation loss": f"{loss:.4f}",
            "perplexity": f"{perplexity(loss):,.2f}",
            "optimizer state": format_bytes(costs["optimizer_bytes"]),
            "training time": f"{costs['seconds']:,.1f} s, and {costs['compile_seconds']:.1f} s to "
            "compile",
            "tokens per second": f"{costs['tokens_per_second']:,.0f}",
        }
        print("\n".join(f"{name:<{max(map(len, rows))}}  {text}" for name, text in rows.items()))
        return {
            "name": run.path.name,
            "steps": self.config.training.steps,
            "validation_loss": loss,
            "validation_perplexity": perplexity(loss),
            **costs,
        }


def _read_int8(read_index: Callable[[Any], np.ndarray], like: Int8) -> Int8:
    """A parameter in 8 bits like another one, quantised layer by layer as it is read."""
    stack, layers = like.shape[:-2], range(like.shape[0] if like.codes.ndim > 2 else 1)
    rows = [(slice(n, n + 1),) if stack else () for n in layers]
    rest = tuple(slice(0, size) for size in like.shape[len(stack) :])
    parts = [jax.device_get(quantized(jnp.asarray(read_index((*row, *rest))))) for row in rows]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def make_evaluate(
    task: Task, mesh: Mesh | None = None
) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """Makes a function that evaluates parameters, on this mesh, on batches.

    Batches are split into the micro-batches of the training; the last one is that which completes
    `training.evaluation_tokens`, unless that is 0.

    Returns:
      A function of the parameters and batches; it returns `validation_loss`, in nats per target,
      and `validation_targets`, their number, or raises an `InputError` if there are none.
    """
    config = task.config

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        parts = split(batch, config.training.accumulation)
        losses, targets = lax.map(functools.partial(task.loss, params), parts)
        return jnp.sum(losses), jnp.sum(targets)

    compiled = jax.jit(sums, out_shardings=whole(mesh))

    def evaluate(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        results = []
        with on_mesh(mesh):
            for batch in _up_to(config.training.evaluation_tokens, batches):
                results.append(compiled(params, put_batch(batch, mesh)))
        results = np.array(jax.device_get(results), np.float64)
        losses, targets = results.reshape(-1, 2).T
        if not targets.sum():
            raise InputError(
                "there is nothing to evaluate on: the validation split of "
                f"data.source = {config.data.source!r} holds no two tokens in one row."
            )
        return {
            "validation_loss": float(losses.sum() / targets.sum()),
            "validation_targets": int(targets.sum()),
        }

    return evaluate


def perplexity(loss: float) -> float:
    """exp(loss), infinite if that overflows."""
    return math.inf if loss > 709 else math.exp(loss)


def _up_to(targets: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches up to the one that completes this number of targets; all of them if it is 0."""
    seen = 0
    for batch in batches:
        yield batch
        seen += np.count_nonzero(batch["targets"] >= 0)
        if targets and seen >= targets:
            return
