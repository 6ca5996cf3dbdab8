"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table with these cells."""
    lines = header, ["---"] * len(header), *rows
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
