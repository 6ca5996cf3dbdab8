"""Errors that the user can fix end in one sentence instead of a traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Problems with a path, which the user can choose or change.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
# Modules that come with an extra of this package.
_EXTRAS = {
    "train": (
        *("flax", "orbax", "tensorflow_datasets", "array_record", "grain"),
        *("sentencepiece", "tqdm", "pydantic", "filelock"),
    ),
    "plots": ("matplotlib",),
    "huggingface": ("safetensors", "transformers", "jinja2"),
}
_EXTRA_OF = {module: extra for extra, modules in _EXTRAS.items() for module in modules}


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
        return error.errno in FULL_DISK
    # JAX quotes NCCL, which says the same of shared memory.
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return False
    return any(os.strerror(number) in str(error) for number in FULL_DISK)


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; errors that the user can fix exit with status 2 and one line.

    These are an `InputError`, a missing extra, a full disk, and a path that cannot be read or
    written. Ctrl-C exits with status 130, as in a shell.
    """
    try:
        main()
    except InputError as error:
        sys.exit(_report(str(error)))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF:
            raise
        sys.exit(_report(_install_hint(module)))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        path = getattr(error, "filename", None)
        if names_full_disk(error):
            place = f" while writing {path}" if path else ""
            remedy = "free some space and run the same command again, a training with --resume."
            sys.exit(_report(f"the disk is full{place}: {remedy}"))
        if not isinstance(error, OSError) or error.errno not in _UNUSABLE or path is None:
            raise
        remedy = "name another path, or change this one."
        sys.exit(_report(f"{path} cannot be used ({error.strerror}): {remedy}"))


def _report(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2
