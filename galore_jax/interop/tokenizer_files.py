"""The files of a tokenizer in a folder of Hugging Face."""

import shutil
import warnings
from pathlib import Path

import tokenizers

from galore_jax.data.tokenizers import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    Tokenizer,
)
from galore_jax.files import atomic_write, write_json
from galore_jax.interop.unigram import unigram_tokenizer

# Where there are both, the first has the added tokens too.
_TOKENIZERS = _JSON, _MODEL = ("tokenizer.json", "tokenizer.model")
# What transformers and other programs read beside them.
_BESIDE = (
    *(TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE),
    *("vocab.json", "merges.txt", "vocab.txt"),
)
_TEMPLATES = "additional_chat_templates/*.jinja"


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a folder, of Hugging Face's tokenizers or SentencePiece, if there is one."""
    return next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer to a folder, under the names that transformers expects.

    Args:
      source: a folder of Hugging Face, or the file of a tokenizer, which may be in such a folder:
        what is beside it belongs to it.
      folder: an existing folder.
    """
    if source.name in _TOKENIZERS:
        source = source.parent
    place = source if source.is_dir() else source.parent
    templates = [str(file.relative_to(place)) for file in place.glob(_TEMPLATES)]
    files = {name: place / name for name in (*_BESIDE, *templates)}
    if source.is_dir():
        files |= {name: source / name for name in _TOKENIZERS}
    else:
        files[f"tokenizer{source.suffix}"] = source
    for name, file in files.items():
        if file.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            with atomic_write(folder / name) as path:
                shutil.copyfile(file, path)


def complete_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes what a tokenizer that came as a single file needs to be read alike by transformers.

    Without a tokenizer_config.json transformers would take the defaults of the model's type, such
    as LLaMA's `<s>` before each text. A unigram model of SentencePiece becomes a tokenizer.json; a
    warning says that one of another kind stays as it is.

    Args:
      folder: the folder with the copied files.
      tokenizer: what they are a copy of.
    """
    if (folder / TOKENIZER_CONFIG).is_file():
        return
    if not (folder / _JSON).is_file():
        converted = unigram_tokenizer(folder / _MODEL)
        if converted is None:
            warnings.warn(
                f"{folder / _MODEL} stays as it is, and transformers reads it with the settings of "
                f"LLaMA: if the model has others, write a {TOKENIZER_CONFIG} beside it.",
                stacklevel=2,
            )
            return
        with atomic_write(folder / _JSON) as path:
            converted.save(str(path))
    name_of = tokenizers.Tokenizer.from_file(str(folder / _JSON)).id_to_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": name_of(tokenizer.eos_id),
    }
    if tokenizer.pad_id != tokenizer.eos_id:
        settings["pad_token"] = name_of(tokenizer.pad_id)
    if tokenizer.prefix:
        settings["bos_token"] = name_of(tokenizer.prefix[0])
    write_json(folder / TOKENIZER_CONFIG, settings)
