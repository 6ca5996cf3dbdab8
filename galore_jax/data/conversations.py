"""Conversations from JSONL files of chat messages, rendered and tokenised.

A line of a file is

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
"""

import json
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.data.chat_template import ChatTemplate, Message
from galore_jax.data.packing import Conversation
from galore_jax.errors import InputError

FILES = {"train": "train.jsonl", "validation": "validation.jsonl"}
_ROLES = ("system", "user", "assistant")
Row = tuple[str, bytes]  # its place in a file, for people; and its JSON


class Conversations:
    """Conversations by index, each cut at a number of tokens.

    All are read and tokenised once, at the start; their tokens stay in memory, five bytes each. A
    conversation is left out if its answers are all empty, or begin after that number of tokens.

    Attributes:
        tokens: number of tokens in all conversations.
        report: what was read, cut and left out, in one sentence.

    Args:
        rows: those of a file that are to be read.
        template: renders and tokenises them.
        length: tokens of a conversation that are kept.

    Raises:
        InputError: a row is not a conversation with an answer, the template refuses it, or no
            answer ends with the tokenizer's end of sequence, so that none would be learnt.
    """

    def __init__(self, rows: Sequence[Row], template: ChatTemplate, length: int):
        self._conversations: list[Conversation] = []
        self.tokens = answers = ends = cut = 0
        for place, text in rows:
            try:
                messages = _messages(text)
                conversation = template.encode(messages)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            # Copies, as a slice would keep all of the array.
            kept = Conversation(*(array[:length].copy() for array in conversation))
            # The first token of a conversation is not predicted.
            answers_of = [m["content"] for m in messages if m["role"] == "assistant"]
            if not (kept.is_answer[1:].any() and any(map(str.strip, answers_of))):
                continue
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
        left_out = len(rows) - len(self)
        self.report = (
            f"{len(self):,} conversations of {self.tokens:,} tokens, {answers:,} of them "
            f"in answers; cut at {length:,} tokens: {cut:,}; left out, as their answers begin "
            f"later or are empty: {left_out:,}"
        )

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self._conversations[index]


def open_conversations(
    source: str, split: str, held_out: int | float, tokenizer: str, length: int
) -> Conversations:
    """Reads the conversations of a split.

    Args:
        source: a JSONL file, of which a part is held out for validation; or a folder with
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
    is_folder = path.is_dir()
    path = path / FILES[split] if is_folder else path
    rows = _read_rows(path)
    if not is_folder:
        rows = [rows[index] for index in _split(len(rows), split, held_out, path)]
    conversations = Conversations(rows, ChatTemplate(tokenizer), length)
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


def _read_rows(path: Path) -> list[Row]:
    """The lines of a JSONL file that are not blank."""
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): name a folder that has it, or a .jsonl "
            "file, as data.source."
        ) from None
    return [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]


def _messages(text: bytes) -> list[Message]:
    """The messages of a line.

    Raises:
        InputError: there are none, a role is unknown, a text is missing, or there is no answer.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not JSON: {error}.") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(
            "this is not a conversation: it needs messages, a list of objects with a role, one of "
            f"{', '.join(_ROLES)}, and a text content, and is {row!r:.60}."
        )
    messages = [{"role": each["role"], "content": each["content"]} for each in messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("the conversation has no answer to train on: add one, or remove it.")
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError:
        raise InputError("a text has an unpaired surrogate, which is not a character.") from None
    return messages


def _is_message(message: Any) -> bool:
    has_keys = isinstance(message, dict) and message.get("role") in _ROLES
    return has_keys and isinstance(message.get("content"), str)
