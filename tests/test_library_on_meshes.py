"""The tests in mesh/ need eight devices, so each file runs in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from eight_devices import environment

FILES = sorted((Path(__file__).parent / "mesh").glob("on_mesh_*.py"))
FAST = {"on_mesh_placement.py"}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=[] if file.name in FAST else pytest.mark.slow, id=file.stem)
        for file in FILES
    ],
)
def test_on_eight_devices(file):
    pytest.importorskip("flax")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", str(file)]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
