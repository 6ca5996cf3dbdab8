"""What the commands share: a quiet Ctrl-C and types of arguments."""

import signal
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any


def end_quietly_on_ctrl_c() -> None:
    """Ends the process without a traceback before training handles Ctrl-C, and at a second one."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def positive(text: str) -> int:
    """The `type` of an argument with a number that is at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def separated(kind: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """The `type` of an argument with a list of values between commas; duplicates are left out."""

    def parse(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            found = list(dict.fromkeys(map(kind, parts)))
        except ValueError:
            raise ArgumentTypeError(f"{text!r} has more than numbers and commas") from None
        if not found:
            raise ArgumentTypeError("list something, separated by commas, or leave it out")
        return found

    return parse
