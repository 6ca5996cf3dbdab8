"""Preparing and opening C4."""

import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from galore_jax.data.batches import DataConfig, documents
from galore_jax.data.c4 import open_c4, prepare_c4, read_examples
from galore_jax.errors import InputError
from galore_jax.files import locked

ROOT = Path(__file__).parent.parent


def write_inputs(folder, train_files=2, documents_per_file=30, words=20):
    """Files in the layout of allenai/c4 with random words; returns the texts of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = {"train": [], "validation": []}
    for split, count in (("train", train_files), ("validation", 1)):
        for index in range(count):
            with gzip.open(folder / f"c4-{split}.{index:05d}-of-01024.json.gz", "wt") as file:
                for _ in range(documents_per_file):
                    text = "é" + " ".join(f"{draw.getrandbits(48):x}" for _ in range(words))
                    texts[split].append(text)
                    line = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b"}
                    file.write(json.dumps(line) + "\n")
    return texts


def script_process(*arguments):
    return subprocess.Popen(
        [sys.executable, "scripts/prepare_c4.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(*arguments):
    process = script_process(*arguments)
    _, messages = process.communicate(timeout=120)
    return process.returncode, messages.splitlines()[-1]


def files_of(data_dir):
    return {path.name: path.read_bytes() for path in Path(data_dir, "c4/en/3.1.0").iterdir()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c4")
    texts = write_inputs(folder / "inputs" / "en", documents_per_file=600)
    prepare_c4(str(folder / "inputs"), str(folder / "data"))
    return str(folder / "data"), texts


def test_tfds_reads_the_result_without_tensorflow(prepared):
    data_dir, texts = prepared
    for split in ("train", "validation"):
        source = tfds.data_source("c4/en", data_dir=data_dir, split=split)
        assert [example["text"].decode() for example in source] == texts[split]
    assert source[0] | {"text": b""} == {
        "text": b"",
        "timestamp": b"2019-04-25T12:57:54Z",
        "url": b"http://a.b",
        "content-length": b"",
        "content-type": b"",
    }
    assert "tensorflow" not in sys.modules


def test_preparing_again_changes_nothing(prepared):
    data_dir, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in Path(data_dir, "c4/en/3.1.0").iterdir()}
    prepare_c4(str(Path(data_dir).parent / "inputs"), data_dir)
    after = {path: path.stat().st_mtime_ns for path in Path(data_dir, "c4/en/3.1.0").iterdir()}
    assert before == after


@pytest.mark.slow
def test_a_killed_preparation_continues_where_it_was(tmp_path):
    texts = write_inputs(tmp_path / "inputs", train_files=16, documents_per_file=1000)
    out = tmp_path / "data"
    process = script_process(tmp_path / "inputs", "--out", out, "--workers", 2)
    while len(finished := list(out.rglob("*-of-00016"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # returns when its workers, which share its stderr, have ended
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("c4-*-of-*[0-9]")}
    assert 3 <= len(finished) < 17
    with pytest.raises(InputError, match=r"holds no complete c4/en.*: make or finish it by"):
        open_c4(str(out), "train")

    assert run_script(tmp_path / "inputs", "--out", out, "--workers", 2)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    prepare_c4(str(tmp_path / "inputs"), str(tmp_path / "uninterrupted"), workers=2)
    assert files_of(out) == files_of(tmp_path / "uninterrupted")
    assert list(open_c4(str(out), "train")) == texts["train"]


@pytest.mark.slow
def test_an_interrupted_preparation_leaves_nothing_unfinished_and_says_how_to_continue(tmp_path):
    write_inputs(tmp_path / "inputs", train_files=16, documents_per_file=1000)
    out = tmp_path / "data"
    # A shell starts its background jobs with SIGINT ignored, and their processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = script_process(tmp_path / "inputs", "--out", out, "--workers", 2)
    signal.signal(signal.SIGINT, before)
    while not list(out.rglob("*-of-00016")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages.splitlines()[-1] == "interrupted: run the same command again to continue."
    assert "Traceback" not in messages
    assert not list(out.rglob("*.unfinished"))


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_the_preparation_can_be_resumed(tmp_path, tiny_disk):
    texts = write_inputs(tmp_path / "inputs", documents_per_file=600)
    arguments = (tmp_path / "inputs", "--out", tiny_disk / "data", "--workers", 1)
    code, message = run_script(*arguments)
    assert code == 2
    assert message.startswith("error: the disk is full while writing")
    assert not list(tiny_disk.rglob("*.unfinished"))
    finished = {path: path.stat().st_mtime_ns for path in tiny_disk.rglob("c4-train*")}
    assert len(finished) == 1

    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    assert run_script(*arguments)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert list(open_c4(str(tiny_disk / "data"), "train")) == texts["train"]


def test_a_broken_file_keeps_the_other_shards_and_can_be_replaced(tmp_path):
    write_inputs(tmp_path / "inputs")
    broken = tmp_path / "inputs" / "c4-train.00001-of-01024.json.gz"
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(InputError, match=f"{broken} is truncated or corrupt in line "):
        prepare_c4(str(tmp_path / "inputs"), str(tmp_path / "data"))
    assert sorted(path.name for path in tmp_path.rglob("c4-*array_record*")) == [
        "c4-train.array_record-00000-of-00002",
        "c4-validation.array_record-00000-of-00001",
    ]

    write_inputs(tmp_path / "inputs")
    prepare_c4(str(tmp_path / "inputs"), str(tmp_path / "data"))
    assert len(open_c4(str(tmp_path / "data"), "train")) == 60


GOOD = b'{"text": "a", "timestamp": "", "url": ""}\n'
# Without the time of compression: pytest names the cases by their bytes, alike in every process.
zipped = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (zipped(b"\n \n"), "is empty"),
        (zipped(GOOD * 5 + b'{"text": "a'), "line 6: not JSON; correct the line, or download"),
        (zipped(GOOD + b" \n" + GOOD + b"\n\xff\xfe"), "line 5: not JSON"),  # blank lines count
        (zipped(GOOD + b'{"url": "a"}\n' + GOOD), 'line 2: no document with a "text"'),
        (zipped(GOOD * 3 + b'{"text": "\\ud800"}\n'), "line 4: .* surrogates not allowed; correct"),
        (zipped(GOOD + b"[" * 100_000), "line 2: not JSON"),
        (zipped(GOOD + b'{"text": ["a"]}'), 'line 2: no document with a "text"'),
        (
            zipped(GOOD + b'{"text": "a", "url": {}, "timestamp": 3}'),
            "line 2: no document .* fields of text",
        ),
        (random.Random(0).randbytes(1000), "truncated or corrupt in line 1"),
        (zipped(GOOD)[:-9], "truncated or corrupt in line "),
        (GOOD, "truncated or corrupt in line 1"),
        (zipped(GOOD * 9)[:-8] + b"\0" * 8, "truncated or corrupt in line 10"),
    ],
)
def test_a_broken_shard_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "c4-train.00000-of-00001.json.gz"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file}.* {message}"):
        list(read_examples(file))


def test_a_folder_without_the_files_is_refused(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "c4-validation.00000-of-01024.json.gz").unlink()
    with pytest.raises(InputError, match=r"holds no c4-validation\.\*\.json\.gz"):
        prepare_c4(str(tmp_path), str(tmp_path / "data"))


def test_a_folder_made_from_other_content_under_the_same_names_is_not_touched(tmp_path):
    write_inputs(tmp_path / "inputs")
    prepare_c4(str(tmp_path / "inputs"), str(tmp_path / "data"))
    before = files_of(str(tmp_path / "data"))
    write_inputs(tmp_path / "inputs", words=30)
    with pytest.raises(InputError, match="was made from other input files"):
        prepare_c4(str(tmp_path / "inputs"), str(tmp_path / "data"))
    assert files_of(str(tmp_path / "data")) == before


def test_a_folder_with_another_dataset_is_not_touched(tmp_path):
    write_inputs(tmp_path)
    foreign = tmp_path / "data/c4/en/3.1.0/c4-train.tfrecord-00000-of-00001"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(InputError, match="holds files that are not from prepare_c4"):
        prepare_c4(str(tmp_path), str(tmp_path / "data"))
    assert foreign.read_text() == "mine"


def test_a_folder_that_another_process_prepares_is_not_touched(tmp_path):
    write_inputs(tmp_path)
    unfinished = tmp_path / "data/c4/en/3.1.0/c4-train.array_record-00000-of-00001.unfinished"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("half")
    refusal = r"\(since .*\) is preparing .*, or choose another --out\."
    with (
        locked(tmp_path / "data/c4/en/lock", "preparing it", "wait"),
        pytest.raises(InputError, match=refusal),
    ):
        prepare_c4(str(tmp_path), str(tmp_path / "data"))
    assert unfinished.read_text() == "half"


def test_a_folder_that_is_not_c4_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} holds no complete c4/en"):
        documents(DataConfig(source=str(tmp_path)), "train")


def test_a_missing_shard_is_named_and_made_again(tmp_path):
    texts = write_inputs(tmp_path)
    prepare_c4(str(tmp_path), str(tmp_path / "data"))
    shard = tmp_path / "data/c4/en/3.1.0/c4-train.array_record-00001-of-00002"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard} is missing: run"):
        open_c4(str(tmp_path / "data"), "train")
    prepare_c4(str(tmp_path), str(tmp_path / "data"))
    assert shard.read_bytes() == content
    assert list(open_c4(str(tmp_path / "data"), "train")) == texts["train"]


def test_a_corrupt_shard_is_named_with_its_record(prepared, tmp_path):
    data_dir, texts = prepared
    folder = tmp_path / "c4/en/3.1.0"
    folder.mkdir(parents=True)
    for name, content in files_of(data_dir).items():
        (folder / name).write_bytes(content)
    shard = folder / "c4-train.array_record-00001-of-00002"
    content = bytearray(shard.read_bytes())
    content[40_000:40_300] = bytes(300)
    shard.write_bytes(content)
    source = open_c4(str(tmp_path), "train")
    assert source[599] == texts["train"][599]
    with pytest.raises(InputError, match=f"{shard} is corrupt at record [0-9]+: "):
        list(source)
    shard.write_bytes(content[:50_000])
    with pytest.raises(InputError, match=f"{shard} is corrupt at record 0: "):
        open_c4(str(tmp_path), "train")[600]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GALORE_JAX_TEST_DATA"), reason="needs real data")
def test_real_c4_is_prepared_text_by_text(tmp_path):
    folder = Path(os.environ["GALORE_JAX_TEST_DATA"], "c4")
    prepare_c4(str(folder), str(tmp_path), workers=2)
    for split, count in (("train", 1900), ("validation", 100)):
        expected = [
            json.loads(line)["text"]
            for file in sorted(folder.glob(f"en/c4-{split}.*"))
            for line in gzip.decompress(file.read_bytes()).splitlines()
        ]
        assert len(expected) == count
        assert list(open_c4(str(tmp_path), split)) == expected
