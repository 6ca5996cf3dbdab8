"""Text to token ids and back: bytes, SentencePiece, Hugging Face `tokenizers`."""

import io
import itertools
import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from galore_jax.errors import InputError
from galore_jax.files import read_json

TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS, CHAT_TEMPLATE = "added_tokens.json", "chat_template.jinja"
_REWRITE = (
    "have transformers write a tokenizer.json that has it, "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
)
_EOS_NAMES = (
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "[EOS]",
    "[SEP]",
)
# Classes that put <s> before a text unless `add_bos_token` is false, whatever the post-processor of
# the file does. So it is in transformers 4, with which models of these classes were published;
# version 5 goes by the post-processor.
_ADD_BOS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer(Protocol):
    """A vocabulary with ids from 0 to `vocab_size` - 1.

    Attributes:
        prefix: the ids that a model pretrained with this tokenizer expects before a text, such as
            that of the beginning of a sequence.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    prefix: Sequence[int]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-sequence id."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens."""
        ...


def load_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer at `path`.

    Args:
        path: "bytes" for the built-in byte vocabulary, a SentencePiece `*.model`, or a
            `tokenizer.json` of Hugging Face's `tokenizers` library.

    Raises:
        InputError: the file does not exist, is of another kind, or its vocabulary has no eos token.
    """
    if path == "bytes":
        return ByteTokenizer()
    if not Path(path).is_file():
        raise InputError(
            f"there is no tokenizer at {path}: give a SentencePiece .model, a tokenizer.json or "
            'the word "bytes" (scripts/train_tokenizer.py makes a .model).'
        )
    if path.endswith(".model"):
        return SentencePieceTokenizer(path)
    if path.endswith(".json"):
        return HuggingFaceTokenizer(path)
    raise InputError(
        f"{path} is not a tokenizer that galore_jax can read: its name must end in .model "
        "(SentencePiece) or .json (tokenizer.json of Hugging Face)."
    )


class ByteTokenizer:
    """UTF-8 bytes: pad 0, eos 1, byte b is id b + 2.

    >>> ByteTokenizer().encode("Hi")
    [74, 107]
    """

    vocab_size = 258
    pad_id = 0
    eos_id = 1
    prefix: Sequence[int] = ()

    def encode(self, text: str) -> list[int]:
        """The ids of the UTF-8 bytes of `text`."""
        return [byte + 2 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; invalid UTF-8 is replaced by U+FFFD."""
        return bytes(id - 2 for id in ids if id >= 2).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file, with the eos that the `special_tokens` beside it name.

    A model without a pad piece pads with eos.
    """

    def __init__(self, path: str):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path} is not a SentencePiece model.") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        named = special_tokens(Path(path).parent)
        pieces = {self._processor.id_to_piece(piece) for piece in range(self.vocab_size)}
        _check_added_tokens(path, pieces, named.get("pad_token"))
        if (eos := named.get("eos_token")) is not None:
            self.eos_id = self._processor.piece_to_id(eos)
            if eos not in pieces:
                raise InputError(
                    f"{path} lacks the end of a sequence {eos!r}, which the files beside it name: "
                    f"{_REWRITE}"
                )
        if self.eos_id < 0:
            raise InputError(f"{path} has no end-of-sequence piece, which training needs.")
        pad_id = self._processor.pad_id()
        self.pad_id: int = self.eos_id if pad_id < 0 else pad_id
        bos_id = self._processor.bos_id()
        has_bos = bos_id >= 0 and settings_beside(path).get("add_bos_token", True)
        self.prefix: Sequence[int] = (bos_id,) if has_bos else ()

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of `text`."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._processor.decode(ids)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the eos and pad tokens of the `special_tokens` beside it.

    Where these name none, they are looked up by their usual names; without a pad token, rows are
    padded with eos.
    """

    def __init__(self, path: str):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # The library raises bare exceptions.
            raise InputError(
                f"{path} is not a tokenizer.json of the tokenizers library."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"{path} has an empty vocabulary.")
        self.vocab_size: int = max(vocabulary.values()) + 1
        named = special_tokens(Path(path).parent)
        _check_added_tokens(path, vocabulary, named.get("pad_token"))

        def find(names: Sequence[str]) -> int | None:
            return next((vocabulary[name] for name in names if name in vocabulary), None)

        eos_names = [named["eos_token"]] if "eos_token" in named else _EOS_NAMES
        pad_names = [named["pad_token"]] if "pad_token" in named else _PAD_NAMES
        eos, pad = find(eos_names), find(pad_names)
        if eos is None:
            raise InputError(
                f"{path} has no end-of-sequence token ({', '.join(eos_names)}): name one as "
                f"eos_token in a {TOKENIZER_CONFIG} beside it."
            )
        self.eos_id: int = eos
        self.pad_id: int = eos if pad is None else pad
        settings = settings_beside(path)
        self.prefix: Sequence[int]
        if settings.get("tokenizer_class") in _ADD_BOS:
            adds_bos = settings.get("add_bos_token", True)
            bos = find([named.get("bos_token", "<s>")] if adds_bos else [])
            self.prefix = [] if bos is None else [bos]
        else:
            encoding = self._tokenizer.encode("a")
            added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            self.prefix = [i for i, _ in itertools.takewhile(lambda pair: pair[1], added)]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the special tokens that the file's post-processor adds."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and of each the characters that it stands for: [start, end)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def settings_beside(path: str | Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer."""
    settings = Path(path).with_name(TOKENIZER_CONFIG)
    return read_json(settings) if settings.is_file() else {}


def tokenizer_files(path: str) -> list[Path]:
    """The files of the tokenizer at `path` that determine the tokens; none for "bytes"."""
    if path == "bytes":
        return []
    names = (Path(path).name, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE)
    return [file for file in map(Path(path).with_name, names) if file.is_file()]


def _check_added_tokens(path: str, vocabulary: Container[str], pad: str | None) -> None:
    """Checks that a tokenizer has the tokens that the files beside it add.

    The pad token may be missing: it stands in no text.
    """
    file = Path(path).with_name(ADDED_TOKENS)
    tokens = [*read_json(file)] if file.is_file() else []
    added = settings_beside(path).get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise InputError(
            f"{file.with_name(TOKENIZER_CONFIG)}: added_tokens_decoder must map ids to tokens."
        )
    for token in added.values():
        tokens.append(str(token.get("content") if isinstance(token, dict) else token))
    lacking = [token for token in tokens if token not in vocabulary and token != pad]
    if lacking:
        raise InputError(f"{path} lacks {lacking[0]!r}, which the files beside it add: {_REWRITE}")


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens of a tokenizer of Hugging Face, as in {"eos_token": "</s>"}.

    They stand in tokenizer_config.json. Older folders, in which that has no
    `added_tokens_decoder`, may have others in special_tokens_map.json, which take precedence, as in
    transformers.
    """
    settings = {}
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        if (folder / name).is_file() and "added_tokens_decoder" not in settings:
            settings |= read_json(folder / name)
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece unigram model: pad 0, eos 1, unk 2, as in T5.

    Unlike T5's vocabulary it encodes texts without loss: no normalisation, spaces are kept, and
    characters without a piece become bytes, so that nothing is unknown. Only U+2581, with which
    SentencePiece marks a space, is decoded as one. Equal input gives equal bytes.

    Args:
        texts: documents; they are split into lines, so no piece spans a line break.
        vocab_size: number of pieces, including 259 for special tokens and bytes.

    Returns:
        The content of a `.model` file.

    Raises:
        InputError: there is too little text for that vocabulary, or it is too small for the bytes
            and letters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**20,
            num_threads=16,  # Affects the result: EM sums are added up thread by thread.
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"no vocabulary of {vocab_size} pieces can be made from this text: "
            f"{_possible_size(str(error))}."
        ) from error
    return model.getvalue()


def _possible_size(message: str) -> str:
    """SentencePiece's error message, rephrased if it is about the text or the vocabulary's size."""
    if "sentences_.empty()" in message:
        return "it is empty"
    if too_large := re.search(r"<= (\d+)", message):
        return f"it has enough for {too_large[1]}"
    if too_small := re.search(r"\d+ vs (\d+)", message):
        return f"its letters and the bytes take {too_small[1]}"
    return message.strip(" .")
