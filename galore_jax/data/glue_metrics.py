"""The metrics of GLUE: accuracy, F1, Matthews', Pearson's and Spearman's correlation."""

import numpy as np
from scipy.stats import rankdata

from galore_jax.data.glue import Task


def predictions_of(task: Task, outputs: np.ndarray) -> np.ndarray:
    """What a model predicts: classes int (examples,) or similarities float (examples,).

    Args:
        task: one of `galore_jax.data.glue.TASKS`.
        outputs: of the model's head, (examples, task.num_outputs).
    """
    return outputs.argmax(axis=1) if task.labels else outputs[:, 0]


def scores(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task by name, in the order of `task.metrics`.

    Args:
        task: one of `galore_jax.data.glue.TASKS`.
        predictions: as from `predictions_of`.
        labels: the labels, of the same shape.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in task.metrics}


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return np.mean(predictions == labels)


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1; 0 if it neither occurs nor is predicted."""
    both = np.sum(predictions == 1) + np.sum(labels == 1)
    return 2 * np.sum((predictions == 1) & (labels == 1)) / both if both else 0.0


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation in float64; 0 if one side is constant, where it is undefined."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return np.corrcoef(predictions.astype(np.float64), labels.astype(np.float64))[0, 1]


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _pearson(rankdata(predictions), rankdata(labels))


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _pearson,  # of two classes it is Pearson's of their numbers
    "pearson": _pearson,
    "spearman": _spearman,
}
