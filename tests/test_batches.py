"""Rows, batches, shuffling and resumption."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from next_tokens import next_tokens

from galore_jax.data import batches
from galore_jax.data.batches import DataConfig, train_batches, validation_batches
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError

LENGTH = 16
TOKENIZER = load_tokenizer("bytes")
BOTH_ROWS = pytest.mark.parametrize("rows", ["packed", "documents"])


@pytest.fixture
def texts(monkeypatch):
    """Fifty training documents of 1 to 60 bytes and 23 for validation, in small windows."""
    draw = random.Random(0)
    splits = {
        split: [f"{index:02d}" + "x" * draw.randrange(59) for index in range(count)]
        for split, count in (("train", 50), ("validation", 23))
    }
    monkeypatch.setattr(batches, "documents", lambda config, split: splits[split])
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 20 * LENGTH)
    return splits


def config(rows="packed", **changes):
    return DataConfig(**{"rows": rows, "sequence_length": LENGTH, "batch_size": 4} | changes)


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def segments_of(rows):
    """The token lists of the segments of a batch, row by row."""
    return [
        tokens[segments == segment].tolist()
        for tokens, segments in zip(rows["tokens"], rows["segments"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@BOTH_ROWS
def test_batches_have_the_agreed_names_types_and_shapes(texts, rows):
    batch = next(train_batches(config(rows), TOKENIZER))
    assert set(batch) == {"tokens", "segments", "positions", "targets"}
    assert all(
        values.shape == (4, LENGTH) and values.dtype == np.int32 for values in batch.values()
    )


@BOTH_ROWS
def test_targets_are_the_next_tokens_of_the_same_document(texts, rows):
    drawn = take(train_batches(config(rows), TOKENIZER), 8)
    for batch in [*drawn, *validation_batches(config(rows), TOKENIZER)]:
        expected = next_tokens(batch["tokens"], batch["segments"])
        np.testing.assert_array_equal(batch["targets"], expected)


def test_packed_training_rows_hold_no_padding_and_every_token_of_an_epoch(texts):
    stream = [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts["train"]]
    epoch = sum(map(len, stream))
    drawn = take(train_batches(config(batch_size=20), TOKENIZER), 3 * epoch // (20 * LENGTH))
    tokens = np.concatenate([batch["tokens"].ravel() for batch in drawn])
    assert all((batch["segments"] > 0).all() for batch in drawn)
    counts = np.bincount(tokens, minlength=TOKENIZER.vocab_size)
    per_epoch = np.bincount(np.concatenate(stream), minlength=TOKENIZER.vocab_size)
    missing = 3 * per_epoch - counts  # of three epochs the last part of a batch is not drawn
    assert missing.min() >= 0
    assert missing.sum() == 3 * epoch - len(tokens)


def test_the_rows_of_one_long_document_do_not_fill_a_batch(monkeypatch):
    long = [letter * 1000 for letter in "abcdefgh"]
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 2**15)
    monkeypatch.setattr(batches, "documents", lambda config, split: long)
    batch = next(train_batches(config(batch_size=32), TOKENIZER))
    assert len(np.unique(batch["tokens"][:, 1])) >= 6


def test_a_document_row_is_truncated_with_its_eos_or_padded(texts):
    texts["train"][:] = ["a" * 40, "b" * (LENGTH - 1), "c" * LENGTH, "dd"]
    batch = next(train_batches(config("documents"), TOKENIZER))
    order = np.argsort(batch["tokens"][:, 0])
    tokens, segments, positions = (
        batch[name][order] for name in ("tokens", "segments", "positions")
    )
    for row, letter in enumerate("abc"):
        assert tokens[row].tolist() == TOKENIZER.encode(letter) * (LENGTH - 1) + [TOKENIZER.eos_id]
        assert segments[row].tolist() == [1] * LENGTH
        assert positions[row].tolist() == list(range(LENGTH))
    assert tokens[3].tolist() == [*TOKENIZER.encode("dd"), 1] + [0] * (LENGTH - 3)
    assert segments[3].tolist() == [1] * 3 + [0] * (LENGTH - 3)
    assert positions[3].tolist() == [0, 1, 2] + [0] * (LENGTH - 3)


def test_every_epoch_has_all_documents_in_a_different_order(texts):
    iterator = train_batches(config("documents", batch_size=50), TOKENIZER)
    epochs = [[tuple(row[:2]) for row in batch["tokens"].tolist()] for batch in take(iterator, 3)]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@BOTH_ROWS
def test_the_order_follows_the_seed(texts, rows):
    first, same, other = (
        take(train_batches(config(rows, seed=seed), TOKENIZER), 10) for seed in (1, 1, 2)
    )
    assert_equal(first, same)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@BOTH_ROWS
def test_an_iterator_resumes_exactly_at_any_batch(texts, rows):
    iterator = train_batches(config(rows), TOKENIZER)
    drawn, states = [], [json.dumps(iterator.get_state())]
    for _ in range(60):  # epochs end after 12.5 or 25 batches, windows after 5
        drawn.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    for position in (*range(0, 6), 10, 11, 12, 13, 24, 25, 26, 48, 53):
        state = states[position]
        resumed = train_batches(config(rows), TOKENIZER)
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        assert_equal(take(resumed, 6), drawn[position : position + 6])
        resumed.close()


@BOTH_ROWS
def test_validation_covers_the_split_once_in_order_as_often_as_it_is_read(texts, rows):
    batches = validation_batches(config(rows), TOKENIZER)
    drawn = list(batches)
    expected = [[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts["validation"]]
    if rows == "documents":
        expected = [
            ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], TOKENIZER.eos_id]
            for ids in expected
        ]
        num_rows = len(expected)
    else:
        num_rows = math.ceil(sum(map(len, expected)) / LENGTH)
    tokens = [token for batch in drawn for piece in segments_of(batch) for token in piece]
    assert tokens == list(itertools.chain(*expected))
    assert len(drawn) == math.ceil(num_rows / 4)
    assert all(values.shape == (4, LENGTH) for batch in drawn for values in batch.values())
    assert not drawn[-1]["segments"][num_rows % 4 or 4 :].any()
    assert_equal(drawn, list(batches))


@BOTH_ROWS
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "empty", [[""] * 3, [" \n"] * 50, [""] * 50_000 + ["a few words"]], ids=len
)
def test_a_split_almost_without_text_is_refused(texts, rows, split, empty):
    texts[split] = empty
    make = {"train": train_batches, "validation": validation_batches}[split]
    with pytest.raises(InputError, match=f"almost all documents in the {split} split of data.sour"):
        make(config(rows), TOKENIZER)


def test_text_in_few_of_many_documents_is_enough(texts):
    texts["train"] = ([""] * 99 + ["x" * 200]) * 100
    assert (next(train_batches(config(), TOKENIZER))["segments"] > 0).all()
