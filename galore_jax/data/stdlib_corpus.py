"""The embedded corpus: the source text of the Python standard library on this machine."""

import hashlib
import os
import sysconfig
from pathlib import Path

from galore_jax.errors import InputError

_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_VALIDATION_INTERVAL = 20  # one file in twenty, by the hash of its path


def standard_library_texts(split: str) -> list[str]:
    """The source of the standard library's modules, one text per file, ordered by path.

    A hash of a file's path within the library decides whether it belongs to the training or the
    validation split, so the split is the same on every machine. Tests and installed packages are
    excluded; files that are not UTF-8 are skipped.

    Args:
        split: "train" or "validation".

    Raises:
        InputError: this interpreter has no source of its standard library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths, texts = [], []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _EXCLUDED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        digest = hashlib.sha256(path.relative_to(library).as_posix().encode()).digest()
        is_validation = int.from_bytes(digest[:8], "big") % _VALIDATION_INTERVAL == 0
        if is_validation == (split == "validation"):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                texts.append(text)
    if not texts:
        raise InputError(
            f"this Python has no standard library source in {library}: "
            "set data.source to a folder made by scripts/prepare_c4.py."
        )
    return texts
