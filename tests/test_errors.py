import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from galore_jax.errors import InputError, require_extra, run_cli

SCRIPTS = Path(__file__).parent.parent / "scripts"


def told(capsys, error):
    """The line that a script prints which ends in this error, after checking its status."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_bad_input_is_told(capsys):
    assert told(capsys, InputError("x is 3: give 4.")) == "error: x is 3: give 4.\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP])
def test_a_path_that_cannot_be_used_is_told_by_name_and_reason(capsys, number):
    error = OSError(number, os.strerror(number), "some/path")
    expected = f"error: some/path cannot be used ({os.strerror(number)}): name another path"
    assert told(capsys, error).startswith(expected)


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "x", "path"), OSError("x"), TypeError("x")])
def test_an_error_of_the_program_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_cli(main)


def test_a_missing_extra_is_one_sentence_with_the_command_that_brings_it(capsys):
    require_extra("train", "json", "math")
    with pytest.raises(ImportError) as caught:
        require_extra("train", "json", "no_such_module")
    expected = 'this needs no_such_module, which is not installed: pip install "galore-jax[train]"'
    assert str(caught.value) == expected
    assert told(capsys, caught.value) == f"error: {expected}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("train.py", "--config", "configs/demo.toml"),
        ("compare.py", "--config", "configs/demo.toml"),
        ("generate.py", "runs/demo", "--prompt", "a"),
        ("plot.py", "runs/demo"),
        ("memory.py", "--config", "configs/demo.toml"),
        ("prepare_c4.py", "some/folder"),
        ("train_tokenizer.py",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_each_script_names_the_extra_it_needs(arguments):
    name, *rest = arguments
    code = (
        "import importlib.util, runpy, sys\n"
        "found = importlib.util.find_spec\n"
        "hidden = ('flax', 'grain')\n"
        "importlib.util.find_spec = lambda name: None if name in hidden else found(name)\n"
        f"runpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *rest]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=SCRIPTS.parent)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert 'pip install "galore-jax[train]"' in done.stderr
