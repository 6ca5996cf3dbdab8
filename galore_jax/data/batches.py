"""Batches of token rows: documents → tokens → rows → batches, shuffled, sharded and resumable."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from galore_jax.data.packing import PackedRows, Rows, pack
from galore_jax.data.stdlib_corpus import standard_library_texts
from galore_jax.data.tokenizers import Tokenizer
from galore_jax.errors import InputError

_WINDOW_TOKENS = 2**20  # packed rows are shuffled among about as many tokens
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_BATCHES_AHEAD = 8  # hides the reading of a window
_DOCUMENTS_TRIED = 10_000


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes batches.

    Attributes:
        source: "python", the text of the standard library; or a folder made by prepare_c4.py.
        tokenizer: "bytes", or the path of a SentencePiece `.model` or a `tokenizer.json`.
        rows: "packed", documents end to end without padding; or "documents", the reference's: one
            document a row, truncated or padded, with an eos.
        sequence_length: tokens a row.
        batch_size: rows a step, over all processes.
        seed: of the shuffle.
    """

    source: str = "python"
    tokenizer: str = "bytes"
    rows: str = "packed"
    sequence_length: int = 256
    batch_size: int = 512
    seed: int = 42

    def __post_init__(self):
        if self.rows not in ("packed", "documents"):
            raise InputError(f'data.rows is "{self.rows}": choose "packed" or "documents".')
        if self.sequence_length < 2:
            raise InputError(
                f"data.sequence_length is {self.sequence_length}: at least 2 is needed."
            )
        if self.batch_size < 1:
            raise InputError(f"data.batch_size is {self.batch_size}: at least 1 is needed.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"data.seed is {self.seed}: it should lie in 0 … 2**32 - 1.")


def documents(config: DataConfig, split: str) -> Sequence[str]:
    """The texts of `split`, "train" or "validation", by index.

    Raises:
        InputError: `config.source` is neither "python" nor a folder made by prepare_c4.py.
    """
    if config.source == "python":
        return standard_library_texts(split)
    from galore_jax.data.c4 import open_c4  # TFDS takes a second to import

    return open_c4(config.source, split)


def train_batches(
    config: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Rows]:
    """Endless batches of the training split.

    Every epoch has its own order, drawn from `config.seed`; a process sees every
    `process_count`-th document. The iterator resumes exactly: `get_state` returns a few numbers
    that JSON can hold, `set_state` on a new iterator of the same arguments continues with the
    next batch.

    Args:
        config: what to read and how.
        tokenizer: from `load_tokenizer(config.tokenizer)`.
        process_index: this process, from 0.
        process_count: processes that share the batch.

    Returns:
        An iterator over {"tokens", "segments", "positions"}, int32 of shape
        (batch_size / process_count, sequence_length). Segments count the documents of a row from
        1, 0 is padding; positions restart with each document.

    Raises:
        InputError: the source is unusable, too small or almost without text, or the batch does not
            divide.
    """
    rows_per_process = _rows_per_process(config, process_count)
    texts = documents(config, "train")
    if len(texts) < process_count:
        raise InputError(
            f"{config.source} holds {len(texts)} training documents, too few for "
            f"{process_count} processes."
        )
    _check_text(config, texts, "train")
    own = grain.MapDataset.source(texts)[process_index::process_count]
    endless = own.seed(config.seed).shuffle().repeat()
    window = max(1, _WINDOW_TOKENS // config.sequence_length)
    batches = _rows(endless, config, tokenizer, window, config.seed).batch(rows_per_process)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD)
    )


def validation_batches(
    config: DataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> Iterable[Rows]:
    """The whole validation split once, in its own order, each time it is iterated over.

    All processes go through the split together: batch i of every process is its part of the rows
    of the global batch i, so they take the same number of steps and the union does not depend on
    how many there are. The last batch is filled with rows of padding.

    Args, element type and errors are those of `train_batches`.
    """
    rows_per_process = _rows_per_process(config, process_count)
    texts = documents(config, "validation")
    _check_text(config, texts, "validation")
    own = slice(process_index * rows_per_process, (process_index + 1) * rows_per_process)

    def part_of_whole_batch(rows: Sequence[Rows]) -> Rows:
        batch = grain.experimental.batch_and_pad(rows, batch_size=config.batch_size)
        return {name: values[own] for name, values in batch.items()}

    in_order = grain.MapDataset.source(texts)
    rows = _rows(in_order, config, tokenizer, window=config.batch_size, seed=None)
    return rows.batch(config.batch_size, batch_fn=part_of_whole_batch)


def _rows(
    texts: grain.MapDataset[str],
    config: DataConfig,
    tokenizer: Tokenizer,
    window: int,
    seed: int | None,
) -> grain.IterDataset[Rows]:
    length, pad_id = config.sequence_length, tokenizer.pad_id

    def with_eos(text: str) -> np.ndarray:
        return np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)

    def row_of_document(text: str) -> Rows:
        tokens = with_eos(text)
        if len(tokens) > length:
            tokens = np.append(tokens[: length - 1], tokens[-1:])
        return {name: values[0] for name, values in pack([tokens], length, pad_id).items()}

    if config.rows == "documents":
        return texts.map(row_of_document).to_iter_dataset(_READING)
    tokenised = texts.map(with_eos).to_iter_dataset(_READING)
    return PackedRows(tokenised, length, pad_id, window, seed)


def _check_text(config: DataConfig, texts: Sequence[str], split: str) -> None:
    """Refuses documents of less than a letter on average, by a random sample of the split.

    They are rows without a target, and where rows are packed, hours of reading for one window.
    """
    tried = min(len(texts), _DOCUMENTS_TRIED)
    letters = 0
    for index in random.Random(0).sample(range(len(texts)), tried):
        letters += len(texts[index].strip())
        if letters >= tried:
            return
    raise InputError(
        f"almost all documents in the {split} split of data.source = {config.source!r} are empty "
        f"({letters:,} letters in {tried:,} documents): choose another source, or prepare it again "
        "from files with text."
    )


def _rows_per_process(config: DataConfig, process_count: int) -> int:
    if config.batch_size % process_count:
        raise InputError(
            f"data.batch_size is {config.batch_size}: it should be a multiple of the "
            f"{process_count} processes."
        )
    return config.batch_size // process_count
