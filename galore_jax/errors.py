"""Bad input, full disks and unusable paths end in one sentence, not in a traceback."""

import errno
import importlib.util
import sys
from collections.abc import Callable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# What is wrong with a path that the user can choose or change.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)


class InputError(ValueError):
    """What the user gave cannot be used; the message names the thing and the remedy."""


class MissingExtraError(InputError, ImportError):
    """A dependency is not installed; the message has the command that installs it."""


def require_extra(extra: str, *modules: str) -> None:
    """Checks that the modules an optional part of the package needs are installed.

    Args:
      extra: the name in `pip install "galore-jax[...]"` that brings them.
      *modules: names of top-level modules; none of them is imported.

    Raises:
      MissingExtraError: a module is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f'installed: pip install "galore-jax[{extra}]"'
        )


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what the user can mend exits with status 2 and one line.

    That is an `InputError`, a full disk, or a path that cannot be read or written. Ctrl-C exits
    with status 130, as in a shell.
    """
    try:
        main()
    except InputError as error:
        sys.exit(_told(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        place = f" while writing {error.filename}" if error.filename else ""
        if error.errno in FULL_DISK:
            remedy = "free some space and run the same command again."
            sys.exit(_told(f"the disk is full{place}: {remedy}"))
        if error.errno not in _UNUSABLE or error.filename is None:
            raise
        remedy = "name another path, or change what it is."
        sys.exit(_told(f"{error.filename} cannot be used ({error.strerror}): {remedy}"))


def _told(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2
