"""The benchmarks of scripts/benchmark.py: each module has its `Settings`, and `measure`."""

from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
# Of the models in it.
SIZES = [path.stem.removeprefix("llama_") for path in sorted(CONFIGS.glob("llama_*.toml"))]
# A line of the table that a benchmark prints, by column.
Row = dict[str, Any]


def as_text(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
