"""Errors that the user can fix end in one sentence instead of a traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# The extra of this package that a module comes with.
_EXTRA_OF = {
    **dict.fromkeys(("flax", "orbax", "grain", "pydantic", "sentencepiece", "tqdm"), "train"),
    **dict.fromkeys(("array_record", "tensorflow_datasets"), "train"),
    **dict.fromkeys(("safetensors", "transformers", "jinja2"), "huggingface"),
    "matplotlib": "plots",
}


class InputError(ValueError):
    """Input that cannot be used; the message names the problem and the remedy."""


def require(name: str, value: Any, holds: bool, wanted: str) -> None:
    """Raises an `InputError` unless the condition on a setting `holds`."""
    if not holds:
        raise InputError(f"{name} must be {wanted}, not {value}.")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises an `InputError` unless a setting has one of the values that it can have."""
    choices = list(choices)
    if value not in choices:
        raise InputError(f"{name} = {value!r} is unknown{suggestion(value, choices)}")


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Ends a sentence about an unknown name: the valid names close to it, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(valid)}." if valid else "."


@contextmanager
def one_sentence(problem: str) -> Iterator[None]:
    """Turns whatever a library raises for a damaged file into an `InputError` of one sentence."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic in Rust, as of a regular expression, is no Exception.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{problem}: {reason}") from None


def check_installed(*modules: str) -> None:
    """Looks for modules of this package's extras.

    Raises:
      ModuleNotFoundError: one is missing; the message names the extra to install.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(_install_hint(module), name=module)


def _install_hint(module: str) -> str:
    command = f'pip install "galore-jax[{_EXTRA_OF[module]}]"'
    return f"this needs {module}, which is not installed: {command}"


def names_full_disk(error: BaseException | None) -> bool:
    """Whether an error says that a disk is full.

    TensorStore and array_record raise other types than `OSError`, with its text.
    """
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    # JAX quotes NCCL, which says the same of shared memory.
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return False
    return any(os.strerror(number) in str(error) for number in _FULL_DISK)


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; errors that the user can fix exit with status 2 and one line.

    These are an `InputError`, a missing extra, a full disk, and a path that cannot be read or
    written. Ctrl-C exits with status 130, as in a shell.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        path = getattr(error, "filename", None)
        module = str(getattr(error, "name", None)).partition(".")[0]
        if isinstance(error, InputError):
            problem = str(error)
        elif isinstance(error, ModuleNotFoundError) and module in _EXTRA_OF:
            problem = _install_hint(module)
        elif names_full_disk(error):
            place = f" while writing {path}" if path else ""
            remedy = "free some space and run the same command again, a training with --resume."
            problem = f"the disk is full{place}: {remedy}"
        elif isinstance(error, OSError) and path is not None:
            remedy = "name another path, or change this one."
            problem = f"{path} cannot be used ({error.strerror}): {remedy}"
        else:
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
