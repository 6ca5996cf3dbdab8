"""Settings from the command line, and a table of the rows, for all benchmarks."""

import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from galore_jax.errors import InputError

Row = dict[str, Any]
Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], overrides: Sequence[str]) -> Settings:
    """The settings of a benchmark, a dataclass of integers and strings, from words `key=value`.

    Raises:
      InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    hints, values = typing.get_type_hints(kind), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not a setting: write key=value, as in repeats=5.")
        if key not in hints:
            there_are = f"there are {', '.join(hints)}" if hints else "this benchmark has none"
            raise InputError(f"the setting {key} is unknown; {there_are}.")
        try:
            values[key] = hints[key](text)
        except ValueError:
            raise InputError(f"{key} must be a whole number, not {text!r}.") from None
    return kind(**values)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with a column for each key and a dash if a row lacks it."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([_text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
