"""The chat template of a tokenizer: how a conversation becomes the text that its model reads.

Templates are written in Jinja for Hugging Face's transformers, which renders them in a sandbox.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.data.packing import Conversation
from galore_jax.data.tokenizers import CHAT_TEMPLATE, HuggingFaceTokenizer, load_tokenizer
from galore_jax.errors import InputError, check_installed, one_sentence

Message = dict[str, str]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What these tags render is inserted later, so transformers would mark the wrong tokens.
_ELSEWHERE = re.compile(
    r"\{%[-+]?\s*(?:macro|filter|call|set\s+\w+\s*[-+]?%\})"
    r"(?:(?!\{%[-+]?\s*end(?:macro|filter|call|set)).)*?" + _GENERATION.pattern,
    re.DOTALL,
)
# Templates that contain the date would otherwise give a resumed run other tokens. This is the date
# that LLaMA 3's templates use by default.
_TODAY = datetime(2024, 7, 26)
_SUBSTITUTES = "".join(f" | replace('%{code}', '{_TODAY:%{code}}')" for code in "aAbBcdHIjmMpSxXyY")
_DATE = "{% macro strftime_now(format) -%}{{ format" + _SUBSTITUTES + " }}{%- endmacro %}\n"


class ChatTemplate:
    """The template of a tokenizer, and the tokens of what it renders.

    Attributes:
        eos_id: the tokenizer's end-of-sequence token, which has to end answers.

    Args:
        tokenizer: the path of a tokenizer.json.

    Raises:
        InputError: the tokenizer is of another kind or damaged, or has no template, or one whose
            answers cannot be located.
        ModuleNotFoundError: transformers or jinja2 is not installed.
    """

    def __init__(self, tokenizer: str):
        check_installed("jinja2")
        loaded = load_tokenizer(tokenizer)
        if not isinstance(loaded, HuggingFaceTokenizer):
            raise InputError(
                f"data.tokenizer = {tokenizer!r} has no chat template: conversations need a "
                "tokenizer.json of Hugging Face, which model.checkpoint=FOLDER brings along."
            )
        self._tokenizer, self.eos_id = loaded, loaded.eos_id
        self._folder = Path(tokenizer).parent
        source = loaded.pretrained.chat_template
        if isinstance(source, dict):  # several by name
            source = source.get("default")
        if not isinstance(source, str):
            raise InputError(
                f"there is no chat template in {self._folder}: write one into "
                f"{self._folder / CHAT_TEMPLATE}, or take the tokenizer of the model's variant for "
                "chats."
            )
        if _ELSEWHERE.search(source):
            raise InputError(
                f"the chat template in {self._folder} has {{% generation %}} inside of a macro, a "
                "filter or a call, where the place of the answer in the text is unknown: move it "
                "out of there."
            )
        self._template, self._marks_answers = _DATE + source, bool(_GENERATION.search(source))

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """The tokens of a conversation, with those of its answers marked.

        An answer is what the template marks by `{% generation %}`. If it marks nothing, it is what
        an assistant's message adds to the prompt: its content and the end of the turn.

        Raises:
            InputError: the template refuses the messages, or the answers cannot be located because
                it renders a turn differently when others follow.
        """
        if self._marks_answers:
            found = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
            tokens, is_answer = found["input_ids"], np.array(found["assistant_masks"], bool)
        else:
            text = self._render(messages)
            tokens, spans = self._tokenizer.encode_spans(text)
            is_answer = np.zeros(len(tokens), bool)
            starts, ends = np.array(spans).reshape(-1, 2).T
            for start, end in self._locate(messages, text):
                is_answer |= (ends > start) & (starts < end)
        return Conversation(np.array(tokens, np.int32), is_answer)

    def prompt(self, question: str) -> list[int]:
        """The tokens of a user's question, up to where the answer begins.

        Raises:
            InputError: the template refuses it.
        """
        message = {"role": "user", "content": question}
        return self._tokenizer.encode(self._render([message], add_generation_prompt=True))

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        return self._apply(messages, tokenize=False, **options)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        # A template can raise whatever Python does.
        with one_sentence("the chat template refuses the messages"):
            return self._tokenizer.pretrained.apply_chat_template(
                list(messages), chat_template=self._template, **options
            )

    def _locate(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        answers = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                if not index:
                    raise InputError("message 1 is an answer: add a message before it.")
                prompt = self._render(messages[:index], add_generation_prompt=True)
                turn = self._render(messages[: index + 1])
                if not (turn.startswith(prompt) and text.startswith(turn)):
                    raise InputError(
                        f"the chat template in {self._folder} renders message {index + 1} "
                        "differently when others follow, so that the answer cannot be located: "
                        "mark answers in the template, {% generation %} before and "
                        "{% endgeneration %} after them."
                    )
                answers.append((len(prompt), len(turn)))
        return answers
