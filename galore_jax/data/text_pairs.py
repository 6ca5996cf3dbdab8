"""Texts and pairs of texts as rows of tokens, and batches of them, for RoBERTa and BERT."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from galore_jax.data.tokenizers import load_pretrained
from galore_jax.errors import InputError, one_sentence

_GROUP = 50  # batches of which rows are sorted by length
_ENCODED_AT_ONCE = 1000  # the lists of tokens take 14 times the memory of the arrays made of them


class PairTokenizer:
    """The tokenizer of a RoBERTa or BERT, as transformers loads it.

    Attributes:
        vocab_size: ids are below it.
        pad_id: the token that fills rows.

    Args:
        folder: with config.json and a `tokenizer.json`; or `vocab.json` and `merges.txt` (RoBERTa's
            byte-level BPE); or `vocab.txt` (BERT's WordPiece).

    Raises:
        InputError: there is no tokenizer, a file of it is damaged, or it has no padding or special
            tokens.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(self, folder: str | Path):
        pretrained = load_pretrained(Path(folder), "AutoTokenizer")
        self._place = f"the tokenizer in {folder}"
        self._backend, self._pad = pretrained.backend_tokenizer, pretrained.pad_token
        if self._pad is None or not self._backend.num_special_tokens_to_add(True):
            raise InputError(
                f"{self._place} is not that of a RoBERTa or BERT: it has no padding, or puts no "
                "special tokens around a text."
            )
        # A text that looks like a special token stays text, so that only padding is padding.
        self._backend.encode_special_tokens = True
        # A model may have no row for a mask that its vocabulary lacks.
        mask = pretrained.mask_token
        ids = [id for token, id in pretrained.get_vocab().items() if token != mask]
        self.vocab_size: int = max(ids) + 1
        self.pad_id: int = pretrained.pad_token_id

    def encode(
        self, texts: Sequence[tuple[str, str | None]], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts, or pairs of texts, as rows of `length` tokens.

        If a pair is too long, tokens are removed from the end of the longer text until both are
        equally long, then from both.

        Returns:
            Tokens and token types (0 for the first text and, if the tokenizer tells them apart, 1
            for the second), both int32 (texts, length).

        Raises:
            InputError: a text cannot be encoded.
        """
        self._backend.enable_truncation(length, strategy="longest_first")
        self._backend.enable_padding(length=length, pad_id=self.pad_id, pad_token=self._pad)
        inputs = [text_a if text_b is None else (text_a, text_b) for text_a, text_b in texts]
        tokens, types = np.empty((2, len(texts), length), np.int32)
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            part = slice(start, start + _ENCODED_AT_ONCE)
            with one_sentence(f"{self._place} cannot encode a text"):
                encoded = self._backend.encode_batch(inputs[part])
            tokens[part] = [row.ids for row in encoded]
            types[part] = [row.type_ids for row in encoded]
        return tokens, types


def batches(
    rows: Mapping[str, np.ndarray],
    batch_size: int,
    pad_id: int,
    seed: Sequence[int] | int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields all rows once, in batches of equal size.

    Each batch is cut to the shortest of four lengths that holds its rows; a step is compiled for
    each length. To leave little padding, rows are drawn at random into groups of 50 batches, and a
    batch has rows of similar length from one group.

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
