"""Prints the table of kept results: of all files in a folder that compare.py has written.

python scripts/results.py docs/results/c4_5m

To keep a comparison, copy comparison.json from its training.folder there, under a name of its own.
"""

import argparse
from pathlib import Path

from galore_jax.errors import run_cli


def main() -> None:
    """Reads the arguments and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with files of comparison.json")
    arguments = parser.parse_args()

    from analysis.results import read_results, table

    print(table(read_results(arguments.folder)), end="")


if __name__ == "__main__":
    run_cli(main)
