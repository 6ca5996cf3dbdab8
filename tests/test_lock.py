import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from galore_jax import files
from galore_jax.errors import InputError
from galore_jax.files import locked, write_text

HOLD = """
import sys, runpy
from pathlib import Path
with runpy.run_path(sys.argv[1])["locked"](Path(sys.argv[2]), "working", "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    return locked(folder / "lock", "training in runs/demo", "name another training.folder")


def test_a_second_process_is_refused_with_the_holder_its_host_and_the_time(tmp_path):
    with hold(tmp_path):
        holder = (
            rf"process {os.getpid()} on {socket.gethostname()} \(since 2\d\d\d-.*\) is training in"
        )
        with pytest.raises(InputError, match=rf"^{holder} .*name another training\.folder"):
            hold(tmp_path).__enter__()
    with hold(tmp_path):
        pass


def test_a_lock_ends_with_its_killed_process(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, files.__file__, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on "):
            hold(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert f"process {holder.pid}" in (tmp_path / "lock").read_text()
    with hold(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_an_empty_lock_file_is_held_by_another_process(tmp_path):
    with hold(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(InputError, match="another process is training in runs/demo: let it"):
            hold(tmp_path).__enter__()


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with hold(tmp_path), hold(tmp_path):
        pass


def test_neither_a_lock_nor_a_temporary_file_is_opened_through_a_symbolic_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("lock", "text.json.unfinished"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(InputError, match=r"lock is a symbolic link, which is not followed: remove"):
        hold(tmp_path).__enter__()
    with pytest.raises(InputError, match=r"text\.json\.unfinished is a symbolic link, which"):
        write_text(tmp_path / "text.json", "new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "text.json").exists()
