"""Conversations: formats, bad rows, splits, whole rows, and exactly resumed batches."""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from chats import ANSWER, CHATML, QUESTION, byte_level, chat, save_tokenizer

from galore_jax.data import batches
from galore_jax.data.batches import DataConfig, train_batches, validation_batches
from galore_jax.data.chat_template import ChatTemplate
from galore_jax.data.conversations import open_conversations
from galore_jax.data.packing import Conversation, fit
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError

LENGTH = 64
ROW = {"messages": chat(QUESTION, ANSWER)}


@pytest.fixture
def tokenizer(tmp_path):
    """The path of a tokenizer with a chat template."""
    return save_tokenizer(tmp_path, CHATML, eos_token="<|im_end|>")


@pytest.fixture
def write(tmp_path):
    """Writes a file of rows, or of lines as they are, and returns its path."""

    def write(rows, name="chats.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def many(count, turns=1):
    """Conversations of different lengths, each with a number of its own."""
    return [
        {"messages": chat(*[f"{number} " + "a b " * (number % 5), f"{number}."] * turns)}
        for number in range(count)
    ]


def everything(source, tokenizer, length=1000):
    """All conversations of a file that has validation data of its own."""
    return open_conversations(source, "train", 1, tokenizer, length)


def folder_of(write, rows):
    """A folder whose training split is the rows."""
    write([ROW], "folder/validation.jsonl")
    return write(rows, "folder/train.jsonl").removesuffix("/train.jsonl")


def test_the_conversation_and_the_template_of_the_documentation_work(write, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "instruction-tuning.md").read_text()
    blocks = dict(re.findall(r"^```(json|jinja)\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    tokenizer = save_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text(blocks["jinja"])
    read = everything(folder_of(write, blocks["json"].splitlines()), tokenizer)
    decode = functools.partial(byte_level().decode, skip_special_tokens=False)
    tokens, is_answer = read[0]
    assert decode(tokens.tolist()) == "<s><|user|>\nLegs?\n\ncat</s>\n<|assistant|>\n4</s>\n"
    assert decode(tokens[is_answer].tolist()) == "4</s>\n"
    read = everything(folder_of(write, [ROW, {"messages": chat("a", "b", "c", "d")}]), tokenizer)
    assert read[1].is_answer.sum() == 2 * is_answer.sum()


def test_a_template_whose_answers_do_not_end_with_the_end_of_sequence_is_refused(write, tmp_path):
    tokenizer = save_tokenizer(tmp_path, CHATML)  # which ends them with <|im_end|>
    with pytest.raises(InputError, match="no answer has the tokenizer's end-of-sequence token"):
        everything(folder_of(write, [ROW]), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro turn(text) %}A: {% generation %}{{ text }}{% endgeneration %}{% endmacro %}"
        "{% for message in messages %}{{ turn(message.content) }}{% endfor %}",
        "{% for message in messages %}{% filter trim %} A: {% generation %}{{ message.content }}"
        "{% endgeneration %}{% endfilter %}{% endfor %}",
    ],
    ids=["macro", "filter"],
)
def test_answers_whose_place_in_the_text_is_unknown_are_refused(template, write, tmp_path):
    tokenizer = save_tokenizer(tmp_path, template)
    with pytest.raises(InputError, match="inside of a macro, a filter or a call"):
        everything(folder_of(write, [ROW]), tokenizer)


def test_blank_lines_and_byte_order_marks_are_read(write, tokenizer):
    rows = many(4)
    lines = [json.dumps(row) for row in rows]
    expected = [each.tokens.tolist() for each in everything(folder_of(write, rows), tokenizer)]
    for number, text in enumerate(
        [
            ["", lines[0], "", "  ", *lines[1:], ""],
            ["\ufeff" + lines[0], *lines[1:]],
        ]
    ):
        write([ROW], f"folder{number}/validation.jsonl")
        folder = write(text, f"folder{number}/train.jsonl").removesuffix("/train.jsonl")
        assert [each.tokens.tolist() for each in everything(folder, tokenizer)] == expected


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"messages": [', "is not JSON"),
        ("17", "this is not a conversation: .*, and is 17"),
        ({"text": "a", "id": 3}, "this is not a conversation: it needs messages, a list of"),
        ({"messages": []}, "the conversation has no answer"),
        ({"messages": "a"}, "this is not a conversation"),
        ({"messages": ["a"]}, "this is not a conversation"),
        ({"messages": [{"role": "user"}]}, "this is not a conversation"),
        ({"messages": [{"role": "bot", "content": ""}]}, "role, one of system, user, assistant"),
        ({"messages": chat("a\ud83d", "b")}, "a text has an unpaired surrogate"),
        ({"messages": chat("a")}, "the conversation has no answer"),
        ({"messages": chat("", system="a")}, "the conversation has no answer"),
        ({"messages": chat("stop", "b")}, "the chat template refuses the messages: stopped"),
    ],
    ids=str,
)
def test_a_bad_row_is_refused_at_the_start_with_its_file_and_line(row, named, write, tmp_path):
    stops = (
        "{%- if messages[0].content == 'stop' -%}{{- raise_exception('stopped') -}}{%- endif -%}"
    )
    tokenizer = save_tokenizer(tmp_path, stops + CHATML, eos_token="<|im_end|>")
    folder = folder_of(write, [ROW, "", row, ROW])
    with pytest.raises(InputError, match=named) as refused:
        train_batches(config(folder, tokenizer), load_tokenizer(tokenizer))
    assert str(refused.value).startswith(f"{folder}/train.jsonl, line 3")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"source": "nowhere.jsonl"},
            r"nowhere\.jsonl cannot be read \(No such file or directory\): name a folder",
        ),
        ({"source": "."}, r"train\.jsonl cannot be read \(No such file or directory\): name"),
        ({"held_out": 3}, r"has 3 conversations, too few for data\.held_out = 3"),
        (
            {"sequence_length": 2},
            r"the train split in .* is empty \(0 conversations .* empty: 2\)",
        ),
        ({"tokenizer": "bytes"}, "'bytes' has no chat template"),
    ],
)
def test_settings_that_do_not_suit_the_files_are_refused(changes, named, write, tokenizer):
    settings = {"source": write([ROW] * 3), "tokenizer": tokenizer, "held_out": 1} | changes
    with pytest.raises(InputError, match=named):
        train_batches(DataConfig(rows="conversations", **settings), load_tokenizer(tokenizer))


@pytest.mark.parametrize("held_out", [0, -1, 1.0, 0.0, 1.5])
def test_a_part_that_cannot_be_held_out_is_refused(held_out):
    with pytest.raises(InputError, match=r"data\.held_out must be"):
        DataConfig(held_out=held_out)
    with pytest.raises(InputError, match=r'"conversations" needs data\.source, a JSONL file'):
        DataConfig(rows="conversations")


@pytest.mark.parametrize(("held_out", "number"), [(7, 7), (0.1, 4), (0.001, 1)])
def test_the_splits_of_a_file_are_disjoint_complete_and_always_the_same(
    held_out, number, write, tokenizer
):
    rows = many(40)
    source, other = write(rows), write(rows, "copy.jsonl")

    def read(source, split):
        found = open_conversations(source, split, held_out, tokenizer, LENGTH)
        return [each.tokens.tolist() for each in found]

    train, validation = read(source, "train"), read(source, "validation")
    assert len(validation) == number
    template = ChatTemplate(tokenizer)
    everything = [template.encode(row["messages"]).tokens.tolist() for row in rows]
    assert sorted(train + validation) == sorted(everything)
    assert (train, validation) == (read(other, "train"), read(other, "validation"))


def test_what_is_cut_and_left_out_is_reported(write, tokenizer):
    rows = [
        ROW,
        {"messages": chat(QUESTION, ANSWER * 3)},
        {"messages": chat(QUESTION * 9, ANSWER)},
        {"messages": chat(QUESTION, " \n")},
        {"messages": chat(QUESTION, "")},
    ]
    read = everything(folder_of(write, rows), tokenizer, LENGTH)
    lengths = [len(conversation.tokens) for conversation in read]
    answers = sum(int(conversation.is_answer.sum()) for conversation in read)
    assert lengths[0] < lengths[1] == LENGTH
    assert read.report == (
        f"2 conversations of {sum(lengths)} tokens, {answers} of them in answers; cut at 64 "
        "tokens: 1; left out, as their answers begin later or are empty: 3"
    )
    assert read[1].is_answer[-1]


def test_conversations_are_fitted_into_few_rows_and_never_cut():
    random = np.random.default_rng(0)
    sizes = random.integers(2, 50, 200)
    conversations = [
        Conversation(np.full(size, number), random.random(size) < 0.5)
        for number, size in enumerate(sizes, 1)
    ]
    rows = fit(conversations, LENGTH, pad_id=0)
    assert len(rows["tokens"]) <= np.ceil(sizes.sum() / LENGTH) + 2
    for conversation, size in zip(conversations, sizes, strict=True):
        (row,) = np.unique(np.nonzero(rows["tokens"] == conversation.tokens[0])[0])
        (columns,) = np.nonzero(rows["tokens"][row] == conversation.tokens[0])
        np.testing.assert_array_equal(columns, columns[0] + np.arange(size))
        assert len(np.unique(rows["segments"][row, columns])) == 1
        np.testing.assert_array_equal(rows["positions"][row, columns], np.arange(size))
        # An answer's token is the target of the position before it; the first has none.
        wanted = np.where(conversation.is_answer, conversation.tokens, -1)[1:]
        np.testing.assert_array_equal(rows["targets"][row, columns], [*wanted, -1])
    assert np.all(rows["targets"][rows["segments"] == 0] == -1)


def config(source, tokenizer, **changes):
    settings = {"sequence_length": LENGTH, "batch_size": 4, "held_out": 9} | changes
    return DataConfig(source, tokenizer, "conversations", **settings)


@pytest.fixture
def data(write, tokenizer, monkeypatch):
    """Seventy conversations, of which nine are held out, in small windows."""
    monkeypatch.setattr(batches, "_WINDOW_TOKENS", 10 * LENGTH)
    return config(write(many(70)), tokenizer)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def pieces(batch):
    """The tokens of the conversations of a batch, row by row."""
    return [
        tuple(tokens[segments == segment].tolist())
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def test_every_epoch_of_a_small_file_has_every_conversation_once_in_another_order(write, tokenizer):
    data = config(write(many(70)), tokenizer)
    read = open_conversations(data.source, "train", 9, tokenizer, LENGTH)
    number = len(fit(list(read), LENGTH, 0)["tokens"])
    drawn = take(train_batches(data, load_tokenizer(tokenizer)), 2 * number // 4 + 1)
    rows = {name: np.concatenate([batch[name] for batch in drawn]) for name in drawn[0]}
    epochs = [
        pieces({name: values[start : start + number] for name, values in rows.items()})
        for start in (0, number)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(tuple(each.tokens.tolist()) for each in read)
    assert epochs[0] != epochs[1]


def test_validation_has_every_conversation_once_and_pads_the_last_batch(data):
    reports = []
    validation = validation_batches(data, load_tokenizer(data.tokenizer), reports.append)
    read = open_conversations(data.source, "validation", 9, data.tokenizer, LENGTH)
    drawn = [piece for batch in validation for piece in pieces(batch)]
    assert sorted(drawn) == sorted(tuple(each.tokens.tolist()) for each in read)
    answers = sum(int(each.is_answer[1:].sum()) for each in read)
    assert sum(int((batch["targets"] >= 0).sum()) for batch in validation) == answers
    assert all(values.shape == (4, LENGTH) for batch in validation for values in batch.values())
    assert_equal(list(validation), list(validation))
    assert reports == [f"validation: {read.report}"]


def test_an_iterator_resumes_exactly_at_any_batch(data):
    tokenizer = load_tokenizer(data.tokenizer)
    iterator = train_batches(data, tokenizer)
    drawn, states = [], [json.dumps(iterator.get_state())]
    for _ in range(24):
        drawn.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    assert max(map(len, states)) < 1000
    for position in (0, 1, 2, 3, 5, 8, 13, 17):
        resumed = train_batches(data, tokenizer)
        resumed.set_state(json.loads(states[position]))
        assert json.dumps(resumed.get_state()) == states[position]
        assert_equal(take(resumed, 6), drawn[position : position + 6])
        resumed.close()
