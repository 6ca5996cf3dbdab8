"""Converts the json.gz files of allenai/c4 to a TFDS `c4/en` dataset that training reads.

    python scripts/prepare_c4.py INPUT_FOLDER --out data

INPUT_FOLDER holds c4-train.*.json.gz and c4-validation.*.json.gz (all or some of them), directly or
in `en/`. The same command continues an interrupted preparation; finished shards are kept.
"""

import argparse
import os
import sys

from command_line import positive

from galore_jax.errors import run_cli


def main() -> None:
    """Reads the arguments and prepares C4."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="INPUT_FOLDER", help="folder of allenai/c4 json.gz files")
    parser.add_argument("--out", default="data", help="folder to make (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        help="shards converted in parallel (default: the number of cores)",
    )
    arguments = parser.parse_args()

    from galore_jax.data.c4 import open_c4, prepare_c4

    try:
        prepare_c4(arguments.folder, arguments.out, arguments.workers)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    counts = (
        f"{len(open_c4(arguments.out, split)):,} {split}" for split in ("train", "validation")
    )
    print(f"{arguments.out} holds {' and '.join(counts)} documents of C4.")


if __name__ == "__main__":
    run_cli(main)
