"""Batches of token rows: documents or conversations → tokens → rows → batches, resumable.

All processes of a training read the same batches, and each puts its own rows on its devices. So the
order and the iterator's state depend only on the configuration.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import grain
import numpy as np
from pydantic import Field, PositiveInt

from galore_jax.data.conversations import FILES, open_conversations
from galore_jax.data.packing import (
    NO_TARGET,
    Rows,
    WindowedRows,
    fitted_window,
    pack,
    packed_window,
)
from galore_jax.data.stdlib_corpus import standard_library_texts
from galore_jax.data.tokenizers import Tokenizer, tokenizer_files
from galore_jax.errors import InputError
from galore_jax.settings import checked

_WINDOW_TOKENS = 2**20  # packed rows are shuffled within windows of about this many tokens
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_PREFETCHED_BATCHES = 8  # hides the time to read a window
_DOCUMENTS_SAMPLED = 10_000
_DOCUMENTS_SUMMED = 1000
Report = Callable[[str], object]


@checked("data")
@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches.

    Attributes:
        source: "python", the source text of the standard library; or a folder made by
            prepare_c4.py; or, for conversations, a JSONL file, or a folder with train.jsonl and
            validation.jsonl.
        tokenizer: "bytes", or the path of a SentencePiece `.model` or a `tokenizer.json`; for
            conversations the last, with its chat template.
        rows: "packed", documents end to end without padding; or "documents", one per row, truncated
            or padded, with an eos token, as in the reference implementation; or "conversations",
            never cut to fill a row, and trained on their answers only.
        held_out: number or fraction of the conversations of a single file that form the
            validation split.
        sequence_length: tokens per row.
        batch_size: rows per step, over all processes.
        seed: random seed of the shuffle, from 0 to 2³² - 1.

    Raises:
        InputError: a value out of range.
    """

    source: str = "python"
    tokenizer: str = "bytes"
    rows: Literal["packed", "documents", "conversations"] = "packed"
    held_out: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.05
    sequence_length: Annotated[int, Field(ge=2)] = 256
    batch_size: PositiveInt = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def __post_init__(self):
        if self.rows == "conversations" and self.source == "python":
            raise InputError(
                'data.rows = "conversations" needs data.source, a JSONL file of conversations or a '
                "folder with train.jsonl and validation.jsonl."
            )


def documents(config: DataConfig, split: str) -> Sequence[str]:
    """The documents of `split`, "train" or "validation", by index.

    Raises:
        InputError: `config.source` is neither "python" nor a folder made by prepare_c4.py.
    """
    if config.source == "python":
        return standard_library_texts(split)
    from galore_jax.data.c4 import open_c4  # TFDS takes a second to import

    return open_c4(config.source, split)


def train_batches(
    config: DataConfig, tokenizer: Tokenizer, report: Report | None = None
) -> grain.DatasetIterator[Rows]:
    """Endless batches of the training split.

    Each epoch has a different order, drawn from `config.seed`. A new iterator with the same
    arguments continues exactly after `set_state`; `get_state` returns numbers that JSON can hold.

    Args:
        config: what to read, and how to batch it.
        tokenizer: from `load_tokenizer(config.tokenizer)`.
        report: receives a sentence about how many conversations were read, cut and left out.

    Returns:
        An iterator over {"tokens", "segments", "positions", "targets"}, int32 of shape
        (batch_size, sequence_length). Segments number the documents or conversations of a row from
        1, 0 is padding; positions restart with each of them. Targets are the tokens to predict, in
        conversations only those of answers; -1 where there is none.

    Raises:
        InputError: the source is unusable or almost without text.
    """
    source = _source(config, tokenizer, "train", report)
    endless = grain.MapDataset.source(source).seed(config.seed).shuffle().repeat()
    batches = _rows(source, endless, config, tokenizer, config.seed).batch(config.batch_size)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=_PREFETCHED_BATCHES
        )
    )


def validation_batches(
    config: DataConfig, tokenizer: Tokenizer, report: Report | None = None
) -> Iterable[Rows]:
    """The complete validation split in order, once per iteration.

    The last batch is filled up with rows of padding. Arguments, element type and errors are those
    of `train_batches`.
    """

    def padded(rows: Sequence[Rows]) -> Rows:
        batch = grain.experimental.batch_and_pad(rows, batch_size=config.batch_size)
        batch["targets"][len(rows) :] = NO_TARGET
        return batch

    source = _source(config, tokenizer, "validation", report)
    rows = _rows(source, grain.MapDataset.source(source), config, tokenizer, seed=None)
    return rows.batch(config.batch_size, batch_fn=padded)


def fingerprint(config: DataConfig) -> dict[str, int]:
    """Numbers that change if the training text, the validation text or the tokenizer changes.

    They are the number of documents, or of bytes in a file of conversations; and checksums of these
    (of documents a thousand at most), of the validation split and of the tokenizer's files.
    """
    tokenizer = tokenizer_checksum(config.tokenizer)
    if config.rows == "conversations":
        source = Path(config.source)
        text = (source / FILES["train"] if source.is_dir() else source).read_bytes()
        found = {"bytes": len(text), "checksum": zlib.crc32(text), "tokenizer": tokenizer}
        if source.is_dir():
            found["validation"] = zlib.crc32((source / FILES["validation"]).read_bytes())
        return found
    texts = documents(config, "train")
    return {
        "documents": len(texts),
        "checksum": _text_checksum(texts),
        "validation": _text_checksum(documents(config, "validation")),
        "tokenizer": tokenizer,
    }


def tokenizer_checksum(tokenizer: str) -> int:
    """A checksum of the files that determine the tokens."""
    checksum = 0
    for file in tokenizer_files(tokenizer):
        checksum = zlib.crc32(file.read_bytes(), checksum)
    return checksum


def _text_checksum(texts: Sequence[str]) -> int:
    checksum = 0
    for index in range(0, len(texts), max(1, len(texts) // _DOCUMENTS_SUMMED)):
        checksum = zlib.crc32(texts[index].encode("utf-8", "surrogatepass"), checksum)
    return checksum


def _source(config: DataConfig, tokenizer: Tokenizer, split: str, report: Report | None) -> Any:
    """The texts or the conversations of a split, by index."""
    if config.rows == "conversations":
        source, length = config.source, config.sequence_length
        conversations = open_conversations(source, split, config.held_out, config.tokenizer, length)
        if report is not None:
            report(f"{split}: {conversations.report}")
        return conversations
    texts = documents(config, split)
    _check_text(config, tokenizer, texts, split)
    return texts


def _rows(
    source: Any,
    elements: grain.MapDataset[Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int | None,
) -> grain.IterDataset[Rows]:
    """Rows of the elements of a source, shuffled in windows by a seed; None: in order."""
    length, pad_id = config.sequence_length, tokenizer.pad_id

    def with_eos(text: str) -> np.ndarray:
        return np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)

    def row_of_document(text: str) -> Rows:
        tokens = with_eos(text)
        if len(tokens) > length:
            tokens = np.append(tokens[: length - 1], tokens[-1:])
        return {name: values[0] for name, values in pack([tokens], length, pad_id).items()}

    if config.rows == "documents":
        return elements.map(row_of_document).to_iter_dataset(_READ_OPTIONS)
    if config.rows == "conversations":
        # At most an epoch: otherwise copies of a conversation, equally long, would share rows.
        window = max(1, int(len(source) * min(1, _WINDOW_TOKENS / source.tokens)))
        read = partial(fitted_window, size=window, length=length, pad_id=pad_id)
        return WindowedRows(elements.to_iter_dataset(_READ_OPTIONS), read, seed)
    tokenised = elements.map(with_eos).to_iter_dataset(_READ_OPTIONS)
    window = config.batch_size if seed is None else max(1, _WINDOW_TOKENS // length)
    read = partial(packed_window, rows=window, length=length, pad_id=pad_id)
    return WindowedRows(tokenised, read, seed)


def _check_text(config: DataConfig, tokenizer: Tokenizer, texts: Sequence[str], split: str) -> None:
    """Raises an `InputError` if a random sample of documents has less than one token on average.

    Otherwise rows would have no targets, and packing would take hours to fill a window.
    """
    sampled = min(len(texts), _DOCUMENTS_SAMPLED)
    tokens = 0
    for index in random.Random(0).sample(range(len(texts)), sampled):
        tokens += len(tokenizer.encode(texts[index].strip()))
        if tokens >= sampled:
            return
    raise InputError(
        f"almost all documents in the {split} split of data.source = {config.source!r} are empty "
        f"({tokens:,} tokens in {sampled:,} documents): choose another source, or prepare it "
        "again from files with text."
    )
