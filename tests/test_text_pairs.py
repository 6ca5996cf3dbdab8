"""Texts and pairs of texts as rows of tokens, and batches of them."""

import os
from pathlib import Path

import numpy as np
import pytest
import transformers

from galore_jax.data.glue_tasks import TASKS, load_examples
from galore_jax.data.text_pairs import PairTokenizer, batches
from galore_jax.errors import InputError

DATA = Path(os.environ.get("GALORE_JAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif(
    not os.environ.get("GALORE_JAX_TEST_DATA"), reason="needs the TSV files of GLUE"
)
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "cat", "sat", "##s", "on", "mat", "a", "."),
]


@pytest.fixture
def word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def words(ids):
    return " ".join(WORDS[token] for token in ids)


def test_word_pieces_get_special_tokens_types_and_padding(word_pieces):
    tokenizer = PairTokenizer(word_pieces)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (13, 0)
    tokens, types = tokenizer.encode([("The Cats sat", "on a mat."), ("dog", None)], 12)
    assert words(tokens[0]) == "[CLS] the cat ##s sat [SEP] on a mat . [SEP] [PAD]"
    assert words(tokens[1]) == " ".join(["[CLS] [UNK] [SEP]", *["[PAD]"] * 9])
    np.testing.assert_array_equal(types, [[0] * 6 + [1] * 5 + [0], [0] * 12])


def test_texts_are_encoded_a_part_at_a_time(word_pieces, monkeypatch):
    tokenizer = PairTokenizer(word_pieces)
    texts = [("the " * n, "cat" if n % 2 else None) for n in range(1, 6)]
    at_once = tokenizer.encode(texts, 9)
    monkeypatch.setattr("galore_jax.data.text_pairs._ENCODED_AT_ONCE", 2)
    np.testing.assert_array_equal(tokenizer.encode(texts, 9), at_once)


def test_special_tokens_in_a_text_are_text(word_pieces):
    tokens, _ = PairTokenizer(word_pieces).encode([("cat [PAD] sat", None)], 12)
    assert words(tokens[0]).startswith("[CLS] cat [UNK] [UNK] [UNK] sat [SEP] [PAD]")


def test_the_longer_text_is_truncated_first(word_pieces):
    tokenizer, length = PairTokenizer(word_pieces), 12
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


def test_a_folder_without_a_usable_tokenizer_is_refused(word_pieces):
    settings = word_pieces / "tokenizer_config.json"
    settings.write_text('{"pad_token": null}')
    with pytest.raises(InputError, match="is not that of a RoBERTa or BERT: it has no padding"):
        PairTokenizer(word_pieces)
    for damage in ("{", '{"tokenizer_class": "BertJapaneseTokenizer"}'):
        settings.write_text(damage)
        with pytest.raises(InputError, match="tokenizer in"):
            PairTokenizer(word_pieces)
    settings.unlink()
    (word_pieces / "vocab.txt").unlink()
    with pytest.raises(InputError, match="has no file with the vocabulary of a tokenizer"):
        PairTokenizer(word_pieces)


def test_letters_of_word_pieces_are_treated_as_the_settings_say(word_pieces):
    (word_pieces / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokens, _ = PairTokenizer(word_pieces).encode([("The cat", None)], 7)
    assert words(tokens[0]) == "[CLS] [UNK] cat [SEP] [PAD] [PAD] [PAD]"


def assert_encodes_like_transformers(folder, length):
    """Compares with the tokenizer that `transformers` makes of a folder, on real pairs."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [row[:2] for row in load_examples(TASKS["rte"], "validation", DATA / "glue")]
    pairs += [row[:2] for row in load_examples(TASKS["cola"], "validation", DATA / "glue")][:99]
    tokens, types = PairTokenizer(folder).encode(pairs, length)
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
