"""Chat templates render, tokenise and mark answers as in transformers; bad ones are named."""

import json

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="chat templates are written in it")

from chats import (
    CHATML,
    LLAMA3,
    MISTRAL,
    TEMPLATES,
    ZEPHYR,
    byte_level,
    chat,
    metaspace,
    save_tokenizer,
    without_marks,
)

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
TOKENIZERS = {"byte level": byte_level, "metaspace": metaspace}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_and_answers_are_those_of_transformers(name, kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it is the reference of this test")
    tokenizer = TOKENIZERS[kind]()
    template = ChatTemplate(save_tokenizer(tmp_path, TEMPLATES[name], tokenizer))
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )
    for messages in CHATS.values():
        expected = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, is_answer = template.encode(messages)
        assert tokens.tolist() == expected["input_ids"]
        assert is_answer.astype(int).tolist() == expected["assistant_masks"]
    question = reference.apply_chat_template(chat("Hi"), add_generation_prompt=True)
    assert template.prompt("Hi") == question["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_answers_are_located_where_the_template_does_not_mark_them(name, messages, tmp_path):
    path = save_tokenizer(tmp_path, TEMPLATES[name])
    marked = ChatTemplate(path).encode(messages)
    (tmp_path / "chat_template.jinja").write_text(without_marks(TEMPLATES[name]))
    located = ChatTemplate(path).encode(messages)
    np.testing.assert_array_equal(located.tokens, marked.tokens)
    np.testing.assert_array_equal(located.is_answer, marked.is_answer)


def test_the_answer_includes_the_end_of_the_turn_and_not_its_beginning(tmp_path):
    path = save_tokenizer(tmp_path, without_marks(LLAMA3))
    tokens, is_answer = ChatTemplate(path).encode(chat("Hi", "Yes, so.", "a", "b"))
    whole = byte_level()
    assert whole.decode(tokens.tolist(), skip_special_tokens=False).count("<s>") == 1
    assert whole.decode(tokens[is_answer].tolist(), skip_special_tokens=False) == (
        "Yes, so.<|eot_id|>b<|eot_id|>"
    )
    assert tokens.dtype == np.int32


def test_a_date_in_a_template_is_the_same_every_day(tmp_path):
    path = save_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y') }}" + ZEPHYR)
    tokens = ChatTemplate(path).encode(CHATS["one turn"]).tokens.tolist()
    assert load_tokenizer(path).decode(tokens).startswith("26 Jul 2024<|user|>")


def test_the_template_in_its_own_file_and_the_default_one_of_several_count(tmp_path):
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": CHATML}]
    path = save_tokenizer(tmp_path, several)
    assert len(ChatTemplate(path).encode(CHATS["one turn"]).tokens) > 10
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    assert "<|user|>" in load_tokenizer(path).decode(ChatTemplate(path).prompt("Hi"))


def test_a_template_cannot_reach_python(tmp_path):
    path = save_tokenizer(tmp_path, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InputError, match="the chat template refuses the messages"):
        ChatTemplate(path).encode(CHATS["one turn"])


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (MISTRAL, chat("a", "b")[::-1], "refuses the messages: roles must alternate user/assis"),
        (CHATML + "{{ nothing.at.all }}", chat("a", "b"), "'nothing' is undefined"),
        (CHATML + "{{ 1 + eos_token }}", chat("a", "b"), "refuses the messages: unsupported"),
        (CHATML + "{{ 'a'.index('b') }}", chat("a", "b"), "refuses the messages: substring"),
        (CHATML, chat("a", "b")[1:], "message 1 is an answer with no message before it"),
        (
            # As templates of reasoning models, which omit earlier thoughts.
            "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}.{% endfor %}",
            chat("ab", "cd"),
            r"tokenizer_config\.json renders message 2 differently when others follow, so that",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
            chat("a", "b", "c", "d"),
            "renders message 2 differently",
        ),
    ],
)
def test_a_template_that_does_not_suit_the_messages_says_why(template, messages, named, tmp_path):
    chat_template = ChatTemplate(save_tokenizer(tmp_path, without_marks(template)))
    with pytest.raises(InputError, match=named) as refused:
        chat_template.encode(messages)
    assert "\n" not in str(refused.value)


def without_template(folder):
    save_tokenizer(folder, None)


def without_settings(folder):
    save_tokenizer(folder, CHATML)
    (folder / "tokenizer_config.json").unlink()


def with_a_template_in_latin_1(folder):
    save_tokenizer(folder, CHATML)
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")


def with_settings(text):
    def change(folder):
        save_tokenizer(folder, CHATML)
        (folder / "tokenizer_config.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_template, r"no chat template in .*: write one into .*/chat_template\.jinja"),
        (without_settings, r"there is no .*/tokenizer_config\.json: name a folder that has one"),
        (with_a_template_in_latin_1, r"/chat_template\.jinja is not text in UTF-8"),
        (with_settings("{"), r"/tokenizer_config\.json is not a JSON file"),
        (with_settings("[]"), r"/tokenizer_config\.json is not a JSON object"),
        (
            lambda folder: save_tokenizer(folder, "{% for %}"),
            r"/tokenizer_config\.json is not a chat template in Jinja: .* in line 1",
        ),
        (
            lambda folder: save_tokenizer(folder, CHATML, eos_token="<|end|>"),
            r"/tokenizer\.json has no end-of-sequence token \(<\|end\|>\)",
        ),
        (
            lambda folder: save_tokenizer(folder, ["a", {"name": "tools", "template": CHATML}]),
            "no chat template in",
        ),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(damage, named, tmp_path):
    damage(tmp_path)
    with pytest.raises(InputError, match=named) as refused:
        ChatTemplate(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_can_have_no_template_is_named():
    with pytest.raises(InputError, match=r"data\.tokenizer = 'bytes' has no chat template"):
        ChatTemplate("bytes")


def test_unicode_settings_are_read(tmp_path):
    path = save_tokenizer(tmp_path, CHATML)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "é" + CHATML
    content = json.dumps(settings, ensure_ascii=False)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    tokens = ChatTemplate(path).encode(CHATS["one turn"]).tokens.tolist()
    assert load_tokenizer(path).decode(tokens).startswith("é")
