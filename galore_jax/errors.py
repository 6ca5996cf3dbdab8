"""Bad input and full disks end in one sentence, not in a traceback."""

import errno
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave cannot be used; the message names the thing and the remedy."""


def exit_with_one_sentence(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an `InputError` or a full disk exits with status 2 and one line.

    Ctrl-C exits with status 130, as in a shell.
    """
    try:
        main()
    except InputError as error:
        sys.exit(_told(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        sys.exit(_told(f"the disk is full{place}: free some space and run the same command again."))


def _told(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2
