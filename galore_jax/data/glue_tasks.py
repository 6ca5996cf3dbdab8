"""The nine tasks of GLUE (arXiv 1804.07461): examples and metrics.

Examples come from the official TSV files, one folder per task.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from galore_jax.data.text_pairs import PairTokenizer
from galore_jax.errors import InputError, require_choice


class Example(NamedTuple):
    """A text, or a pair of texts, and its label: a class or a similarity."""

    text_a: str
    text_b: str | None
    label: int | float


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: its key in `TASKS`.
        folder: its name in GLUE, which the folder of its TSV files has.
        texts: columns of the one or two texts in the TSV files.
        label: column of the label.
        labels: the labels as the TSV files spell them, in the order of the classes; empty for a
            regression from 0 to 5.
        metrics: names for `scores`.
        header: columns of the training and validation files, if these do not begin with a header.
        has_broken_rows: whether the official files contain rows that are to be skipped.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    header: tuple[str, ...] = ()
    has_broken_rows: bool = False

    @property
    def num_outputs(self) -> int:
        """Outputs of a model's head: one for each class, or one for a regression."""
        return len(self.labels) or 1

    @property
    def files(self) -> dict[str, str]:
        """The TSV file of each split."""
        if self.name != "mnli":
            return {"train": "train.tsv", "validation": "dev.tsv"}
        return {
            "train": "train.tsv",
            "validation_matched": "dev_matched.tsv",
            "validation_mismatched": "dev_mismatched.tsv",
        }


_TEXT, _PAIR = ("sentence",), ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_BINARY, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
_RELATION = ("entailment", "neutral", "contradiction")
_ACCURACY, _WITH_F1 = ("accuracy",), ("accuracy", "f1")
_COLA = ("source", "label", "judgment", "sentence")
_ALL = (
    Task("cola", "CoLA", _TEXT, "label", _BINARY, ("matthews",), header=_COLA),
    Task("sst2", "SST-2", _TEXT, "label", _BINARY, _ACCURACY),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, _WITH_F1),
    Task("stsb", "STS-B", _PAIR, "score", (), ("pearson", "spearman")),
    # The official train.tsv has rows of a question with a line break or a tab in it: see
    # https://github.com/nyu-mll/GLUE-baselines/issues/5.
    Task("qqp", "QQP", _QUESTIONS, "is_duplicate", _BINARY, _WITH_F1, has_broken_rows=True),
    Task("mnli", "MNLI", _PAIR, "gold_label", _RELATION, _ACCURACY),
    Task("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, _ACCURACY),
    Task("rte", "RTE", _PAIR, "label", _ENTAILMENT, _ACCURACY),
    Task("wnli", "WNLI", _PAIR, "label", _BINARY, _ACCURACY),
)
TASKS = {task.name: task for task in _ALL}


def load_examples(task: Task, split: str, source: str | Path) -> list[Example]:
    """The examples of a split in the order of its TSV file.

    Args:
        task: one of `TASKS`.
        split: "train" or "validation"; for MNLI the latter ends in "_matched" or "_mismatched".
        source: a folder with a folder of TSV files for each task.

    Raises:
        InputError: there is no such split or file, a row is broken or its label is out of range;
            the message names the file and the row. In the files of QQP, rows with a wrong number of
            columns are skipped with a warning.
    """
    require_choice("split", split, task.files)
    path = Path(source, task.folder, task.files[split])
    rows = _rows(path)
    header, first = ([*task.header], 1) if task.header else (rows[0], 2)
    wanted = (*task.texts, task.label)
    if lacking := [column for column in wanted if column not in header]:
        raise InputError(
            f"{path}, row 1 lacks the column {lacking[0]!r}: take the file of {task.folder} from "
            "gluebenchmark.com."
        )
    columns = [header.index(column) for column in wanted]
    examples, broken = [], []
    for row, fields in enumerate(rows[first - 1 :], first):
        if len(fields) != len(header):
            if not task.has_broken_rows:
                raise InputError(
                    f"{path}, row {row} has {len(fields)} columns, not {len(header)}: repair it or "
                    "download the file again."
                )
            broken.append(row)
            continue
        *texts, text = [fields[column] for column in columns]
        label = _label(task, text, f"{path}, row {row}")
        examples.append(Example(texts[0], texts[1] if len(texts) > 1 else None, label))
    if not examples:
        raise InputError(f"{path} has no examples: download the file again.")
    if broken:
        warnings.warn(
            f"{path}: {len(broken)} rows with a wrong number of columns are left out, the first "
            f"of which is row {broken[0]}.",
            stacklevel=2,
        )
    return examples


def encode(
    examples: Sequence[Example], tokenizer: PairTokenizer, length: int
) -> dict[str, np.ndarray]:
    """Examples as rows of tokens, for `galore_jax.data.text_pairs.batches`.

    Returns:
        "tokens" and "token_types", int32 (examples, length), as from `PairTokenizer.encode`; and
        "labels" (examples,), int32 classes or float32 similarities.
    """
    pairs = [(example.text_a, example.text_b) for example in examples]
    tokens, token_types = tokenizer.encode(pairs, length)
    labels = [example.label for example in examples]
    dtype = np.int32 if isinstance(labels[0], int) else np.float32
    return {"tokens": tokens, "token_types": token_types, "labels": np.array(labels, dtype)}


def predictions_of(task: Task, outputs: np.ndarray) -> np.ndarray:
    """What a model predicts: classes int (examples,) or similarities float (examples,).

    Args:
        task: one of `TASKS`.
        outputs: of the model's head, (examples, task.num_outputs).
    """
    return outputs.argmax(axis=1) if task.labels else outputs[:, 0]


def scores(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task by name, in the order of `task.metrics`.

    Args:
        task: one of `TASKS`.
        predictions: as from `predictions_of`.
        labels: the labels, of the same shape.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in task.metrics}


def _rows(path: Path) -> list[list[str]]:
    """The fields of each row but empty ones at the end; quotes have no meaning in these files."""
    if not path.is_file():
        raise InputError(
            f"there is no {path}: download the task from gluebenchmark.com, and name the folder "
            f"that has {path.parent.name} as data.source."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, row {row} is not UTF-8: download the file again.") from None
    # Only line feeds end a row: others of Python's line ends occur in texts.
    return [row.rstrip("\r").split("\t") for row in text.rstrip("\r\n").split("\n")]


def _label(task: Task, text: str, place: str) -> int | float:
    if task.labels:
        if text in task.labels:
            return task.labels.index(text)
        expected = f"one of {', '.join(task.labels)}"
    else:
        expected = "a number from 0 to 5"
        with suppress(ValueError):
            if 0 <= (score := float(text)) <= 5:
                return score
    raise InputError(
        f"{place} has the label {text!r}, which is not {expected}: repair it or download the file "
        "again."
    )


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
    from scipy.stats import rankdata  # Every training imports this module, few need it.

    return _pearson(rankdata(predictions), rankdata(labels))


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _pearson,  # of two classes it is Pearson's of their numbers
    "pearson": _pearson,
    "spearman": _spearman,
}
