"""The files of a tokenizer in a folder of Hugging Face."""

import shutil
from pathlib import Path

from galore_jax.data.tokenizers import ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER_CONFIG
from galore_jax.files import atomic_write

# Where there are both, the first has the added tokens too.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What transformers and other programs read beside them.
_BESIDE = (
    *(TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE),
    *("vocab.json", "merges.txt", "vocab.txt"),
)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a folder, of Hugging Face's tokenizers or SentencePiece, if there is one."""
    return next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer to a folder, under the names that transformers expects.

    Args:
      source: a folder of Hugging Face, or the file of a tokenizer, which may be in such a folder.
        What is beside a `.json` belongs to it.
      folder: an existing folder.
    """
    if source.name in _TOKENIZERS:
        source = source.parent
    if source.is_dir():
        files = {name: source / name for name in (*_TOKENIZERS, *_BESIDE)}
    else:
        files = {f"tokenizer{source.suffix}": source}
        if source.suffix == ".json":
            files |= {name: source.with_name(name) for name in _BESIDE}
    for name, file in files.items():
        if file.is_file():
            with atomic_write(folder / name) as path:
                shutil.copyfile(file, path)
