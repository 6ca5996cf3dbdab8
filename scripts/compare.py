"""Compares training with GaLore and with AdamW: a table and a picture.

python scripts/compare.py --config configs/demo.toml
python scripts/compare.py --config configs/llama_5m.toml --seeds 0,1,2 --rates 0.0025,0.005,0.01
"""

import argparse
import signal
import sys

# Before training handles Ctrl-C, and at a second Ctrl-C, the process ends without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from galore_jax.errors import InputError, run_cli


def main() -> None:
    """Reads the arguments, trains and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/demo.toml")
    parser.add_argument(
        "--seeds", default="0", help="one run for each, as in 0,1,2 (default: %(default)s)"
    )
    parser.add_argument(
        "--rates", default="", help="as in 0.005,0.01: short runs choose one for each optimizer"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from galore_jax.training.compare import compare, table
    from galore_jax.training.config_file import load_config
    from galore_jax.training.loop import Interrupted

    config = load_config(arguments.config, arguments.overrides)
    seeds, rates = _numbers(arguments.seeds, int) or [0], _numbers(arguments.rates, float)
    try:
        rows = compare(config, seeds, rates)
    except Interrupted:
        sys.exit("stopped, all saved: run the same command again to continue.")
    print(table(rows), end="")


def _numbers(text: str, kind: type) -> list:
    try:
        return [kind(number) for number in text.split(",") if number]
    except ValueError:
        raise InputError(f"{text!r} is not a list of numbers: write them as in 1,2,3.") from None


if __name__ == "__main__":
    run_cli(main)
