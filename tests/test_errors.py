import errno
import os

import pytest

from galore_jax.errors import InputError, run_cli


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
