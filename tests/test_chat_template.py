"""Chat templates: answers are located without marks; dates stay; bad templates are named."""

import numpy as np
import pytest
from chats import (
    CHATML,
    MISTRAL,
    TEMPLATES,
    ZEPHYR,
    byte_level,
    chat,
    metaspace,
    save_tokenizer,
    without_marks,
)

from galore_jax import errors
from galore_jax.data.chat_template import ChatTemplate
from galore_jax.data.tokenizers import load_tokenizer
from galore_jax.errors import InputError

CHATS = {
    "one turn": chat("How many legs has a dog?", "A dog has four legs."),
    "system": chat("Hi", "Hello there.", system="Answer the user."),
    "many turns": chat("a", "b c", "d\n\ne", "  two  spaces ", "naïve 日本語 🎉", "日本語 🎉"),
    "a question without an answer": chat("a", "b", "c"),
    "empty answer": chat("a", ""),
    "special tokens in text": chat("<s> a</s>", "<|im_end|> </s> user"),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("tokenizer", [byte_level, metaspace])
def test_answers_are_located_where_the_template_does_not_mark_them(
    name, messages, tokenizer, tmp_path
):
    path = save_tokenizer(tmp_path, TEMPLATES[name], tokenizer())
    marked = ChatTemplate(path).encode(messages)
    (tmp_path / "chat_template.jinja").write_text(without_marks(TEMPLATES[name]))
    located = ChatTemplate(path).encode(messages)
    np.testing.assert_array_equal(located.tokens, marked.tokens)
    np.testing.assert_array_equal(located.is_answer, marked.is_answer)


def test_a_date_in_a_template_is_the_same_every_day(tmp_path):
    path = save_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y, %H:%M') }}" + ZEPHYR)
    tokens = ChatTemplate(path).encode(CHATS["one turn"]).tokens.tolist()
    assert load_tokenizer(path).decode(tokens).startswith("26 Jul 2024, 00:00<|user|>")


def test_the_template_in_its_own_file_and_the_default_one_of_several_count(tmp_path):
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": CHATML}]
    path = save_tokenizer(tmp_path, several)
    assert len(ChatTemplate(path).encode(CHATS["one turn"]).tokens) > 10
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    assert "<|user|>" in load_tokenizer(path).decode(ChatTemplate(path).prompt("Hi"))


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (MISTRAL, chat("a", "b")[::-1], "refuses the messages: roles must alternate user/assis"),
        (CHATML + "{{ nothing.at.all }}", chat("a", "b"), "'nothing' is undefined"),
        (CHATML + "{{ 1 + eos_token }}", chat("a", "b"), "refuses the messages: unsupported"),
        (CHATML + "{{ 'a'.index('b') }}", chat("a", "b"), "refuses the messages: substring"),
        (
            # As templates of reasoning models, which omit earlier thoughts.
            "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}.{% endfor %}",
            chat("ab", "cd"),
            r"template in .* renders message 2 differently when others follow, so that",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
            chat("a", "b", "c", "d"),
            "renders message 2 differently",
        ),
        (CHATML, [{"role": "assistant", "content": "4"}], "message 1 is an answer"),
    ],
)
def test_a_template_that_does_not_suit_the_messages_says_why(template, messages, named, tmp_path):
    chat_template = ChatTemplate(save_tokenizer(tmp_path, without_marks(template)))
    with pytest.raises(InputError, match=named) as refused:
        chat_template.encode(messages)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("template", [None, {"tools": CHATML}])
def test_a_folder_without_a_template_is_named(template, tmp_path):
    path = save_tokenizer(tmp_path, template)
    with pytest.raises(InputError, match=r"no chat template in .*: write one into .*\.jinja"):
        ChatTemplate(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"caf\xe9", "cannot read the tokenizer in .*utf-8"),
        (b"{% for %}", "template refuses the messages: .*Expected"),
        (b"{{ " + b"(" * 10**5, "template refuses the messages: .*recursion depth"),
        (b"{% if a %}" * 10**4, "template refuses the messages"),
    ],
)
def test_a_damaged_template_is_one_sentence(content, named, tmp_path):
    path = save_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(InputError, match=named) as refused:
        ChatTemplate(path).prompt("a")
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_can_have_no_template_is_named():
    with pytest.raises(InputError, match=r"data\.tokenizer = 'bytes' has no chat template"):
        ChatTemplate("bytes")


def test_a_missing_template_engine_is_named_with_its_extra(tmp_path, monkeypatch):
    path = save_tokenizer(tmp_path, CHATML)
    find_spec = errors.find_spec
    is_found = lambda name: None if name == "jinja2" else find_spec(name)
    monkeypatch.setattr(errors, "find_spec", is_found)
    with pytest.raises(ModuleNotFoundError, match=r'jinja2, .*install "galore-jax\[huggingface\]"'):
        ChatTemplate(path)
