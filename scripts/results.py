"""Prints the table of kept results: of all files in a folder that compare.py has written.

python scripts/results.py docs/results/c4_5m
python scripts/results.py docs/results/c4_5m --steps docs/results/step_*.json \
    --memory docs/results/memory_1b*.json
python scripts/results.py docs/results/c4_5m --steps docs/results/step_350m_cpu.json \
    --memory docs/results/memory_1b_layerwise.json --picture docs/optimizers.png

To keep a comparison, copy comparison.json from its training.folder there, under a name of its own.
--steps and --memory add a table of what the optimizers cost, with a column for each file: the time
of a step relative to AdamW's, from `benchmark.py optimizers --json FILE`, and the memory of the
largest program of a training, from `memory.py --optimizers … --json FILE`. Optimizers must be
called there as the files in the folder. --picture draws the losses against all of these, with bars
of one standard error.
"""

import argparse
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError, check_installed, run_cli


def main() -> None:
    """Reads the arguments and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with files of comparison.json")
    files: dict[str, Any] = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument("--steps", **files, help="of benchmark.py optimizers")
    parser.add_argument("--memory", **files, help="of memory.py")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the PNG to write")
    arguments = parser.parse_args()
    if arguments.picture:
        check_installed("matplotlib")
        if not (arguments.steps or arguments.memory):
            raise InputError("--picture draws losses against --steps or --memory: give one.")

    from analysis.results import cost_table, draw, read_memory, read_results, read_steps, table

    entries = read_results(arguments.folder)
    costs = [*map(read_steps, arguments.steps), *map(read_memory, arguments.memory)]
    print(table(entries), end="")
    if costs:
        print("\n" + cost_table(entries, costs), end="")
    if arguments.picture:
        draw(entries, costs, arguments.picture)


if __name__ == "__main__":
    run_cli(main)
