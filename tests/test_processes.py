"""Two processes that train together: stopped, killed, and resumed by another number of them."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from galore_jax.training.processes import joined

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"
STEPS = 60
# In float32, so that rounding in another order stays small; the mesh fits any number of devices.
CONFIG = f"""
[model]
vocab_size = 258
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 2
max_length = 32

[data]
sequence_length = 32
batch_size = 4

[optimizer]
learning_rate = 0.003
galore.rank = 8
galore.update_proj_gap = 7
warmup_steps = 5

[training]
steps = {STEPS}
evaluate_every = 20
evaluation_tokens = 400
checkpoint_every = 10
log_every = 1

[mesh]
data = 1
fsdp = -1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The configuration file, and a cache so that programs are compiled once."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def start(place, name, *arguments, count=2):
    """Starts a training in this number of processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(TRAIN), "--config", str(place / "tiny.toml")]
    command += [f"training.folder={place / name}", *arguments]

    def process(index):
        joins = ["--coordinator", address, "--processes", str(count), "--process", str(index)]
        return subprocess.Popen(
            command + (joins if count > 1 else []),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return [process(index) for index in range(count)]


def finish(processes, timeout=120):
    """Statuses, and what was printed to stderr."""
    printed = [process.communicate(timeout=timeout)[1] for process in processes]
    return [process.returncode for process in processes], printed


def succeed(processes):
    statuses, printed = finish(processes)
    assert statuses == [0] * len(processes), printed


def lines(folder):
    """Of metrics.jsonl, without the clock's."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second")
    return [{name: line[name] for name in line if name not in clock} for line in read]


def wait_for_lines(folder, count):
    metrics = folder / "metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def kill(processes, victim):
    """Kills one of two processes; the other ends by itself."""
    processes[victim].kill()
    statuses, printed = finish(processes, timeout=30)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, None), printed


@pytest.fixture(scope="module")
def undisturbed(place):
    processes = start(place, "undisturbed")
    statuses, printed = finish(processes)
    assert statuses == [0, 0], printed
    return printed, place / "undisturbed"


@pytest.mark.slow
def test_process_0_alone_writes_and_reports(undisturbed):
    (first, second), folder = undisturbed
    assert "100%" in first
    assert second == ""
    read = lines(folder)
    assert [line["step"] for line in read if "loss" in line] == list(range(STEPS))
    assert [line["step"] for line in read if "validation_loss" in line] == [20, 40, 60]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["50", "60"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_kill_two_processes_continue_bit_for_bit(place, undisturbed, victim):
    name = f"killed {victim}"
    processes = start(place, name)
    wait_for_lines(place / name, 27)
    kill(processes, victim)
    succeed(start(place, name, "--resume"))
    assert lines(place / name) == lines(undisturbed[1])


@pytest.mark.slow
def test_another_number_of_processes_continues_a_run(place, undisturbed):
    folder = place / "two, two, one, two"
    processes = start(place, folder.name)
    wait_for_lines(folder, 13)
    kill(processes, 1)
    processes = start(place, folder.name, "--resume")
    wait_for_lines(folder, 25)
    kill(processes, 0)
    processes = start(place, folder.name, "--resume", count=1)
    wait_for_lines(folder, 37)
    processes[0].kill()
    finish(processes)
    succeed(start(place, folder.name, "--resume"))
    expected, actual = lines(undisturbed[1]), lines(folder)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for one, other in zip(actual, expected, strict=True):
        for name in ("loss", "validation_loss"):
            assert abs(one.get(name, 0) - other.get(name, 0)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(place, undisturbed, number, told):
    folder = place / f"stopped by {number.name}"
    processes = start(place, folder.name)
    wait_for_lines(folder, 13)
    processes[told].send_signal(number)
    statuses, printed = finish(processes)
    assert statuses == [128 + number] * 2, printed
    assert "all saved.\nResume every process (adding its --coordinator, " in printed[0]
    assert "Resume" not in printed[1]
    done = len([line for line in lines(folder) if "loss" in line])
    assert (folder / "checkpoints" / str(done)).exists()
    succeed(start(place, folder.name, "--resume"))
    assert lines(folder) == lines(undisturbed[1])


def wait_for_changes(path, count, processes):
    """Until a file has changed this many times, or a process has ended."""
    last = None
    while count > 0 and all(process.poll() is None for process in processes):
        time.sleep(0.005)
        now = path.stat().st_mtime_ns if path.exists() else None
        count -= now != last
        last = now


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_lose_nothing(place, undisturbed):
    draw, folder = random.Random(0), place / "twenty"
    for number in range(20):
        if (folder / "summary.json").exists():  # There was time for all of its steps.
            assert lines(folder) == lines(undisturbed[1])
            folder = place / f"twenty, from {number} on"
        resumes = ["--resume"] if (folder / "metrics.jsonl").exists() else []
        processes = start(place, folder.name, "training.checkpoint_every=2", *resumes)
        # Every fourth time before the first step, as far as this machine is slow enough.
        if number % 4:
            wait_for_changes(folder / "metrics.jsonl", draw.randrange(3, 12), processes)
        time.sleep(draw.uniform(0, 0.5 if number % 4 else 5))
        victim, other = draw.sample(processes, 2)
        victim.kill()
        # The other ends by itself, unless it waits for the victim to join: a launcher ends it then.
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(timeout=5)
        other.kill()
        finish(processes)
    assert len(lines(folder)) > 10 or folder.name != "twenty"
    if not (folder / "summary.json").exists():
        succeed(start(place, folder.name, "--resume"))
    assert lines(folder) == lines(undisturbed[1])


@pytest.mark.slow
def test_what_only_one_process_can_refuse_ends_all(place):
    def refused(first, second):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        base = [sys.executable, str(TRAIN), "--config", str(place / "tiny.toml")]
        base += [f"training.folder={place / 'refused'}", "--coordinator", f"127.0.0.1:{port}"]
        processes = [
            subprocess.Popen(
                [*base, "--processes", "2", "--process", str(index), *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index, arguments in enumerate((first, second))
        ]
        statuses, printed = finish(processes, timeout=60)
        assert statuses == [2, 2], printed
        (sentence,) = [line for text in printed for line in text.splitlines()]
        return sentence

    differs = refused([], ["optimizer.galore.rank=4"])
    assert differs.startswith("error: process 1 was started with other settings than process 0")
    assert "started with other settings" in refused(["--resume"], [])
    assert "there is nothing to resume" in refused(["--resume"], ["--resume"])
    assert "optimizer.rnk is unknown" in refused([], ["optimizer.rnk=4"])
    both = ["mesh.fsdp=3"]
    assert "mesh.fsdp × mesh.tensor is 3" in refused(both, both)
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "node0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation, but no task that srun started
        ({"SLURM_STEP_NODELIST": "node[0-3]", "SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_a_process_that_a_cluster_started_with_others_joins_them(monkeypatch, environment, joins):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: calls.append(options))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with joined():
        pass
    assert len(calls) == joins


@pytest.mark.slow
def test_arguments_that_do_not_join_processes_are_refused_in_one_line(tmp_path):
    arguments = ["--config", str(tmp_path / "none.toml"), "--coordinator", "node0", "--processes"]
    command = [sys.executable, str(TRAIN), *arguments, "2", "--process"]
    for process, reason in ((0, "index out of range"), (2, "with process_id < num_processes")):
        refused = subprocess.run([*command, str(process)], capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: this process cannot join the others (")
        assert reason in refused.stderr
        assert refused.stderr.count("\n") == 1
