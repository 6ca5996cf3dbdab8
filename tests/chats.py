"""Chat templates in the published formats, and tokenizers that know their special tokens."""

import json
import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
CHATML = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + '<|im_end|>\n' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
LLAMA3 = r"""
{%- for message in messages -%}
  {%- if loop.first -%}{{- bos_token -}}{%- endif -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
MISTRAL = r"""
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] + '\n\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in turns -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user/assistant') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
  {%- else -%}
    {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""
# As in the published one, white space is mostly left to trim_blocks and lstrip_blocks.
ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\n' -}}
{% generation %}{{ message['content'] + eos_token + '\n' }}{% endgeneration %}{% else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\n' }}{% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR}

TEXTS = [
    f"The {a} {b} runs\n    over {c}, user and\tassistant [INST] system [/INST].\n"
    for a in ("quick", "brown", "lazy")
    for b in ("fox", "dog", "horse")
    for c in ("hills", "fields")
]
QUESTION, ANSWER = "How many legs has a dog?", "A dog has four legs."


def without_marks(template):
    """The template without the tags around answers."""
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


def byte_level():
    """As GPT-2, LLaMA 3 and Qwen split text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace():
    """As LLaMA 2 and Mistral split text: unknown characters become bytes."""
    pieces = {name: number for number, name in enumerate(SPECIAL)}
    letters = sorted({*"".join(TEXTS).replace(" ", "▁"), *QUESTION.replace(" ", "▁")})
    for piece in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁d", "▁do"]:
        pieces.setdefault(piece, len(pieces))
    merges = [("▁", "d"), ("▁d", "o")]
    bpe = models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([*SPECIAL])
    return tokenizer


def save_tokenizer(folder, template, tokenizer=None, **settings):
    """Writes tokenizer.json and tokenizer_config.json; returns the path of the former."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    content = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    content |= {"chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return str(folder / "tokenizer.json")


def chat(*contents, system=None):
    """Messages, by turns of the user and the assistant."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [
        {"role": roles[number % 2], "content": content} for number, content in enumerate(contents)
    ]
