"""The benchmarks of scripts/benchmark.py: each module has its `Settings`, and `measure`."""

from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
# A line of the table that a benchmark prints, by column.
Row = dict[str, Any]
