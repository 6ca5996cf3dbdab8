"""Benchmarks of the optimizer: a table each, all baselines in one process, medians of repeats.

python scripts/benchmark.py refresh --json refresh.json
python scripts/benchmark.py step model=llama layers=2 repeats=3
python scripts/benchmark.py state

refresh: time and captured energy of every way to refresh a basis, on the gradient of a gate
  projection along a real training run, warm-started from the basis of 50 updates earlier.
    sizes=512,1024,2048  widths of the model, some of these
    tokens=1024          a step of the training run, a multiple of 256
    repeats=3            of each method
step: time of a training step of 2,048 tokens at the width of LLaMA 350M, rank 256, float32: without
  refreshes and with that of every matrix at one step in 200; and of blocks with staggered refreshes
  the slowest step of an interval over the median one.
    model=blocks       blocks alone, or llama: with embedding and head
    layers=0           0: 4 of blocks, 24 of llama
    leaves=separate    every layer's apart, as optax.contrib.galore needs them to project them; or
                       stacked, as galore_jax's models have them, without that baseline
    dense=flax         layers with the derivative that JAX makes; or galore_jax: the one written by
                       hand in galore_jax's models, by which AdamW too is faster on CPUs
    repeats=7          of each baseline
    intervals=1        with staggered refreshes, of each step the median; 0: not measured
state: bytes of the optimizer's state, by part, for every size in configs/; nothing is allocated.
accumulate: bytes that micro-batches accumulate, of the blocks and in all, for every size likewise.
tokens: time of a step of stacked blocks over AdamW's at several sizes of a step, and a picture.
    sizes=130m,350m,1b   widths and ranks of these of configs/
    tokens=256,512,1024,2048,4096,8192  multiples of 256
    layers=1             blocks
    dense=flax           as of step
    repeats=3            of each baseline
    picture=tokens.png   where it is drawn
sketch: energy that bases from sketches capture at every refresh of a training run, of every matrix
  against the singular vectors of the same gradient.
    size=5m              one of configs/
    source=data          as data.source and data.tokenizer of that configuration
    tokenizer=data/spiece4096.model  likewise
    steps=1000           of training
    rate=0.005           its learning rate
dead: time of a step of a mixture of experts, refreshes included, where one gets no tokens or
  another kernel is frozen, over that where all have gradients.
    experts=8            of two kernels each
    width=256            of these
    tokens=256           that each expert gets
    steps=100            of each

With --json the rows go to a file too: {"bench": ..., "rows": [{"name": ..., "seconds": ...}, ...]}.
"""

import argparse
import json
from pathlib import Path

from galore_jax.errors import InputError, run_cli

BENCHES = ("refresh", "step", "state", "accumulate", "tokens", "sketch", "dead")


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", help=", ".join(BENCHES))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="those named above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_intermixed_args()
    if arguments.bench not in BENCHES:
        raise InputError(f"there is no bench {arguments.bench}; there are {', '.join(BENCHES)}.")
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"there is no folder {arguments.json.parent} for --json: make it first.")

    from importlib import import_module

    from benchmarks.report import read_settings, table

    bench = import_module(f"benchmarks.{arguments.bench}")
    rows = bench.measure(read_settings(bench.Settings, arguments.settings))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"bench": arguments.bench, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_cli(main)
