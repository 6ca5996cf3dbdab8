"""GLUE: examples from TSV files, their rows and metrics."""

import os
from pathlib import Path

import numpy as np
import pytest

from galore_jax.data.glue_tasks import (
    TASKS,
    Example,
    encode,
    load_examples,
    scores,
)
from galore_jax.data.text_pairs import PairTokenizer
from galore_jax.errors import InputError

DATA = Path(os.environ.get("GALORE_JAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif(
    not os.environ.get("GALORE_JAX_TEST_DATA"), reason="needs the TSV files of GLUE"
)

# The columns of the official files.
COLUMNS = {
    "cola": "source label judgment sentence",
    "sst2": "sentence label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
}
COLUMNS = {name: text.split("|" if "|" in text else " ") for name, text in COLUMNS.items()}
TEXTS = ['" Quoted, and never closed', "naïve\u2028x 日本", "'t was ' \\ \"", "plain"]


def write_task(folder, name, count=7):
    """Writes the TSV files of a task as GLUE does; returns the examples of each split."""
    task = TASKS[name]
    (folder / task.folder).mkdir(parents=True)
    examples = {}
    for number, (split, file) in enumerate(task.files.items()):
        examples[split], lines = [], []
        columns = COLUMNS[name]
        if name != "cola":
            lines.append("\t".join(columns))
        for row in range(count):
            label = (row + number) % (task.num_outputs if task.labels else 6)
            texts = [f"{TEXTS[(row + i) % 4]} {split} {row}" for i in range(len(task.texts))]
            fields = dict.fromkeys(columns, "x") | dict(zip(task.texts, texts, strict=True))
            fields[task.label] = task.labels[label] if task.labels else f"{label}.000"
            lines.append("\t".join(fields.values()))
            text_b = texts[1] if len(texts) == 2 else None
            examples[split].append(Example(texts[0], text_b, label))
        (folder / task.folder / file).write_bytes("\n".join(lines).encode())
    return examples


@pytest.mark.parametrize("name", TASKS)
def test_official_files_of_all_tasks_are_read(name, tmp_path):
    expected = write_task(tmp_path, name)
    for split, examples in expected.items():
        assert load_examples(TASKS[name], split, tmp_path) == examples


@needs_data
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("rte", (2490, 277)), ("cola", (8551, 1043)), ("mrpc", (3668, 408))],
)
def test_real_files_have_the_published_numbers_of_examples(name, sizes):
    task = TASKS[name]
    splits = {split: load_examples(task, split, DATA / "glue") for split in task.files}
    assert tuple(map(len, splits.values())) == sizes
    assert all(text for rows in splits.values() for row in rows for text in row[: len(task.texts)])
    for split in ("train", "validation"):
        assert {example.label for example in splits[split]} == {0, 1}
    if name == "mrpc":
        assert splits["validation"][0].text_b == (
            '" The foodservice pie business does not fit our long-term growth strategy .'
        )


ROW = "x\tone\ttwo\tentailment"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("rte", [ROW, "x\tone\tentailment"], "train.tsv, row 3 has 3 columns, not 4"),
        ("rte", [ROW, "x\tone\ttwo\tthree\tentailment"], "row 3 has 5 columns"),
        ("rte", [ROW, "", ROW], "row 3 has 1 columns"),
        ("rte", ["x\tone\ttwo\t0"], "row 2 has the label '0', .* entailment, not_entailment"),
        ("rte", [ROW, "x\t\xff\ttwo\tentailment"], "row 3 is not UTF-8"),
        ("rte", [], "train.tsv has no examples"),
        ("cola", ["x\t2\t\tone"], "row 1 has the label '2', which is not one of 0, 1"),
        ("stsb", ["\t".join("123456789") + "\t5.1"], r"row 2 has the label '5.1', .* 0 to 5"),
        ("stsb", ["\t".join("123456789") + "\tnan"], "row 2 has the label 'nan'"),
        ("stsb", ["\t".join("123456789") + "\thigh"], "row 2 has the label 'high'"),
    ],
)
def test_a_broken_row_or_label_is_one_sentence_with_file_and_row(name, rows, message, tmp_path):
    write_task(tmp_path, name)
    header = [] if name == "cola" else ["\t".join(COLUMNS[name])]
    path = tmp_path / TASKS[name].folder / "train.tsv"
    path.write_bytes("\n".join([*header, *rows]).encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        load_examples(TASKS[name], "train", tmp_path)
    assert str(path) in str(caught.value)


def test_broken_rows_of_qqp_are_left_out_with_a_warning(tmp_path):
    expected = write_task(tmp_path, "qqp")["train"]
    path = tmp_path / "QQP" / "train.tsv"
    rows = path.read_text().split("\n")
    rows[3:3] = ["9\t9\t9\tA question", "in two lines\tanother\t0"]
    path.write_text("\n".join(rows))
    with pytest.warns(UserWarning, match=r"2 rows .* first of which is row 4"):
        assert load_examples(TASKS["qqp"], "train", tmp_path) == expected


def test_empty_lines_at_the_end_are_no_rows(tmp_path):
    expected = write_task(tmp_path, "rte")["train"]
    with (tmp_path / "RTE" / "train.tsv").open("a") as file:
        file.write("\n\r\n")
    assert load_examples(TASKS["rte"], "train", tmp_path) == expected


def test_what_is_not_there_is_named(tmp_path):
    write_task(tmp_path, "rte")
    with pytest.raises(InputError, match=r"there is no .*CoLA/train.tsv: download"):
        load_examples(TASKS["cola"], "train", tmp_path)
    with pytest.raises(InputError, match=r"split = 'dev' is unknown.* train, validation"):
        load_examples(TASKS["rte"], "dev", tmp_path)
    (tmp_path / "RTE/dev.tsv").write_text("index\tsentence1\tlabel\n")
    with pytest.raises(InputError, match=r"dev.tsv, row 1 lacks the column 'sentence2'"):
        load_examples(TASKS["rte"], "validation", tmp_path)
    (tmp_path / "RTE/dev.tsv").unlink()
    with pytest.raises(InputError, match=r"there is no .*dev.tsv"):
        load_examples(TASKS["rte"], "validation", tmp_path)


def test_examples_become_rows_with_labels(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "mat", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = PairTokenizer(tmp_path)
    rows = encode([Example("cat", "mat", 1), Example("a cat", "sat", 0)], tokenizer, 8)
    assert rows["tokens"].shape == rows["token_types"].shape == (2, 8)
    np.testing.assert_array_equal(rows["labels"], np.array([1, 0], np.int32), strict=True)
    rows = encode([Example("cat", "mat", 2.5)], tokenizer, 8)
    np.testing.assert_array_equal(rows["labels"], np.array([2.5], np.float32), strict=True)


def test_metrics_are_those_of_their_formulas():
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 1])
    guesses = np.array([1, 0, 1, 1, 0, 1, 0, 1])
    true, false, missed, rejected = 4, 1, 1, 2
    expected = {"accuracy": 6 / 8, "f1": 2 * true / (2 * true + false + missed)}
    assert scores(TASKS["mrpc"], guesses, labels) == pytest.approx(expected)
    assert scores(TASKS["rte"], guesses, labels) == {"accuracy": 6 / 8}
    matthews = (true * rejected - false * missed) / (5 * 5 * 3 * 3) ** 0.5
    assert scores(TASKS["cola"], guesses, labels) == pytest.approx({"matthews": matthews})
    assert scores(TASKS["cola"], np.ones(8, int), labels) == {"matthews": 0}
    assert scores(TASKS["qqp"], np.zeros(8, int), labels) == {"accuracy": 3 / 8, "f1": 0}


def test_correlations_are_those_of_their_formulas():
    labels = np.array([0.0, 1.5, 2.0, 4.0, 5.0], np.float32)
    guesses = np.array([0.5, 1.0, 3.0, 2.0, 9.0], np.float32)
    ranks = np.array([1, 2, 4, 3, 5])
    expected = {
        "pearson": np.corrcoef(guesses, labels)[0, 1],
        "spearman": 1 - 6 * np.sum((ranks - np.arange(1, 6)) ** 2) / (5 * 24),
    }
    assert scores(TASKS["stsb"], guesses, labels) == pytest.approx(expected)
    constant = np.full(5, 2.0, np.float32)
    assert scores(TASKS["stsb"], constant, labels) == {"pearson": 0, "spearman": 0}
