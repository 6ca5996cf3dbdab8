"""Packed rows: documents end to end, cut at the ends of rows, or whole conversations."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import grain
import numpy as np

Rows = dict[str, np.ndarray]
NO_TARGET = -1


def pack(pieces: Sequence[np.ndarray], length: int, pad_id: int) -> Rows:
    """Concatenates `pieces` and cuts them into rows; only the last row may need padding.

    Args:
        pieces: token ids of documents, or of parts of them, each of shape (n,), n > 0.
        length: tokens per row.
        pad_id: token id that fills the last row.

    Returns:
        "tokens", "segments", "positions" and "targets", int32 of shape (rows, length). Segments
        number the pieces of a row from 1, 0 is padding; positions count from 0 in each piece of a
        row. The target of a position is the next token of its piece, -1 at the end of the piece.

    >>> rows = pack([np.array([7, 8, 9]), np.array([5, 6])], length=4, pad_id=0)
    >>> rows["tokens"].tolist(), rows["segments"].tolist()
    ([[7, 8, 9, 5], [6, 0, 0, 0]], [[1, 1, 1, 2], [1, 0, 0, 0]])
    >>> rows["positions"].tolist(), rows["targets"].tolist()
    ([[0, 1, 2, 0], [0, 0, 0, 0]], [[8, 9, -1, -1], [-1, -1, -1, -1]])
    """
    ends = np.cumsum([len(piece) for piece in pieces])
    count = -(-ends[-1] // length)
    tokens = np.full(count * length, pad_id, np.int32)
    tokens[: ends[-1]] = np.concatenate(pieces)
    is_token = np.arange(count * length).reshape(count, length) < ends[-1]
    starts = np.zeros(count * length, bool)
    starts[ends[:-1]] = True
    starts = starts.reshape(count, length)
    starts[:, 0] = True
    columns = np.arange(length)
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    tokens = tokens.reshape(count, length)
    targets = np.full_like(tokens, NO_TARGET)
    continues = is_token[:, 1:] & ~starts[:, 1:]
    targets[:, :-1] = np.where(continues, tokens[:, 1:], NO_TARGET)
    return {
        "tokens": tokens,
        "segments": np.where(is_token, np.cumsum(starts, axis=1), 0).astype(np.int32),
        "positions": np.where(is_token, positions, 0).astype(np.int32),
        "targets": targets,
    }


class Conversation(NamedTuple):
    """The tokens of a conversation, int32 (n,), and which of them answer, bool (n,)."""

    tokens: np.ndarray
    is_answer: np.ndarray


def fit(conversations: Sequence[Conversation], length: int, pad_id: int) -> Rows:
    """Packs conversations into few rows without cutting any, by best fit, the longest first.

    Args:
        conversations: of at most `length` tokens each.
        length: tokens per row.
        pad_id: token id that fills the rest of each row.

    Returns:
        As `pack`, but only tokens of answers are targets.

    >>> is_answer = np.array([False, False, False, True, True])
    >>> rows = fit([Conversation(np.array([5, 6, 7, 8, 9]), is_answer)], length=6, pad_id=0)
    >>> rows["tokens"].tolist(), rows["targets"].tolist()
    ([[5, 6, 7, 8, 9, 0]], [[-1, -1, 8, 9, -1, -1]])
    """
    rows = []
    for members in _best_fit([len(each.tokens) for each in conversations], length):
        row = pack([conversations[index].tokens for index in members], length, pad_id)
        answers = np.concatenate([conversations[index].is_answer for index in members])
        targets = row["targets"][0, : len(answers) - 1]
        targets[~answers[1:]] = NO_TARGET
        rows.append(row)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `sizes`, in groups whose sizes sum to at most `room`."""
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # the room left in each group, ascending, and its number
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tightest = bisect_left(free, (sizes[index], 0))
        if tightest < len(free):
            left, group = free.pop(tightest)
        else:
            left, group = room, len(groups)
            groups.append([])
        groups[group].append(index)
        insort(free, (left - sizes[index], group))
    return groups


def packed_window(
    documents: grain.DatasetIterator[np.ndarray], offset: int, rows: int, length: int, pad_id: int
) -> tuple[Rows, int]:
    """The next `rows` rows that `pack` makes of a stream of documents, for `WindowedRows`.

    A document, token ids int32 (n,), that does not fit into the rest of a row continues in the next
    row as a separate segment. `offset` is the number of tokens of the first document that earlier
    windows have; if the documents end, the last row is padded.
    """
    pieces, room = [], rows * length
    while room:
        before = documents.get_state()
        document = next(documents, None)
        if document is None:
            break
        piece = document[offset : offset + room]
        room -= len(piece)
        pieces.append(piece)
        offset += len(piece)
        if offset == len(document):
            offset = 0
        else:  # The window is full; the next one reads this document again.
            documents.set_state(before)
    if not pieces:
        raise StopIteration
    return pack(pieces, length, pad_id), offset


def fitted_window(
    conversations: grain.DatasetIterator[Conversation],
    offset: int,
    size: int,
    length: int,
    pad_id: int,
) -> tuple[Rows, int]:
    """As `packed_window`, but the rows that `fit` makes of the next `size` conversations."""
    window = list(islice(conversations, size))
    if not window:
        raise StopIteration
    return fit(window, length, pad_id), offset


# From a stream, and an offset in its next element, to rows and the offset for the next window;
# raises StopIteration at the end.
ReadWindow = Callable[[grain.DatasetIterator, int], tuple[Rows, int]]


class WindowedRows(grain.IterDataset[Rows]):
    """Rows of shape (length,) made of a stream of documents or conversations, window by window.

    With a seed the rows of a window are shuffled, so that one long document does not fill a batch.
    The iterator's state is a few numbers for any size of the window, because a restored iterator
    reads the current window again.
    """

    def __init__(self, documents: grain.IterDataset, read: ReadWindow, seed: int | None):
        super().__init__(documents)
        self._settings = (read, seed)

    def __iter__(self) -> grain.DatasetIterator[Rows]:
        return _WindowIterator(iter(self._parent), *self._settings)

    def __str__(self) -> str:
        return type(self).__name__


class _WindowIterator(grain.DatasetIterator[Rows]):
    def __init__(self, documents: grain.DatasetIterator, read: ReadWindow, seed: int | None):
        super().__init__(documents)
        self._documents, self._read, self._seed = documents, read, seed
        # Where the current window starts, and the next row in it.
        self._state = {"documents": documents.get_state(), "offset": 0, "window": 0, "row": 0}
        self._rows: Rows | None = None  # None: the window is not read yet
        self._next: dict[str, Any] = {}  # the state at the start of the next window

    def __next__(self) -> Rows:
        if self._rows is None:
            self._rows, self._next = self._read_window(self._state)
        if self._state["row"] == len(self._rows["tokens"]):
            state = self._next
            self._rows, self._next = self._read_window(state)
            self._state = state
        row = {name: values[self._state["row"]] for name, values in self._rows.items()}
        self._state["row"] += 1
        return row

    def _read_window(self, state: dict[str, Any]) -> tuple[Rows, dict[str, Any]]:
        """The rows of the window that starts at a state, and the state after it."""
        window = state["window"]
        rows, offset = self._read(self._documents, state["offset"])
        after = {"documents": self._documents.get_state(), "offset": offset}
        if self._seed is not None:
            # RandomState draws the same numbers in every version of NumPy.
            random = np.random.RandomState([self._seed, window])
            order = random.permutation(len(rows["tokens"]))
            rows = {name: values[order] for name, values in rows.items()}
        return rows, {**after, "window": window + 1, "row": 0}

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = dict(state)
        self._documents.set_state(self._state["documents"])
        self._rows = None
