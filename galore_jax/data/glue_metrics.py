"""The metrics of GLUE: accuracy, F1, Matthews', Pearson's and Spearman's correlation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from galore_jax.data.glue import Task
from galore_jax.errors import check_installed


def predictions_of(task: Task, outputs: np.ndarray) -> np.ndarray:
    """What a model predicts: classes int (examples,) or similarities float (examples,).

    Args:
        task: one of `galore_jax.data.glue.TASKS`.
        outputs: of the model's head, (examples, task.num_outputs).
    """
    return outputs.argmax(axis=1) if task.labels else outputs[:, 0]


def check_metrics(task: Task) -> None:
    """Checks that the metrics of a task can be computed.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if {"f1", "matthews"} & {*task.metrics}:
        check_installed("sklearn")


def scores(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task by name, in the order of `task.metrics`.

    Args:
        task: one of `galore_jax.data.glue.TASKS`.
        predictions: as from `predictions_of`.
        labels: the labels, of the same shape.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in task.metrics}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> Any:
    return np.mean(predictions == labels)


def _f1(predictions: np.ndarray, labels: np.ndarray) -> Any:
    """F1 of class 1; 0 if it neither occurs nor is predicted."""
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions, zero_division=0)  # pyright: ignore[reportArgumentType]


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> Any:
    """Matthews' correlation; 0 if all predictions are the same."""
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> Any:
    from scipy.stats import pearsonr

    return _unless_constant(pearsonr, predictions, labels)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> Any:
    from scipy.stats import spearmanr

    return _unless_constant(spearmanr, predictions, labels)


def _unless_constant(
    correlation: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray
) -> Any:
    """A correlation in float64; 0 if one side is constant, where it is undefined."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return correlation(predictions.astype(np.float64), labels.astype(np.float64)).statistic


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
