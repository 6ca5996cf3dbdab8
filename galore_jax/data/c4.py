"""C4 as array_record shards: converted from the `*.json.gz` files of allenai/c4, and opened.

The folder is `DATA_DIR/c4/en`, with one shard of documents per input file. The list of the shards
is written last, so a folder without it has not been completed.
"""

import bisect
import contextlib
import errno
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from galore_jax.errors import InputError, names_full_disk
from galore_jax.files import UNFINISHED, atomic_write, locked, read_json, write_json

_SPLITS = ("train", "validation")
_INPUTS = "inputs.json"  # name and size of the input file of each shard
_SHARDS = "shards.json"  # documents in each shard; written last, it marks a complete folder


def prepare_c4(folder: str, data_dir: str, workers: int = 1) -> None:
    """Converts the json.gz files of allenai/c4 to array_record shards of their texts.

    Shards completed by an earlier, interrupted call are kept. A complete folder is left unchanged.

    Args:
        folder: holds `c4-train.*.json.gz` and `c4-validation.*.json.gz`, directly or in `en/`.
        data_dir: the shards go to `data_dir/c4/en`.
        workers: number of processes that convert shards in parallel.

    Raises:
        InputError: there are no such files, one is damaged (the message names it and the line), or
            the output folder was made from other files, or another process is preparing it.
        OSError: the disk is full.
    """
    files = {split: _input_files(folder, split) for split in _SPLITS}
    target = Path(data_dir, "c4", "en")
    sources = {
        target / f"c4-{split}-{index:05d}-of-{len(files[split]):05d}.array_record": file
        for split in _SPLITS
        for index, file in enumerate(files[split])
    }
    target.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / "lock", f"preparing {target}", "choose another --out"):
        _remove_unfinished(target)
        inputs = {shard.name: [file.name, file.stat().st_size] for shard, file in sources.items()}
        _claim(target, inputs)
        missing = {shard: file for shard, file in sources.items() if not shard.exists()}
        if missing:
            (target / _SHARDS).unlink(missing_ok=True)
            try:
                _convert(missing, workers)
            finally:
                _remove_unfinished(target)
        if not (target / _SHARDS).exists():
            write_json(target / _SHARDS, {shard.name: _num_records(shard) for shard in sources})


def open_c4(data_dir: str, split: str) -> "C4Documents":
    """Opens a split of the shards that `prepare_c4` wrote to `data_dir`.

    Raises:
        InputError: `data_dir` holds no complete C4, or one of its shards is missing.
    """
    folder = Path(data_dir, "c4", "en")
    if not (folder / _SHARDS).exists():
        if (folder / _INPUTS).exists():
            raise InputError(
                f"{data_dir} is only partly prepared: run scripts/prepare_c4.py again to finish it."
            )
        raise InputError(
            f"{data_dir} is not a folder made by scripts/prepare_c4.py (this version needs "
            f'{folder / _SHARDS}): give one, or "python" for the text of the standard library.'
        )
    counts = read_json(folder / _SHARDS)
    return C4Documents(
        {folder / name: count for name, count in counts.items() if name.startswith(f"c4-{split}-")}
    )


class C4Documents(Sequence[str]):
    """The documents of one split, by index.

    Args:
        shards: the number of documents in each, in order.

    Raises:
        InputError: a shard is missing.
    """

    def __init__(self, shards: Mapping[Path, int]):
        self._shards, self._ends = list(shards), list(itertools.accumulate(shards.values()))
        for shard in shards:
            if not shard.exists():
                raise InputError(f"{shard} is missing: run scripts/prepare_c4.py again.")
        self._source = ArrayRecordDataSource([f"{path}[0:{n}]" for path, n in shards.items()])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> str:
        """The text of document `index`.

        Raises:
            InputError: its shard is corrupt.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._source[index].decode()
        except (IndexError, RuntimeError, ValueError) as error:
            shard = bisect.bisect_right(self._ends, index)
            record = index - (self._ends[shard - 1] if shard else 0)
            raise InputError(
                f"{self._shards[shard]} is corrupt at record {record}: "
                "delete it and run scripts/prepare_c4.py again."
            ) from error


def _input_files(folder: str, split: str) -> list[Path]:
    for place in (Path(folder), Path(folder, "en")):
        files = sorted(place.glob(f"c4-{split}.*.json.gz"))
        if files:
            return files
    raise InputError(
        f"{folder} holds no c4-{split}.*.json.gz: give the folder of allenai/c4's `en` files, "
        "train and validation."
    )


def _remove_unfinished(target: Path) -> None:
    for leftover in target.glob(f"*{UNFINISHED}"):
        leftover.unlink()


def _claim(target: Path, inputs: Mapping[str, list[Any]]) -> None:
    """Records in `target` the input of each shard; raises if it was made from other files.

    The input of a shard that is still missing may have changed, as after a failed download.
    """
    record, recorded = target / _INPUTS, {}
    if record.exists():
        recorded = read_json(record)
        is_other = lambda shard: (target / shard).exists() and recorded[shard] != inputs[shard]
        if recorded.keys() != inputs.keys() or any(map(is_other, inputs)):
            raise InputError(
                f"{target} was made from other input files than these: "
                "choose another --out, or delete it."
            )
    elif any(target.iterdir()):
        raise InputError(
            f"{target} holds files that are not from prepare_c4: choose another --out."
        )
    if recorded != inputs:
        write_json(record, inputs)


def _convert(sources: Mapping[Path, Path], workers: int) -> None:
    """Writes the shards (keys) from their input files (values), several in parallel."""
    processes, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = ProcessPoolExecutor(min(workers, len(sources)), processes, _start_worker)
    sizes = {file: file.stat().st_size for file in sources.values()}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="C4, compressed") as bar:
        try:
            pending = {
                pool.submit(_write_shard, file, shard): file for shard, file in sources.items()
            }
            for shard in as_completed(pending):
                shard.result()
                bar.update(sizes[pending[shard]])
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, perhaps for lack of memory: run the same command "
                "again, with fewer --workers."
            ) from error
        except KeyboardInterrupt:
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them through the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker with its parent, whose successor writes to the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(file: Path, shard: Path) -> None:
    """Converts one json.gz file into one array_record shard."""
    with atomic_write(shard) as unfinished:
        try:
            with contextlib.closing(ArrayRecordWriter(str(unfinished), "group_size:1")) as writer:
                for text in read_texts(file):
                    writer.write(text)
        # The only exception that array_record has for a failed write.
        except RuntimeError as error:
            if names_full_disk(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shard)) from error
            raise InputError(f"{shard} cannot be written: {error}.") from error


def read_texts(file: Path) -> Iterator[bytes]:
    """Yields the texts of the documents in an allenai/c4 json.gz file, in UTF-8.

    Args:
        file: one line of JSON per document; blank lines are skipped.

    Raises:
        InputError: the file is empty, truncated or corrupt, or a line is not a C4 document.
    """
    number, is_empty = 0, True
    try:
        with gzip.open(file) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (messages name it)
                if line.strip():
                    yield _text(line)
                    is_empty = False
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{file} is truncated or corrupt in line {number + 1}: download it again."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{file}, line {number}: {error}; correct the line, or download the file again if it "
            "is C4's."
        ) from error
    if is_empty:
        raise InputError(f"{file} is empty, it has no document: download it again.")


def _text(line: bytes) -> bytes:
    """The text of a line; a ValueError if the line is not a C4 document."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError('no document with a "text"')
    return document["text"].encode()


def _num_records(shard: Path) -> int:
    with contextlib.closing(ArrayRecordReader(os.fspath(shard))) as reader:
        return reader.num_records()
