"""The benchmarks of scripts/benchmark.py: each module has its `Settings`, and `measure`."""

from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
# Of the models in it.
SIZES = [path.stem.removeprefix("llama_") for path in sorted(CONFIGS.glob("llama_*.toml"))]
# A line of the table that a benchmark prints, by column.
Row = dict[str, Any]
