"""C4 as a TFDS dataset: converted shard by shard from allenai/c4 `*.json.gz` files, and opened.

The folder is `DATA_DIR/c4/en/3.1.0`, with one array_record shard per input file. The metadata of
TFDS is written last, so a folder without it has not been completed.
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
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import tensorflow_datasets.text.c4  # registers the builder behind the name "c4/en"
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2
from tqdm import tqdm

from galore_jax.errors import InputError, names_full_disk
from galore_jax.files import UNFINISHED, atomic_write, locked, read_json, write_json

# Their classes are created at import, which type checkers cannot see.
_example_pb2: Any = tf_example_pb2
_feature_pb2: Any = tf_feature_pb2

_NAME = "c4/en"
_VERSION = "3.1.0"
_SPLITS = ("train", "validation")
_METADATA = "dataset_info.json"  # of TFDS; written last, it marks a complete folder
_INPUTS = "inputs.json"  # name and size of the input file of each shard


def prepare_c4(folder: str, data_dir: str, workers: int = 1) -> None:
    """Converts the json.gz files of allenai/c4 to a TFDS `c4/en` dataset of array_record shards.

    Shards completed by an earlier, interrupted call are kept. A complete folder is left unchanged.

    Args:
        folder: holds `c4-train.*.json.gz` and `c4-validation.*.json.gz`, directly or in `en/`.
        data_dir: TFDS data folder; the dataset goes to `data_dir/c4/en/3.1.0`.
        workers: number of processes that convert shards in parallel.

    Raises:
        InputError: there are no such files, one is damaged (the message names it and the line), or
            the output folder was made from other files, or another process is preparing it.
        OSError: the disk is full, or `data_dir` cannot be made.
    """
    files = {split: _input_files(folder, split) for split in _SPLITS}
    target = Path(data_dir, _NAME, _VERSION)
    sources = {
        target / f"c4-{split}.array_record-{index:05d}-of-{len(files[split]):05d}": file
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
            (target / _METADATA).unlink(missing_ok=True)
            try:
                _convert(missing, workers)
            finally:
                _remove_unfinished(target)
        if not (target / _METADATA).exists():
            _write_metadata(target, data_dir)


def open_c4(data_dir: str, split: str) -> "C4Documents":
    """Opens a split of the dataset that `prepare_c4` wrote to `data_dir`.

    Raises:
        InputError: `data_dir` holds no complete `c4/en`, or one of its shards is missing.
    """
    folder = Path(data_dir, _NAME, _VERSION)
    if not (folder / _METADATA).exists():
        raise InputError(
            f"{data_dir} holds no complete {_NAME}/{_VERSION}: make or finish it by "
            'scripts/prepare_c4.py, or give "python", the text of the standard library.'
        )
    try:
        source = tfds.data_source(_NAME, data_dir=data_dir, split=split, download=False)
    except Exception as error:  # TFDS's parsers raise all kinds of exceptions.
        raise InputError(
            f"{folder} cannot be read as an array_record dataset with a {split} split: "
            "make it again with scripts/prepare_c4.py."
        ) from error
    return C4Documents(source, split)


class C4Documents(Sequence[str]):
    """The documents of one split, by index."""

    def __init__(self, source: Any, split: str):
        """Wraps a TFDS data source after checking that all of its shards exist."""
        self._source = source
        info = source.dataset_info.splits[split]
        self._shards = [os.fspath(path) for path in info.filepaths]
        self._ends = list(itertools.accumulate(info.shard_lengths))
        for shard in self._shards:
            if not os.path.exists(shard):
                raise InputError(f"{shard} is missing: run scripts/prepare_c4.py again.")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> str:
        """The text of document `index`.

        Raises:
            InputError: its shard is corrupt.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._source[index]["text"].decode()
        except (RuntimeError, ValueError) as error:
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
                for example in read_examples(file):
                    writer.write(_serialized(example))
        # The only exception that array_record has for a failed write.
        except RuntimeError as error:
            if names_full_disk(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shard)) from error
            raise InputError(f"{shard} cannot be written: {error}.") from error


def read_examples(file: Path) -> Iterator[dict[str, bytes]]:
    """Yields the documents of an allenai/c4 json.gz file as examples of the TFDS features.

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
                    yield _example(line)
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


def _example(line: bytes) -> dict[str, bytes]:
    """The TFDS example of a line; a ValueError if the line is not a C4 document."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    # allenai/c4 dropped content-length and content-type, which TFDS lists.
    fields = ("text", "timestamp", "url", "content-length", "content-type")
    document = document if isinstance(document, dict) else {}
    texts = [document.get(field) or "" for field in fields]
    if "text" not in document or not all(isinstance(text, str) for text in texts):
        raise ValueError('no document with a "text" and fields of text')
    return {field: text.encode() for field, text in zip(fields, texts, strict=True)}


def _serialized(example: Mapping[str, bytes]) -> bytes:
    """The tf.train.Example that TFDS would write, with its fields in a fixed order."""
    features = {
        name: _feature_pb2.Feature(bytes_list=_feature_pb2.BytesList(value=[value]))
        for name, value in example.items()
    }
    message = _example_pb2.Example(features=_feature_pb2.Features(feature=features))
    return message.SerializeToString(deterministic=True)


def _write_metadata(target: Path, data_dir: str) -> None:
    """Writes what TFDS needs to read the shards; the file that marks a complete folder is last."""
    info = tfds.builder(_NAME, data_dir=data_dir, file_format="array_record").info
    splits = []
    for split in _SPLITS:
        shards = sorted(target.glob(f"c4-{split}.array_record-*"))
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[_num_records(shard) for shard in shards],
                num_bytes=sum(shard.stat().st_size for shard in shards),
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=tfds.core.Path(target),
                    dataset_name="c4",
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
    info.set_splits(tfds.core.SplitDict(splits))
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        for name in sorted(os.listdir(scratch), key=lambda name: name == _METADATA):
            with atomic_write(target / name) as unfinished:
                unfinished.write_bytes(Path(scratch, name).read_bytes())


def _num_records(shard: Path) -> int:
    with contextlib.closing(ArrayRecordReader(os.fspath(shard))) as reader:
        return reader.num_records()
