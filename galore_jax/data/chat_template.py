"""The chat template of a tokenizer: how a conversation becomes the text that its model reads.

Templates are written in Jinja for Hugging Face's transformers and render here as they do there. A
template stands in chat_template.jinja or in tokenizer_config.json, next to tokenizer.json.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from galore_jax.data.packing import Conversation
from galore_jax.data.tokenizers import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    HuggingFaceTokenizer,
    load_tokenizer,
    special_tokens,
)
from galore_jax.errors import InputError
from galore_jax.files import read_json

Message = dict[str, str]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Templates that tell the model a date would otherwise give other tokens to a run that is resumed
# tomorrow. This is the date on which LLaMA 3's templates fall back.
_TODAY = datetime(2024, 7, 26)


class ChatTemplate:
    """The template of a tokenizer, and the tokens of what it renders.

    Attributes:
        eos_id: the tokenizer's end-of-sequence token, which has to end answers.

    Args:
        tokenizer: the path of a tokenizer.json.

    Raises:
        InputError: the tokenizer is of another kind, has no settings or no template, or these are
            damaged or of another tokenizer.
    """

    def __init__(self, tokenizer: str):
        loaded = load_tokenizer(tokenizer)
        if not isinstance(loaded, HuggingFaceTokenizer):
            raise InputError(
                f"data.tokenizer = {tokenizer!r} has no chat template: conversations need a "
                "tokenizer.json of Hugging Face, which model.checkpoint=FOLDER brings along."
            )
        self._tokenizer, self.eos_id = loaded, loaded.eos_id
        folder = Path(tokenizer).parent
        settings = read_json(folder / TOKENIZER_CONFIG)
        self._special = special_tokens(folder)
        source, self._name = _find_template(folder, settings)
        self._marks_answers = _GENERATION.search(source) is not None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{self._name} is not a chat template in Jinja: {error.message} in line "
                f"{error.lineno}."
            ) from None

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """The tokens of a conversation, with those of its answers marked.

        An answer is what the template marks by `{% generation %}`. If it marks nothing, it is what
        the rendered text gains by an assistant's message over the prompt for it: the content and
        what ends the turn.

        Raises:
            InputError: the template refuses the messages, or renders a turn differently when others
                follow, so that the answers cannot be located.
        """
        text, answers = self._render(messages)
        if not self._marks_answers:
            answers = self._locate(messages, text)
        tokens, spans = self._tokenizer.encode_spans(text)
        is_answer = np.zeros(len(tokens), bool)
        if tokens:
            starts, ends = np.array(spans).T
            for start, end in answers:
                is_answer |= (ends > start) & (starts < end)
        return Conversation(np.array(tokens, np.int32), is_answer)

    def prompt(self, question: str) -> list[int]:
        """The tokens of a user's question, up to where the answer begins.

        Raises:
            InputError: the template refuses it.
        """
        text, _ = self._render([{"role": "user", "content": question}], prompts=True)
        return self._tokenizer.encode(text)

    def _render(
        self, messages: Sequence[Message], prompts: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters in it that the template marks as answers."""
        written: list[str] = []
        answers: list[tuple[int, str]] = []
        try:
            for part in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompts,
                **self._special,
                **{_Generation.RECORD: (written, answers)},
            ):
                written.append(part)
        except Exception as error:  # A template can raise whatever Python does.
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses the messages: {reason}") from None
        text = "".join(written)
        for start, answer in answers:
            if not text.startswith(answer, start):
                raise InputError(
                    f"{self._name} has {{% generation %}} inside of a macro, a filter or a call, "
                    "where the place of the answer in the text is unknown: move it out of there."
                )
        return text, [(start, start + len(answer)) for start, answer in answers]

    def _locate(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        answers = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                if index == 0:
                    raise InputError(
                        "message 1 is an answer with no message before it: begin with a user's "
                        "message, or remove the conversation."
                    )
                prompt, _ = self._render(messages[:index], prompts=True)
                turn, _ = self._render(messages[: index + 1])
                if not (turn.startswith(prompt) and text.startswith(turn)):
                    raise InputError(
                        f"{self._name} renders message {index + 1} differently when others follow, "
                        "so that the answer cannot be located: mark answers in the template, "
                        "{% generation %} before and {% endgeneration %} after them."
                    )
                answers.append((len(prompt), len(turn)))
        return answers


def _find_template(folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """The template and the name of its file."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise InputError(f"{path} is not text in UTF-8.") from None
    source = settings.get("chat_template")
    if isinstance(source, list):  # Several by name.
        named = [each for each in source if isinstance(each, dict)]
        defaults = [each.get("template") for each in named if each.get("name") == "default"]
        source = defaults[0] if defaults else None
    if not isinstance(source, str):
        raise InputError(
            f"there is no chat template in {folder}: write one into {path}, or take the tokenizer "
            "of the model's variant for chats."
        )
    return source, str(folder / TOKENIZER_CONFIG)


class _Generation(Extension):
    """The tag `generation`: records which characters of the rendered text are inside of it."""

    RECORD = "_written_and_answers"
    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _record(self, context: Context, caller: Callable[[], str]) -> str:
        text = caller()
        written, answers = context[self.RECORD]
        start = sum(map(len, written))
        answers.append((start, text))
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings and functions that templates of transformers rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter of transformers, whose settings may be given by position."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
