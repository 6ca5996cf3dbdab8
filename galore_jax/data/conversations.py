"""Conversations from JSON files: Alpaca, ShareGPT and chat messages, rendered and tokenised.

A row of a file is one of

    {"instruction": …, "input": …, "output": …}                            Alpaca
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}  ShareGPT
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}  chat
"""

import json
from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.data.chat_template import ChatTemplate, Message
from galore_jax.data.packing import Conversation
from galore_jax.errors import InputError

_FILES = {"train": "train.jsonl", "validation": "validation.jsonl"}
_CHAT = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT = {"human": "user", "gpt": "assistant", **_CHAT}


class JsonRows:
    """The values in a JSONL file, one per line, or in a JSON file of one array.

    For a JSONL file only the positions of the lines are kept in memory.

    Args:
        path: the file. Blank lines do not count.

    Raises:
        InputError: the file cannot be read, or its array is not valid JSON.
    """

    def __init__(self, path: Path):
        self._path, self._array = path, None
        self._starts, self._numbers, position = [], [], 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._starts.append(position)
                        self._numbers.append(number)
                    position += len(line)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): name a folder that has it, or a .jsonl "
                "file, as data.source."
            ) from None
        if self._starts and self._read(0).lstrip(BOM_UTF8 + b" \t").startswith(b"["):
            self._array = _parse(path.read_bytes(), str(path))

    def __len__(self) -> int:
        return len(self._starts if self._array is None else self._array)

    def __getitem__(self, index: int) -> Any:
        """Raises an `InputError` if the line is not JSON."""
        if self._array is not None:
            return self._array[index]
        return _parse(self._read(index), self.place(index))

    def place(self, index: int) -> str:
        """Where a row stands, for people."""
        if self._array is not None:
            return f"{self._path}, item {index + 1}"
        return f"{self._path}, line {self._numbers[index]}"

    def _read(self, index: int) -> bytes:
        # Several threads read, so each opens the file for itself.
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline()


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}.") from None


class Conversations:
    """Conversations by index, each cut at a number of tokens.

    All are read and tokenised once, at the start; their tokens stay in memory, five bytes each. A
    conversation is left out if its answers are all empty, or begin after that number of tokens.

    Attributes:
        tokens: number of tokens in all conversations.
        report: what was read, cut and left out, in one sentence.

    Args:
        rows: those of a file.
        indices: which of them.
        template: renders and tokenises them.
        length: tokens of a conversation that are kept.

    Raises:
        InputError: a row is not a conversation with an answer, the template refuses it, or no
            answer ends with the tokenizer's end of sequence, so that none would be learnt.
    """

    def __init__(self, rows: JsonRows, indices: np.ndarray, template: ChatTemplate, length: int):
        self._rows, self._indices = rows, list[int]()
        self._conversations: list[Conversation] = []
        self.tokens = answers = ends = cut = 0
        for index in indices.tolist():
            messages, conversation = _encoded(rows, index, template)
            # Copies, as a slice would keep all of the array.
            kept = Conversation(*(array[:length].copy() for array in conversation))
            # The first token of a conversation is not predicted.
            if not (kept.is_answer[1:].any() and _has_answer(messages)):
                continue
            self._indices.append(index)
            self._conversations.append(kept)
            self.tokens += len(kept.tokens)
            answers += int(kept.is_answer.sum())
            ends += int((conversation.tokens[conversation.is_answer] == template.eos_id).sum())
            cut += len(kept.tokens) < len(conversation.tokens)
        if answers and not ends:
            raise InputError(
                "no answer has the tokenizer's end-of-sequence token, which ends generation: name "
                "the token that ends an answer in the chat template as eos_token in "
                "tokenizer_config.json."
            )
        left_out = len(indices) - len(self._indices)
        self.report = (
            f"{len(self._indices):,} conversations of {self.tokens:,} tokens, {answers:,} of them "
            f"in answers; cut at {length:,} tokens: {cut:,}; left out, as their answers begin "
            f"later or are empty: {left_out:,}"
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        return self._conversations[index]

    def messages(self, index: int) -> list[Message]:
        """The messages of a conversation, which is not cut."""
        return _messages(self._rows[self._indices[index]])


def _encoded(
    rows: JsonRows, index: int, template: ChatTemplate
) -> tuple[list[Message], Conversation]:
    row = rows[index]
    try:
        messages = _messages(row)
        return messages, template.encode(messages)
    except InputError as error:
        raise InputError(f"{rows.place(index)}: {error}") from None


def open_conversations(
    source: str, split: str, held_out: int | float, tokenizer: str, length: int
) -> Conversations:
    """Reads the conversations of a split.

    Args:
        source: a JSON file, of which a part is held out for validation; or a folder with
            train.jsonl and validation.jsonl.
        split: "train" or "validation".
        held_out: number or fraction of the conversations of a file that form the validation
            split. Which ones depends only on how many there are.
        tokenizer: the path of a tokenizer.json with a chat template.
        length: conversations are cut at this number of tokens.

    Raises:
        InputError: as for `Conversations` and `ChatTemplate`; a file is missing, or too small for
            its validation split.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"there is no data.source {path}: give a JSONL file of conversations, or a folder with "
            f"{' and '.join(_FILES.values())}."
        )
    if path.is_dir():
        path = path / _FILES[split]
        rows = JsonRows(path)
        indices = np.arange(len(rows))
    else:
        rows = JsonRows(path)
        indices = _split(len(rows), split, held_out, path)
    conversations = Conversations(rows, indices, ChatTemplate(tokenizer), length)
    if not len(conversations):
        raise InputError(
            f"the {split} split in {path} is empty ({conversations.report}): add conversations, "
            "or raise data.sequence_length."
        )
    return conversations


def _split(count: int, split: str, held_out: int | float, path: Path) -> np.ndarray:
    number = held_out if isinstance(held_out, int) else max(1, round(count * held_out))
    if number >= count:
        raise InputError(
            f"{path} has {count} conversations, too few for data.held_out = {held_out} and a "
            "training: add conversations."
        )
    # RandomState draws the same numbers in every version of NumPy.
    order = np.random.RandomState(0).permutation(count)
    return np.sort(order[:number] if split == "validation" else order[number:])


def _messages(row: Any) -> list[Message]:
    """The messages of a row of any of the three formats.

    Raises:
        InputError: it has none of them, a role is unknown, a text is missing, or there is no
            answer.
    """
    if not isinstance(row, dict):
        raise InputError("this is not an object with the keys of a conversation.")
    if "messages" in row:
        messages = _listed(row, "messages", ("role", "content"), _CHAT)
    elif "conversations" in row:
        messages = _listed(row, "conversations", ("from", "value"), _SHAREGPT)
    elif "instruction" in row and "output" in row:
        question = [_text(row, "instruction"), _text({"input": row.get("input") or ""}, "input")]
        messages = [
            {"role": "user", "content": "\n\n".join(filter(None, question))},
            {"role": "assistant", "content": _text(row, "output")},
        ]
    else:
        raise InputError(
            "this is not a conversation: it needs the key messages, or conversations, or "
            f"instruction and output, and has {', '.join(row) or 'none'}."
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("the conversation has no answer to train on: add one, or remove it.")
    return messages


def _has_answer(messages: list[Message]) -> bool:
    return any(each["role"] == "assistant" and each["content"].strip() for each in messages)


def _listed(
    row: Mapping[str, Any], key: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> list[Message]:
    listed = row[key]
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{key} must be a list of at least one message, not {listed!r:.40}.")
    messages = []
    for number, message in enumerate(listed, 1):
        if not isinstance(message, dict):
            raise InputError(f"message {number} must have {keys[0]} and {keys[1]}.")
        role = _text(message, keys[0], number)
        if role not in roles:
            raise InputError(
                f"message {number} is {keys[0]} {role!r}, which is unknown; there are "
                f"{', '.join(roles)}."
            )
        messages.append({"role": roles[role], "content": _text(message, keys[1], number)})
    return messages


def _text(table: Mapping[str, Any], key: str, number: int | None = None) -> str:
    value = table.get(key)
    of = "" if number is None else f" of message {number}"
    if not isinstance(value, str):
        raise InputError(f"{key}{of} must be text, not {value!r:.40}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{key}{of} has an unpaired surrogate, which is not a character."
        ) from None
    return value
