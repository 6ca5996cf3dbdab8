"""The nine tasks of GLUE (arXiv 1804.07461): their examples, and predictions to submit.

Examples come from the official TSV files, one folder per task, or from TFDS, where a task is
`glue/NAME` with the names in `TASKS`. Labels are numbered as in TFDS.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from galore_jax.data.text_pairs import PairTokenizer
from galore_jax.errors import InputError, check_installed, require_choice
from galore_jax.files import write_text


class Example(NamedTuple):
    """A text, or a pair of texts, and its label: a class, a similarity, or None in a test set."""

    text_a: str
    text_b: str | None
    label: int | float | None


@dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: its name in TFDS.
        folder: its name in GLUE, which the folder of its TSV files has.
        texts: columns of the one or two texts in the TSV files.
        label: column of the label.
        labels: the labels as the TSV files and submissions spell them, in the order of the classes;
            empty for a regression from 0 to 5.
        metrics: names for `galore_jax.data.glue_metrics.scores`.
        features: names of the texts in TFDS; empty: those of the columns.
        header: columns of the training and validation files, if these do not begin with a header.
        has_broken_rows: whether the official files contain rows that are to be skipped.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    features: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    has_broken_rows: bool = False

    @property
    def num_outputs(self) -> int:
        """Outputs of a model's head: one for each class, or one for a regression."""
        return len(self.labels) or 1

    @property
    def files(self) -> dict[str, str]:
        """The splits, as TFDS calls them, and their TSV files."""
        if self.name != "mnli":
            return {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
        kinds = ("matched", "mismatched")
        return {
            "train": "train.tsv",
            **{f"validation_{kind}": f"dev_{kind}.tsv" for kind in kinds},
            **{f"test_{kind}": f"test_{kind}.tsv" for kind in kinds},
        }


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_ALL = (
    Task(
        "cola",
        "CoLA",
        ("sentence",),
        "label",
        _BINARY,
        ("matthews",),
        header=("source", "label", "judgment", "sentence"),
    ),
    Task("sst2", "SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
    Task(
        "mrpc",
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        _BINARY,
        ("accuracy", "f1"),
        features=_PAIR,
    ),
    Task("stsb", "STS-B", _PAIR, "score", (), ("pearson", "spearman")),
    # The official train.tsv has rows of a question with a line break or a tab in it: see
    # https://github.com/nyu-mll/GLUE-baselines/issues/5.
    Task(
        "qqp",
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        _BINARY,
        ("accuracy", "f1"),
        has_broken_rows=True,
    ),
    Task(
        "mnli",
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        features=("premise", "hypothesis"),
    ),
    Task("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    Task("rte", "RTE", _PAIR, "label", _ENTAILMENT, ("accuracy",)),
    Task("wnli", "WNLI", _PAIR, "label", _BINARY, ("accuracy",)),
)
TASKS = {task.name: task for task in _ALL}
SCORES = 0, 5  # the smallest and the largest similarity of STS-B


def load_examples(task: Task, split: str, source: str | os.PathLike[str]) -> list[Example]:
    """The examples of a split in the order of its TSV file.

    Args:
        task: one of `TASKS`.
        split: "train", "validation" or "test"; for MNLI the last two end in "_matched" or
            "_mismatched". Test sets have no labels.
        source: a folder with a folder of TSV files for each task; a data folder of TFDS; or "tfds",
            TFDS's own folder, into which TFDS downloads what it lacks.

    Raises:
        InputError: there is no such split, the source lacks the task, a row is broken or its label
            is out of range; the message names the file and the row. In the training and
            validation files of QQP, rows with a wrong number of columns are skipped with a warning.
        ModuleNotFoundError: TFDS is to be read, and is not installed.
    """
    require_choice("split", split, task.files)
    folder = Path(source)
    if (folder / task.folder).is_dir():
        return _read_tsv(task, split, folder / task.folder / task.files[split])
    if source == "tfds" or (folder / "glue" / task.name).is_dir():
        return _read_tfds(task, split, None if source == "tfds" else folder)
    raise InputError(
        f"{source} has neither a folder {task.folder} of TSV files nor a TFDS dataset "
        f'glue/{task.name}: download the task from gluebenchmark.com, or give "tfds".'
    )


def encode(
    examples: Sequence[Example], tokenizer: PairTokenizer, length: int
) -> dict[str, np.ndarray]:
    """Examples as rows of tokens, for `galore_jax.data.text_pairs.batches`.

    Returns:
        "tokens" and "token_types", int32 (examples, length), as from `PairTokenizer.encode`; and
        "labels" (examples,), int32 classes or float32 similarities, unless it is a test set.
    """
    pairs = [(example.text_a, example.text_b) for example in examples]
    tokens, token_types = tokenizer.encode(pairs, length)
    rows = {"tokens": tokens, "token_types": token_types}
    labels = [example.label for example in examples if example.label is not None]
    if labels:
        dtype = np.int32 if isinstance(labels[0], int) else np.float32
        rows["labels"] = np.array(labels, dtype)
    return rows


def write_predictions(
    task: Task,
    split: str,
    predictions: Sequence[int] | Sequence[float] | np.ndarray,
    folder: str | Path,
) -> Path:
    """Writes predictions for a test set in the format that gluebenchmark.com takes.

    Args:
        task: one of `TASKS`.
        split: a test split.
        predictions: a class, or a similarity, for each example in order.
        folder: created if it does not exist.

    Returns:
        The file, whose name is the one that GLUE expects, such as `MNLI-m.tsv`.

    Raises:
        InputError: the split is not a test split.
    """
    suffixes = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}
    require_choice("split", split, [name for name in task.files if name in suffixes])
    path = Path(folder, f"{task.folder}{suffixes[split]}.tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction"]
    for index, prediction in enumerate(predictions):
        if task.labels:
            text = task.labels[int(prediction)]
        else:
            text = f"{np.clip(prediction, *SCORES):.3f}"
        lines.append(f"{index}\t{text}")
    write_text(path, "\n".join(lines) + "\n")
    return path


def _read_tsv(task: Task, split: str, path: Path) -> list[Example]:
    is_test = split.startswith("test")
    rows = _rows(path)
    header = task.header
    if is_test or not header:
        header = next(rows, (1, []))[1]
    wanted = task.texts if is_test else (*task.texts, task.label)
    if lacking := [column for column in wanted if column not in header]:
        raise InputError(
            f"{path}, row 1 lacks the column {lacking[0]!r}: take the file of {task.folder} from "
            "gluebenchmark.com."
        )
    texts = [header.index(column) for column in task.texts]
    examples, broken = [], []
    for row, fields in rows:
        if len(fields) != len(header):
            if is_test or not task.has_broken_rows:  # Predictions are numbered by row.
                raise InputError(
                    f"{path}, row {row} has {len(fields)} columns, not {len(header)}: repair it or "
                    "download the file again."
                )
            broken.append(row)
            continue
        label = None if is_test else fields[header.index(task.label)]
        if label is not None:
            label = _label_of_text(task, label, f"{path}, row {row}")
        examples.append(_example([fields[index] for index in texts], label))
    if not examples:
        raise InputError(f"{path} has no examples: download the file again.")
    if broken:
        warnings.warn(
            f"{path}: {len(broken)} rows with a wrong number of columns are left out, the first "
            f"of which is row {broken[0]}.",
            stacklevel=3,
        )
    return examples


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each row; quotes have no meaning in these files."""
    empty = []  # They count as rows, except at the end of a file.
    try:
        with path.open("rb") as file:
            for row, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if row == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}, row {row} is not UTF-8: download the file again."
                    ) from error
                if not (text := text.rstrip("\r\n")):
                    empty.append(row)
                    continue
                yield from ((before, [""]) for before in empty)
                empty.clear()
                yield row, text.split("\t")
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: download the task again.") from error


def _label_of_text(task: Task, text: str, place: str) -> int | float:
    if not task.labels:
        try:
            score = float(text)
        except ValueError:
            raise InputError(
                f"{place} has the score {text!r}, which is not a number: repair it or download the "
                "file again."
            ) from None
        return _similarity(score, place)
    if text not in task.labels:
        raise InputError(
            f"{place} has the label {text!r}, which is none of {', '.join(task.labels)}: repair "
            "it or download the file again."
        )
    return task.labels.index(text)


def _similarity(value: float, place: str) -> float:
    low, high = SCORES
    if not low <= value <= high:
        raise InputError(
            f"{place} has the score {value}, which is not from {low} to {high}: repair it or "
            "download the file again."
        )
    return value


def _read_tfds(task: Task, split: str, data_dir: Path | None) -> list[Example]:
    if data_dir is None:
        check_installed("importlib_resources")  # TFDS needs it to download
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text.glue  # registers the builders behind the names "glue/…"

    name = f"glue/{task.name}"
    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=data_dir is None)
        examples = sorted(source, key=lambda example: example["idx"])
    except Exception as error:  # TFDS's parsers and downloads raise all kinds of exceptions.
        raise InputError(
            f"{name} cannot be read from {data_dir or 'TFDS'} ({error}): prepare it again with "
            "file_format array_record, or use the TSV files."
        ) from error
    return [_example_of_tfds(task, split, example) for example in examples]


def _example_of_tfds(task: Task, split: str, example: dict[str, Any]) -> Example:
    texts = [example[feature].decode() for feature in task.features or task.texts]
    if split.startswith("test"):
        return _example(texts, None)
    place, label = f"glue/{task.name} {split}, row {example['idx']}", example["label"]
    if not task.labels:
        return _example(texts, _similarity(float(label), place))
    if not 0 <= label < len(task.labels):
        raise InputError(
            f"{place} has the label {label}, which is not from 0 to {len(task.labels) - 1}: "
            "prepare the dataset again."
        )
    return _example(texts, int(label))


def _example(texts: Sequence[str], label: int | float | None) -> Example:
    return Example(texts[0], texts[1] if len(texts) > 1 else None, label)
