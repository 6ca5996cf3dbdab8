"""The files of a tokenizer in a folder of Hugging Face."""

import shutil
from pathlib import Path

from galore_jax.data.tokenizers import (
    MODEL,
    SETTINGS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    Tokenizer,
    load_pretrained,
)
from galore_jax.errors import InputError
from galore_jax.files import atomic_write, write_json

# Files that transformers and other programs read too.
_BESIDE = (*SETTINGS, "vocab.json", "merges.txt", "vocab.txt")
# A text with which a conversion is checked.
_SAMPLE = "  Two  spaces,\n\n\ta tab. naïve 日本語 ½ don't "
_TEMPLATES = "additional_chat_templates/*.jinja"


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a folder, of transformers or SentencePiece, if there is one."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer to a folder, under the names that transformers expects.

    Args:
      source: a folder of Hugging Face; or a tokenizer's file, with what is beside it if it is in
        such a folder.
      folder: an existing folder.
    """
    files = {MODEL: source}
    if source.is_dir() or source.name in TOKENIZERS:
        place = source if source.is_dir() else source.parent
        templates = [str(file.relative_to(place)) for file in place.glob(_TEMPLATES)]
        files = {name: place / name for name in (*TOKENIZERS, *_BESIDE, *templates)}
    for name, file in files.items():
        if file.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            with atomic_write(folder / name) as path:
                shutil.copyfile(file, path)


def complete_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the files with which transformers gives the tokens of a bare SentencePiece model.

    These are a tokenizer.json, in which names of special tokens in a text are special, as usual
    there; and a tokenizer_config.json, without which transformers would use the defaults of the
    model's type, such as LLaMA's `<s>` before each text.

    Args:
      folder: the folder with the copied file.
      tokenizer: what it is a copy of.

    Raises:
      InputError: transformers cannot convert a model of this kind to equal tokens.
    """
    if (folder / TOKENIZER_CONFIG).is_file():
        return
    converted = load_pretrained(folder)
    if converted.encode(_SAMPLE, add_special_tokens=False) != tokenizer.encode(_SAMPLE):
        raise InputError(
            f"transformers cannot convert {folder / MODEL} to a tokenizer with the same tokens: "
            "upgrade it, or train the model with another tokenizer."
        )
    with atomic_write(folder / TOKENIZER) as path:
        converted.backend_tokenizer.save(str(path))
    name_of = converted.convert_ids_to_tokens
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
