"""Named tensors in a folder of safetensors files: one file, or several with an index."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of NumPy)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from galore_jax.errors import InputError
from galore_jax.files import atomic_write, read_json, write_json

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "BF16", "F16")
Index = tuple[slice, ...]


class Stored(NamedTuple):
    """A tensor in a file, with the dtype's name in the format of safetensors, as in "F32"."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors in the files of a folder, by name, from the headers alone.

    Raises:
      InputError: there are no such files, or one is missing, truncated, or lacks a tensor of the
        index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # Where there are both, transformers reads this one too.
        named, files = {}, [folder / SINGLE]
    elif index.is_file():
        named = _read_index(index)
        files = [folder / name for name in sorted(set(named.values()))]
    else:
        raise InputError(
            f"{folder} has neither {SINGLE} nor {INDEX}: give a folder of a model that is stored "
            "as safetensors."
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{index} names {', '.join(missing)}, which {folder} does not have: download or copy "
            "all files of the model."
        )
    found: dict[str, Stored] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                if named.get(name, file.name) == file.name:  # Of several, the index names one.
                    tensor = opened.get_slice(name)
                    found[name] = Stored(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    for name, file in named.items():
        if name not in found:
            raise InputError(f"{folder / file} has no {name}, which {index} says it has.")
    return found


def check_dtypes(tensors: Iterable[Stored]) -> None:
    """Raises an `InputError` if a tensor has a dtype other than `DTYPES`."""
    for file, name, _, dtype in tensors:
        if dtype not in DTYPES:
            raise InputError(
                f"{name} in {file} has the dtype {dtype}: convert it to one of {', '.join(DTYPES)}."
            )


def read_tensor(stored: Stored, index: Index | None = None) -> np.ndarray:
    """A tensor, or a part of it without reading the rest.

    The file is closed again, because what is read from an open file stays mapped in memory.
    """
    with _opened(stored.file) as opened:
        if index is None:
            return opened.get_tensor(stored.name)
        return opened.get_slice(stored.name)[index]


def make_folder(folder: Path) -> None:
    """Makes a folder for a model, unless it exists and holds none.

    Raises:
      InputError: it holds one.
    """
    for name in (CONFIG, SINGLE, INDEX):
        if (folder / name).exists():
            raise InputError(f"{folder} already has the file {name}: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes tensors in files of at most `shard_bytes` each, holding one file at a time in memory.

    A larger tensor has a file of its own. If there are several files, their index is written last.

    Args:
      folder: an existing folder.
      shapes: the shape of each tensor, by name, in the order to write.
      dtype: the dtype of all of them.
      read: returns a tensor by name.
      shard_bytes: the size of a file.
    """
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: np.ascontiguousarray(read(name)) for name in names})
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_json(folder / INDEX, index)


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that transformers can load.

    Raises:
      OSError: it cannot be written, as when the disk is full.
    """
    with atomic_write(path) as unfinished:
        try:
            # Transformers refuses files without this.
            save_file(dict(tensors), unfinished, metadata={"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error


def _read_index(path: Path) -> dict[str, str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{path} has no weight_map from names of tensors to files.")
    outside = [file for file in where.values() if Path(file).name != file]
    if outside:
        raise InputError(f"{path} names {outside[0]}, which is not the name of a file beside it.")
    return where


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "np") as opened:
            yield opened
    except SafetensorError as error:
        raise InputError(
            f"{file} is not a complete safetensors file ({error}): download or copy it again."
        ) from None
    except OSError as error:  # whose text and number are wrong for a file that may not be read
        raise InputError(f"{file} cannot be read: check that it exists and may be read.") from error
