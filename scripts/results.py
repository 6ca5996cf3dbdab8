"""Prints the table of kept results: of all files in a folder that compare.py has written.

python scripts/results.py docs/results/c4_5m
python scripts/results.py docs/results/c4_5m --steps docs/results/steps.json \
    --memory docs/results/memory_1b.json docs/results/memory_1b_layerwise.json \
    --picture docs/optimizers.png

To keep a comparison, copy comparison.json from its training.folder there, under a name of its own.
--steps adds the time of a step relative to AdamW's, from `benchmark.py optimizers --json FILE`, and
--memory the bytes of the largest program of a training, from `memory.py --optimizers … --json
FILE`, in a column with the name of the file, of the optimizers that are called as the files in the
folder. --picture draws the losses against all of these, with bars of one standard error.
"""

import argparse
from pathlib import Path

from galore_jax.errors import InputError, check_installed, run_cli


def main() -> None:
    """Reads the arguments and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with files of comparison.json")
    parser.add_argument("--steps", type=Path, metavar="FILE", help="of benchmark.py optimizers")
    parser.add_argument(
        "--memory", type=Path, nargs="+", default=[], metavar="FILE", help="of memory.py"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the PNG to write")
    arguments = parser.parse_args()
    if arguments.picture:
        check_installed("matplotlib")
        if not (arguments.steps or arguments.memory):
            raise InputError("--picture draws losses against --steps or --memory: give one.")

    from analysis.results import draw, read_memory, read_results, read_steps, table

    entries, costs = read_results(arguments.folder), []
    if arguments.steps:
        costs.append(read_steps(arguments.steps))
    costs.extend(map(read_memory, arguments.memory))
    print(table(entries, costs), end="")
    if arguments.picture:
        draw(entries, costs, arguments.picture)


if __name__ == "__main__":
    run_cli(main)
