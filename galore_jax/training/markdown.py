"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; rows that are shorter than the columns end with empty cells."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    complete = [[*cells, *[""] * (len(columns) - len(cells))] for cells in rows]
    return [line(columns), "|" + " --- |" * len(columns), *map(line, complete)]
