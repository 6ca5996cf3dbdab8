"""Complete runs of scripts/train.py: killed, interrupted, refused, and resumed bit for bit."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from galore_jax.errors import InputError
from galore_jax.files import locked
from galore_jax.training import loop
from galore_jax.training.config_file import load_config
from galore_jax.training.pretraining import Pretraining

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "scripts" / "train.py"
STEPS = 60
CONFIG = f"""
[model]
vocab_size = 258
hidden_size = 24
intermediate_size = 32
num_layers = 2
num_heads = 2
max_length = 32
dtype = "bfloat16"

[data]
sequence_length = 32
batch_size = 4

[optimizer]
galore.rank = 8
galore.update_proj_gap = 7
galore.moments = "rotate"
galore.lazy_overlap = 0.3
warmup_steps = 5

[training]
steps = {STEPS}
evaluate_every = 20
evaluation_tokens = 400
checkpoint_every = 10
log_every = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The configuration file, and a cache so that all processes compile once."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def command(place, name, *arguments):
    folder = f"training.folder={place / name}"
    return [sys.executable, str(TRAIN), "--config", str(place / "tiny.toml"), folder, *arguments]


def environment(place):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }


def finish(place, arguments):
    return subprocess.run(
        arguments, env=environment(place), capture_output=True, text=True, timeout=120
    )


def lines(folder):
    """Of metrics.jsonl, without the clock's."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second")
    return [{name: line[name] for name in line if name not in clock} for line in read]


@pytest.fixture(scope="module")
def uninterrupted(place):
    finished = finish(place, command(place, "uninterrupted"))
    assert finished.returncode == 0, finished.stderr
    return finished, place / "uninterrupted"


@pytest.mark.slow
def test_a_run_writes_its_configuration_metrics_summary_and_picture(uninterrupted):
    finished, folder = uninterrupted
    read = lines(folder)
    assert [line["step"] for line in read if "loss" in line] == list(range(STEPS))
    assert [line["step"] for line in read if "validation_loss" in line] == [20, 40, 60]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["validation_loss"] == read[-1]["validation_loss"] < 5.5
    assert summary["seconds"] > 0
    assert summary["optimizer_bytes"] > 0
    assert f"{summary['validation_loss']:.4f}" in finished.stdout
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["50", "60"]
    assert (folder / "config.toml").exists()
    for shown in ("compiling", "tokens/s", "lr ", "loss ", "memory", "100%"):
        assert shown in finished.stderr


def kill_between(process, checkpoints):
    """After step 25 is logged: checkpoints 10 and 20 exist."""
    metrics = checkpoints.parent / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 27:
        time.sleep(0.002)
    process.kill()


def kill_during(process, checkpoints):
    """While a later checkpoint is being written: stopped there first, so that it stays."""
    unfinished = []
    while process.poll() is None:
        if any(path.name.startswith("20") for path in checkpoints.glob("*0*")):
            unfinished = list(checkpoints.glob("[3-6]0.orbax-checkpoint-tmp"))
        if unfinished:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if unfinished[0].exists():
                process.kill()
                process.wait()
                assert unfinished[0].exists()
                return
            process.send_signal(signal.SIGCONT)
            unfinished = []
    pytest.fail("no checkpoint was caught being written")


def kill_right_after(process, checkpoints):
    """As soon as a checkpoint has its name."""
    while not (checkpoints / "20").exists():
        time.sleep(0.0005)
    process.kill()


def kill_before_the_first(process, checkpoints):
    """After a few steps are logged."""
    metrics = checkpoints.parent / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.001)
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill", [kill_between, kill_during, kill_right_after, kill_before_the_first]
)
def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(place, uninterrupted, kill):
    _, expected = uninterrupted
    name = kill.__name__
    process = subprocess.Popen(
        command(place, name),
        env=environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kill(process, place / name / "checkpoints")
    assert process.wait() == -signal.SIGKILL
    assert not (place / name / "summary.json").exists()
    resumed = finish(place, command(place, name, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert ("step 0 of" in resumed.stderr) == (kill is kill_before_the_first)
    assert lines(place / name) == lines(expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_prints_how_to_resume(place, uninterrupted, number):
    _, expected = uninterrupted
    name = f"interrupted by {number.name}"
    process = subprocess.Popen(
        command(place, name),
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = place / name / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 13:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert "all saved.\nResume with" in errors
    done = len([line for line in lines(place / name) if "loss" in line])
    assert (place / name / "checkpoints" / str(done)).exists()
    finished = finish(place, shlex.split(errors.strip().splitlines()[-1]))
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {done}" in finished.stderr
    assert lines(place / name) == lines(expected)


@pytest.fixture
def delivered_interrupts():
    """A shell starts its background jobs with SIGINT ignored, and their processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("delivered_interrupts")
@pytest.mark.parametrize("script", ["train.py", "compare.py", "finetune.py"])
def test_an_interrupt_while_modules_load_leaves_no_traceback(place, script):
    process = subprocess.Popen(
        [sys.executable, str(TRAIN.with_name(script)), "--config", str(place / "tiny.toml")],
        env=environment(place),
        stderr=subprocess.PIPE,
        text=True,
    )
    # JAX comes with NumPy, whose libraries show that modules are being loaded.
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        process.kill()
        pytest.skip("without /proc it does not show what a process has loaded")
    until = time.monotonic() + 60
    while "numpy" not in maps.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors == ""


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_the_run_resumes(place, uninterrupted):
    _, expected = uninterrupted
    disk = place / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (expected / "checkpoints" / "50").rglob("*"))
    tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", str(disk)]
    try:
        subprocess.run(tmpfs, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    try:
        full = finish(place, command(place, "disk/run"))
        assert full.returncode == 2
        assert "Traceback" not in full.stderr
        message = full.stderr.strip().splitlines()[-1]
        assert message.startswith("error: the disk is full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finished = finish(place, command(place, "disk/run", "--resume"))
        assert finished.returncode == 0, finished.stderr
        assert lines(disk / "run") == lines(expected)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def error_of(place, capfd, monkeypatch):
    """Runs the script in this process and returns the one line that it prints."""
    handler = signal.getsignal(signal.SIGINT)

    def run(*arguments, name="refused"):
        monkeypatch.setattr(sys, "argv", command(place, name, *arguments)[1:])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TRAIN), run_name="__main__")
        assert stopped.value.code == 2
        printed = capfd.readouterr().err.strip()
        assert printed.startswith("error: ")
        assert "\n" not in printed
        return printed

    yield run
    signal.signal(signal.SIGINT, handler)


def test_bad_input_ends_in_one_sentence(error_of, place):
    assert "galore.rnak is unknown; did you mean rank?" in error_of("optimizer.galore.rnak=3")
    assert "there is no tokenizer at nowhere.model" in error_of("data.tokenizer=nowhere.model")
    assert "has 258 tokens, more than model.vocab_size, 100" in error_of("model.vocab_size=100")
    assert "nothing to resume" in error_of("--resume")
    assert not (place / "refused").exists()


def test_a_folder_that_cannot_be_made_is_refused(error_of, place):
    (place / "a file").write_text("")
    (place / "loop").symlink_to(place / "loop")
    for name in ("a file", "a file/run", "loop/run", "x" * 300):
        assert " cannot be used (" in error_of(name=name)


def test_a_second_process_in_the_folder_is_refused(error_of, place):
    folder = place / "at work"
    folder.mkdir()
    with locked(folder / "lock", "training", "wait"):
        refused = error_of(name="at work")
        assert f"process {os.getpid()} on " in refused
        assert f" is training in {folder}: let it finish" in refused
        assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory_ends_with_the_settings_that_need_less(place, monkeypatch, error):
    def fail(folder):
        raise error

    monkeypatch.setattr(loop, "Checkpoints", fail)
    config = load_config(place / "tiny.toml", [f"training.folder={place / 'memory'}"])
    with pytest.raises(InputError, match=r"too little memory .*: lower data\.batch_size, raise "):
        loop.train(Pretraining(config))


@pytest.mark.parametrize(
    "setting", ["model.vocab_size=1000000000", "data.batch_size=1000000000000"]
)
def test_sizes_that_no_memory_holds_are_refused_at_once(error_of, place, setting):
    assert "there is too little memory for this training" in error_of(setting, name="too large")


@pytest.mark.slow
def test_checkpoints_without_metrics_are_a_run_too(error_of, place, uninterrupted):
    _, folder = uninterrupted
    aside = [folder / "metrics.jsonl", folder / "summary.json"]
    for path in aside:
        path.rename(path.with_suffix(".aside"))
    try:
        assert "already holds a run" in error_of(name="uninterrupted")
        refused = finish(place, command(place, "uninterrupted", "--resume"))
        assert refused.returncode == 2
        assert "has its last checkpoint but no steps in metrics.jsonl" in refused.stderr
    finally:
        for path in aside:
            path.with_suffix(".aside").replace(path)


@pytest.mark.slow
def test_a_finished_run_is_not_resumed(error_of, uninterrupted):
    assert "is finished, there is nothing to resume" in error_of("--resume", name="uninterrupted")


@pytest.mark.slow
def test_only_settings_that_change_no_result_may_change_on_resume(error_of, place, uninterrupted):
    """The check does not depend on a summary, so a finished run without one serves."""
    _, folder = uninterrupted
    (folder / "summary.json").rename(folder / "aside.json")
    try:
        refused = error_of("--resume", "model.hidden_size=32", name="uninterrupted")
        assert "a run with another model.hidden_size, 24, which is 32 here" in refused
        refused = error_of("--resume", "optimizer.learning_rate=0.1", name="uninterrupted")
        assert "another optimizer.learning_rate, 0.01, which is 0.1 here" in refused
        resumed = finish(place, command(place, "uninterrupted", "--resume", "training.log_every=5"))
        assert resumed.returncode == 0, resumed.stderr
        assert "log_every = 5" in (folder / "config.toml").read_text()
    finally:
        (folder / "aside.json").replace(folder / "summary.json")
