"""Benchmarks of the optimizer: each prints a table, of medians over repeats in one process.

python scripts/benchmark.py refresh --json refresh.json
python scripts/benchmark.py step model=llama layers=2 repeats=3
python scripts/benchmark.py state

refresh: time and captured energy of each method to refresh a basis, for the gradient of a gate
  projection along a real training run, warm-started from the basis of 50 updates earlier.
    sizes=512,1024,2048  widths of the model, any of these
    tokens=1024          per training step, a multiple of 256
    repeats=3            of each method
step: time of a training step of 2,048 tokens at the width of LLaMA 350M, rank 256, float32: without
  refreshes, and with a refresh of every matrix at one step in 200.
    model=blocks       blocks alone, or llama: with embedding and head
    layers=0           number of layers; 0: 4 for blocks, 24 for llama
    leaves=separate    a leaf per layer, as optax.contrib.galore needs them to project them; or
                       stacked, as in the models of galore_jax, without that baseline
    dense=flax         layers with the derivative that JAX makes; or galore_jax: with the
                       hand-written one of galore_jax's models, by which AdamW too is faster
                       on CPUs
    repeats=7          of each baseline
optimizers: time of a step of blocks at the width of LLaMA 350M, with the refreshes' part of it, and
  bytes of state, for every optimizer that a configuration compares, in one process.
    size=5m              one of configs/; ranks grow with the width
    layers=4             number of layers, separate leaves in Flax's Dense layers
    repeats=5            of each optimizer
finetuning: time of a fine-tuning step, its share of the refreshes included, and bytes of state, for
  every optimizer of configs/glue/minilm.toml, on a batch of random tokens, in one process.
    repeats=21           of each optimizer
state: bytes of the optimizer's state, by part, for each size in configs/; nothing is allocated.
accumulate: bytes that micro-batches accumulate, for the blocks and in all, for each size likewise.
tokens: time of a step of stacked blocks relative to AdamW, by tokens per step, and a picture.
    sizes=130m,350m,1b   widths and ranks, from configs/
    tokens=256,512,1024,2048,4096,8192  per step, multiples of 256
    layers=1             number of blocks
    dense=flax           as for step
    repeats=3            of each baseline
    picture=tokens.png   file to draw
sketch: energy that bases from sketches capture at each refresh of a training run, for every matrix,
  relative to the singular vectors of the same gradient.
    size=5m              one of configs/
    source=data          data.source of that configuration
    tokenizer=data/spiece4096.model  its data.tokenizer
    steps=1000           of training
dead: time of a step of a mixture of experts, refreshes included, if one expert gets no tokens or a
  weight is frozen, relative to that if all have gradients.
    experts=8            with two weights each
    width=256            of the weights
    tokens=256           for each expert
    steps=100            of each

With --json a file gets the rows too: {"bench": ..., "rows": [{"name": ..., "seconds": ...}, ...]}.
"""

import argparse
from pathlib import Path

from galore_jax.errors import InputError, run_cli
from galore_jax.files import write_json

BENCHMARKS = (
    "refresh",
    "step",
    "optimizers",
    "finetuning",
    "state",
    "accumulate",
    "tokens",
    "sketch",
    "dead",
)


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", help=", ".join(BENCHMARKS))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    arguments = parser.parse_intermixed_args()
    if arguments.bench not in BENCHMARKS:
        raise InputError(
            f"there is no benchmark {arguments.bench}; there are {', '.join(BENCHMARKS)}."
        )
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"there is no folder {arguments.json.parent} for --json: make it first.")

    from importlib import import_module

    from benchmarks.report import read_settings, table

    benchmark = import_module(f"benchmarks.{arguments.bench}")
    rows = benchmark.measure(read_settings(benchmark.Settings, arguments.settings))
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, {"bench": arguments.bench, "rows": rows})


if __name__ == "__main__":
    run_cli(main)
