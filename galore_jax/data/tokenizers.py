"""Text to token ids and back: bytes, SentencePiece, and the tokenizers of transformers."""

import io
import itertools
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from galore_jax.errors import InputError, check_installed, one_sentence

TOKENIZER, MODEL = "tokenizer.json", "tokenizer.model"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# If there are both in a folder of transformers, the first is read; it also has the added tokens.
TOKENIZERS = (TOKENIZER, MODEL)
# What is beside them and determines tokens.
SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


def load_tokenizer(path: str) -> "Tokenizer":
    """Loads a tokenizer.

    Args:
        path: "bytes", for `ByteTokenizer`; a SentencePiece `*.model`; or a `tokenizer.json`, or a
            `tokenizer.model` beside its tokenizer_config.json, of Hugging Face's transformers.

    Raises:
        InputError: the file does not exist, is of another kind, or its vocabulary has no eos token.
        ModuleNotFoundError: transformers is needed, and is not installed.
    """
    if path == "bytes":
        return ByteTokenizer()
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"there is no tokenizer at {path}: give a SentencePiece .model, a tokenizer.json or "
            'the word "bytes" (scripts/train_tokenizer.py makes a .model).'
        )
    if file.name == TOKENIZER or _has_settings(file):
        return HuggingFaceTokenizer(file.parent)
    if file.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise InputError(
        f"{path} is not a tokenizer that galore_jax can read: its name must end in .model "
        f"(SentencePiece) or be {TOKENIZER} (Hugging Face)."
    )


def from_pretrained(kind: str, folder: Path, problem: str, **options: Any) -> Any:
    """What a class of transformers makes of the files in a folder, without running code of it.

    Args:
        kind: the name of the class.
        folder: an existing folder; nothing is downloaded.
        problem: the beginning of the error message.
        **options: for the class.

    Raises:
        InputError: a file is missing or damaged.
        ModuleNotFoundError: transformers is not installed.
    """
    check_installed("transformers")
    # Otherwise it warns at every start that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes seconds

    with one_sentence(problem), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They are about names of settings in the files.
        return getattr(transformers, kind).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )


def load_pretrained(folder: Path, kind: str = "PreTrainedTokenizerFast") -> Any:
    """The tokenizer in a folder of Hugging Face.

    Args:
        folder: the folder.
        kind: "PreTrainedTokenizerFast", which takes a tokenizer.json as it is; or "AutoTokenizer",
            which also uses the config.json and the other files of the model's tokenizer.

    Raises:
        InputError: there is none, or a file of it is damaged.
        ModuleNotFoundError: transformers is not installed.
    """
    problem = f"transformers cannot read the tokenizer in {folder}"
    tokenizer = from_pretrained(kind, folder, problem, model_max_length=2**62)
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {folder}, a {type(tokenizer).__name__}, has no form as a "
            "tokenizer.json, which is needed: choose another model."
        )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(f"{folder} has no file with the vocabulary of a tokenizer: add it.")
    return tokenizer


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
    """A SentencePiece model file. A model without a pad piece pads with eos."""

    def __init__(self, path: str):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=path)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path} is not a SentencePiece model.") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise InputError(f"{path} has no end-of-sequence piece, which training needs.")
        pad_id, bos_id = self._processor.pad_id(), self._processor.bos_id()
        self.pad_id: int = self.eos_id if pad_id < 0 else pad_id
        self.prefix: Sequence[int] = (bos_id,) if bos_id >= 0 else ()

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of `text`."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self._processor.decode(ids)


class HuggingFaceTokenizer:
    """The tokenizer of a folder of Hugging Face, with the eos and pad tokens that it names.

    The class that tokenizer_config.json names is not used: some classes rebuild the tokenizer, in
    each version of transformers differently, while a training's ids must not change.

    Attributes:
        pretrained: the object of transformers.
    """

    def __init__(self, folder: Path):
        self.pretrained = load_pretrained(folder)
        self._place = f"the tokenizer in {folder}"
        self._backend = self.pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        if self.pretrained.eos_token_id is None:
            raise InputError(
                f"{self._place} has no end-of-sequence token: name one as eos_token in its "
                f"{TOKENIZER_CONFIG}."
            )
        self.eos_id: int = self.pretrained.eos_token_id
        pad = self.pretrained.pad_token
        others = [id for token, id in self.pretrained.get_vocab().items() if token != pad]
        self.vocab_size: int = max(others) + 1
        # A model may have no row for a pad token after all others, which occurs in no text.
        has_pad = pad is not None and self.pretrained.pad_token_id < self.vocab_size
        self.pad_id: int = self.pretrained.pad_token_id if has_pad else self.eos_id
        encoding = self._encode("a", add_special_tokens=True)
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        prefix = itertools.takewhile(lambda pair: pair[1], added)
        self.prefix: Sequence[int] = [token for token, _ in prefix]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the special tokens that the post-processor adds."""
        return self._encode(text).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and for each the range of its characters, [start, end)."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool = False) -> Any:
        with one_sentence(f"{self._place} cannot encode a text"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens)


# Ids are below vocab_size. A model pretrained with a tokenizer expects its prefix, such as a
# beginning-of-sequence token, before a text; `encode` adds neither that nor eos_id.
Tokenizer = ByteTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def tokenizer_files(path: str) -> list[Path]:
    """The files of the tokenizer at `path` that determine the tokens; none for "bytes"."""
    if path == "bytes":
        return []
    file = Path(path)
    first = TOKENIZERS if _has_settings(file) else (file.name,)
    return [found for found in map(file.with_name, (*first, *SETTINGS)) if found.is_file()]


def _has_settings(file: Path) -> bool:
    """Whether transformers reads this tokenizer.model, or the tokenizer.json beside it."""
    return file.name == MODEL and file.with_name(TOKENIZER_CONFIG).is_file()


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
            f"no vocabulary of {vocab_size} pieces can be made from this text: {error}"
        ) from error
    return model.getvalue()
