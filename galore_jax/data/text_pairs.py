"""Texts and pairs of texts as rows of tokens, and batches of them, for RoBERTa and BERT."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from galore_jax.data.tokenizers import settings_beside
from galore_jax.errors import InputError

_PAD_NAMES = ("<pad>", "[PAD]")
# Settings of a tokenizer_config.json, and their names in a BertNormalizer.
_LETTERS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_GROUP = 50  # batches of which rows are sorted by length
_ENCODED_AT_ONCE = 1000  # before they are arrays, the tokens of a text take 14 times the memory


class PairTokenizer:
    """A vocabulary with the special tokens that begin, separate and end texts.

    Attributes:
        vocab_size: ids are below it.
        pad_id: the token that fills rows.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, path: Path):
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        pad = next((name for name in _PAD_NAMES if name in vocabulary), None)
        if pad is None or not tokenizer.num_special_tokens_to_add(True):
            raise InputError(
                f"{path} is no tokenizer of RoBERTa or BERT: it has no {' or '.join(_PAD_NAMES)}, "
                "or puts no special tokens around a text."
            )
        # What looks like a special token in a text is text: nothing but padding is padding.
        tokenizer.encode_special_tokens = True
        self._tokenizer, self._pad = tokenizer, pad
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.pad_id: int = vocabulary[pad]

    def encode(
        self, texts: Sequence[tuple[str, str | None]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts, or pairs of texts, as rows of `length` tokens.

        Of a pair that is too long, tokens are removed from the end of the longer text until both
        are equally long, then from both.

        Returns:
            Tokens and token types (0 for the first text and, if the tokenizer tells them apart, 1
            for the second), both int32 (texts, length).

        Raises:
            InputError: the length leaves no room between the special tokens.
        """
        special = self._tokenizer.num_special_tokens_to_add(True)
        if length < special + 2:
            raise InputError(
                f"rows of {length} tokens have no room for a pair of texts and its {special} "
                f"special tokens: choose a length of at least {special + 2}."
            )
        self._tokenizer.enable_truncation(length, strategy="longest_first")
        self._tokenizer.enable_padding(length=length, pad_id=self.pad_id, pad_token=self._pad)
        inputs = [text_a if text_b is None else (text_a, text_b) for text_a, text_b in texts]
        tokens, types = np.empty((2, len(texts), length), np.int32)
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            part = slice(start, start + _ENCODED_AT_ONCE)
            encoded = self._tokenizer.encode_batch(inputs[part])
            tokens[part] = [row.ids for row in encoded]
            types[part] = [row.type_ids for row in encoded]
        return tokens, types


def load_pair_tokenizer(path: str | Path) -> PairTokenizer:
    """Loads the tokenizer of a RoBERTa or BERT.

    Args:
        path: a `tokenizer.json`, or a folder with one; with `vocab.json` and `merges.txt`
            (RoBERTa's byte-level BPE); or with `vocab.txt` (BERT's WordPiece). What
            `tokenizer_config.json` says of WordPiece's letters (`do_lower_case`, `strip_accents`,
            `tokenize_chinese_chars`) takes precedence, as in transformers.

    Raises:
        InputError: there is no tokenizer, or a file of it is damaged.
    """
    path = Path(path)
    readers = {
        ("tokenizer.json",): _read_json,
        ("vocab.json", "merges.txt"): _read_byte_level_bpe,
        ("vocab.txt",): _read_word_piece,
    }
    if path.name == "tokenizer.json":
        path = path.parent
    for names, read in readers.items():
        files = [path / name for name in names]
        if all(file.is_file() for file in files):
            try:
                return PairTokenizer(read(*files), path)
            except InputError:
                raise
            except Exception as error:  # The library raises bare exceptions.
                raise InputError(
                    f"{' and '.join(map(str, files))} cannot be read as a tokenizer ({error})."
                ) from error
    expected = ", ".join(" and ".join(names) for names in readers)
    raise InputError(f"there is no tokenizer in {path}: it has none of {expected}.")


def batches(
    rows: Mapping[str, np.ndarray],
    batch_size: int,
    pad_id: int,
    seed: Sequence[int] | int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Goes through all rows once, in batches of equal size.

    Each batch is cut to the shortest of four lengths that holds its rows; a step is compiled for
    each length. So that little padding is left, rows are drawn at random into groups
    of 50 batches, and a batch has rows of similar length from one group.

    Args:
        rows: "tokens" (rows, length), padded at the end, with other arrays of that shape, such as
            token types, or of the shape (rows,), such as labels.
        batch_size: rows of a batch.
        pad_id: the token that is padding.
        seed: of the order, such as (seed, epoch); None: the order given.

    Yields:
        These arrays for each batch, and "weights", float32 (batch_size,): 1, but 0 for the rows
        that fill an incomplete batch.
    """
    lengths = (rows["tokens"] != pad_id).sum(axis=1)
    quarter = -(-rows["tokens"].shape[1] // 4)
    for indices in _batch_indices(lengths, batch_size, seed):
        weights = np.arange(batch_size) < len(indices)
        width = -(-lengths[indices].max() // quarter) * quarter
        indices = np.resize(indices, batch_size)
        batch = {
            name: values[indices] if values.ndim == 1 else values[indices, :width]
            for name, values in rows.items()
        }
        yield batch | {"weights": weights.astype(np.float32)}


def _batch_indices(
    lengths: np.ndarray, batch_size: int, seed: Sequence[int] | int | None
) -> Iterator[np.ndarray]:
    """The rows of each batch, one of which may be incomplete."""
    count = len(lengths)
    if seed is None:
        yield from np.split(np.arange(count), range(batch_size, count, batch_size))
        return
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    for group in np.split(order, range(_GROUP * batch_size, count, _GROUP * batch_size)):
        by_length = group[np.argsort(lengths[group], kind="stable")]
        found = np.split(by_length, range(batch_size, len(group), batch_size))
        for index in generator.permutation(len(found)):
            yield found[index]


def _read_json(path: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer = _as_configured(tokenizer.normalizer, path)
    return tokenizer


def _read_byte_level_bpe(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    space = bool(settings_beside(vocabulary).get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    first, separator = _special_ids(tokenizer, vocabulary, "<s>", "</s>")
    tokenizer.post_processor = processors.RobertaProcessing(
        separator, first, add_prefix_space=space
    )
    return tokenizer


def _read_word_piece(vocabulary: Path) -> tokenizers.Tokenizer:
    if (kind := settings_beside(vocabulary).get("tokenizer_class")) == "BertJapaneseTokenizer":
        raise InputError(
            f"{vocabulary} is of a {kind}, whose division into words is not supported: choose "
            "another model."
        )
    tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
    tokenizer.normalizer = _as_configured(normalizers.BertNormalizer(), vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, separator = _special_ids(tokenizer, vocabulary, "[CLS]", "[SEP]")
    tokenizer.post_processor = processors.BertProcessing(separator, first)
    return tokenizer


def _as_configured(
    normalizer: normalizers.BertNormalizer, vocabulary: Path
) -> normalizers.BertNormalizer:
    """The normalizer with the settings of the tokenizer_config.json beside the vocabulary."""
    settings = settings_beside(vocabulary)
    for name, ours in _LETTERS.items():
        if name in settings:
            setattr(normalizer, ours, settings[name])
    return normalizer


def _special_ids(tokenizer: tokenizers.Tokenizer, path: Path, *names: str) -> list[tuple[str, int]]:
    """The special tokens and their ids."""
    found = []
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise InputError(f"{path} has no token {name}: give the vocabulary of the model.")
        found.append((name, token_id))
    return found
