"""The tests in mesh/ need eight devices, so each file runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", str(file)]
    environment = os.environ | {"XLA_FLAGS": flags}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
