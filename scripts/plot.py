"""Draws the curves of one or more runs into one picture.

python scripts/plot.py runs/galore runs/adamw --out curves.png
"""

import argparse

from galore_jax.errors import check_installed, run_cli


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", default="curves.png", help="the PNG to write")
    arguments = parser.parse_args()
    check_installed("matplotlib")

    from galore_jax.training.plots import plot_curves

    plot_curves(arguments.runs, arguments.out)


if __name__ == "__main__":
    run_cli(main)
