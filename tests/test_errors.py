import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from galore_jax.errors import InputError, run_cli


def error_line(capsys, error):
    """The line that a script prints which ends in this error, after checking its status."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_bad_input_ends_in_one_line(capsys):
    assert error_line(capsys, InputError("x is 3: give 4.")) == "error: x is 3: give 4.\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP])
def test_an_unusable_path_is_reported_with_its_name_and_the_reason(capsys, number):
    error = OSError(number, os.strerror(number), "some/path")
    expected = f"error: some/path cannot be used ({os.strerror(number)}): name another path"
    assert error_line(capsys, error).startswith(expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_whatever_the_type_of_the_error(capsys, number):
    text, remedy = os.strerror(number), "free some space and run the same command again"
    named = error_line(capsys, OSError(number, text, "some/path"))
    assert named.startswith(f"error: the disk is full while writing some/path: {remedy}")
    for error in (ValueError(f"RESOURCE_EXHAUSTED: {text} [path]"), RuntimeError(text)):
        assert error_line(capsys, error).startswith(f"error: the disk is full: {remedy}")


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        TypeError("x"),
        # Of shared memory, which is no disk.
        jax.errors.JaxRuntimeError(f"INTERNAL: NCCL: shared memory: {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_an_error_of_the_program_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_cli(main)


HIDE = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.argv = sys.argv[2:]
sys.path.insert(0, "scripts")  # as for a script that is run by its name
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(module, *arguments):
    """Runs a script in an environment that lacks a module."""
    command = [sys.executable, "-c", HIDE, module, *arguments]
    return subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (("scripts/train.py", "--config", "configs/demo.toml"), "flax", "train"),
        (("scripts/prepare_c4.py", "inputs"), "tensorflow_datasets", "train"),
        (("scripts/plot.py", "runs/x"), "matplotlib", "plots"),
    ],
)
def test_a_script_without_an_extra_ends_with_the_command_that_installs_it(arguments, module, extra):
    done = run_without(module, *arguments)
    assert done.stderr == (
        f'error: this needs {module}, which is not installed: pip install "galore-jax[{extra}]"\n'
    )
    assert done.returncode == 2


def test_a_missing_module_of_no_extra_keeps_its_traceback():
    def main():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    with pytest.raises(ModuleNotFoundError):
        run_cli(main)
