"""Compares optimizers on the same model, text and steps: a table and a picture.

python scripts/compare.py --config configs/demo.toml
python scripts/compare.py --config configs/llama_5m.toml --seeds 0,1,2 \
    --optimizers adamw,muon,galore_adamw \
    --rates 0.00125,0.0025,0.005,0.01,0.02 --matrix-rates 0.0625,0.125,0.25,0.5,1

The second command tunes each optimizer first: on the grid of both rates, at full length and with
the first seed, it goes from the configured rates to where no neighbour has a lower loss. The
optimizers are those of the tables [compare.LABEL] in the file, whose settings replace those of
[optimizer], or any optimizer.name. Runs are kept: the same command continues, and a larger grid
uses them again.
"""

import argparse
import sys

from command_line import end_quietly_on_ctrl_c, separated

if __name__ == "__main__":
    end_quietly_on_ctrl_c()  # Also while JAX is imported.

from galore_jax.errors import run_cli


def main() -> None:
    """Reads the arguments, trains and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/demo.toml")
    parser.add_argument(
        "--optimizers",
        type=separated(),
        default=(),
        metavar="LABEL,…",
        help="which to compare (default: the tables of the file, or adamw, muon, galore_adamw)",
    )
    parser.add_argument(
        "--seeds",
        type=separated(int),
        default="0",
        help="one run for each, as in 0,1,2 (default: %(default)s)",
    )
    for option, what in (
        ("--rates", "learning rates to choose from, as in 0.005,0.01,0.02"),
        ("--matrix-rates", "and matrix rates, as in 0.125,0.25,0.5"),
    ):
        parser.add_argument(option, type=separated(float), default=(), help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from analysis.comparison import compare, table

    from galore_jax.training.config_file import load_comparison
    from galore_jax.training.loop import Interrupted
    from galore_jax.training.processes import keep_programs

    keep_programs()
    configs = load_comparison(arguments.config, arguments.overrides, arguments.optimizers)
    try:
        rows = compare(configs, arguments.seeds, arguments.rates, arguments.matrix_rates)
    except Interrupted as stop:
        print("stopped: run the same command again to continue.", file=sys.stderr)
        sys.exit(stop.status)
    print(table(rows), end="")


if __name__ == "__main__":
    run_cli(main)
