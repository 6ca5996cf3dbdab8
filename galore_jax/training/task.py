"""What differs between trainings: the model, its data, how it is evaluated, and what is kept.

There are two tasks, `Pretraining` and `Glue`. The step, the loop, metrics and checkpoints are the
same for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from galore_jax.grads.layerwise import LayeredModel
from galore_jax.training.run_folder import RunFolder
from galore_jax.types import PyTree

# Arrays whose first axis is that of the rows.
Batch = dict[str, Any]
# The numbers of a line of metrics.jsonl, by name.
Line = Mapping[str, float]


class Data(NamedTuple):
    """The data of a training.

    Attributes:
      batches: those of the training set, endless, of NumPy arrays; with the methods of grain's
        iterators `get_state`, of which JSON can hold the result, `set_state` and `close`.
      evaluate: the parameters → the line of their evaluation, without the step.
      fingerprint: → numbers that change if the data do.
    """

    batches: Any
    evaluate: Callable[[PyTree], dict[str, float]]
    fingerprint: Callable[[], dict[str, int]]


class Task(ABC):
    """A model, its data, and what is kept of it.

    Attributes:
      config: a dataclass with the sections of a configuration file, of which the trainer knows
        `optimizer`, `training`, `mesh` and `data.batch_size`. It is recorded in the folder of the
        run and in its checkpoints.
      metric: the number of an evaluation that decides, as a name in its line. The training has
        diverged if it is not finite.
      targets: what the losses are of, in the plural, as in "tokens".
      result_file: the file with the result, whose presence marks the run as finished.
      arrays: those of a batch, with the number of their axes, of rows and tokens, and their dtype.
      less_memory: what to do if there is too little memory.
      trains_adapters_only: whether everything but adapters and the head of a classifier is frozen.
      has_dropout: whether the loss draws random numbers.
    """

    config: Any
    metric: str
    targets: str
    result_file: str
    arrays: Mapping[str, tuple[int, Any]]
    less_memory: str
    trains_adapters_only: bool
    has_dropout: bool

    # The model.

    @abstractmethod
    def init_params(self, key: jax.Array) -> PyTree:
        """Random parameters, for `jax.jit`. What `load_params` replaces may be zeros."""

    def load_params(self, params: PyTree) -> PyTree:
        """The same with the parameters of a checkpoint to start from, if the task has one.

        They lie on the same devices as those given, which may be deleted.
        """
        return params

    @abstractmethod
    def loss(self, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The sum of the losses of a batch, and the number of its targets.

        With dropout the batch is one of `with_seeds`.
        """

    @property
    def layered_model(self) -> LayeredModel:
        """The model for layer-wise steps."""
        raise NotImplementedError

    @property
    @abstractmethod
    def tensor_rules(self) -> Mapping[Any, PartitionSpec]:
        """How parameters are divided over the axis "tensor", by glob or pattern of their paths."""

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """The sizes of the model that the axis "tensor" has to divide, by name."""

    # Its data.

    @abstractmethod
    def open_data(self, mesh: Mesh | None, report: Callable[[str], object] | None) -> Data:
        """Opens the data; `report` is given sentences about them."""

    @abstractmethod
    def describe(self, evaluation: Line) -> str:
        """An evaluation in words."""

    # What is kept.

    def keep(self, run: RunFolder, params: PyTree, evaluations: Sequence[Line]) -> None:
        """Keeps the parameters, of which the last one of the evaluations is, if they are best."""
        del run, params, evaluations

    @abstractmethod
    def finish(self, run: RunFolder, evaluations: Sequence[Line], costs: Line) -> dict[str, Any]:
        """Presents a complete run, and returns its result, which JSON can hold.

        The costs are `parameters`, their number, `optimizer_bytes`, the size of the optimizer's
        state, `seconds`, of all steps without compilation and evaluation, `compile_seconds`, in
        this process, and the number of `targets` per second, as in `tokens_per_second`.
        """
