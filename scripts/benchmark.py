"""Benchmarks of the optimizer: each prints a table, of medians over repeats in one process.

python scripts/benchmark.py step model=llama leaves=stacked repeats=3
python scripts/benchmark.py step device=v6e size=1b tokens=8192
python scripts/benchmark.py refresh --json refresh.json
python scripts/benchmark.py state

step: time of a training step of blocks of LLaMA, float32, also relative to AdamW, and relative to
  AdamW with a refresh of every matrix at one step in 200.
    model=blocks       blocks alone; plain: blocks written in plain JAX, with jax.checkpoint; or
                       llama: with embedding and head
    size=350m          one of configs/llama_*.toml: the width
    layers=0           number of layers; left out: 4 for blocks (1 with a device), all for llama
    rank=0             of the projections; left out: that of the configuration
    tokens=2048        per step, a multiple of 256
    leaves=separate    a leaf per layer, as optax.contrib.galore needs them to project them; or
                       stacked, as in the models of galore_jax, without that baseline
    dense=flax         layers with the derivative that JAX makes; or galore_jax: with the
                       hand-written one of galore_jax's models, by which AdamW too is faster
                       on CPUs
    repeats=7          of each baseline
    optimizers=        of adamw, optax.contrib.galore, galore_full, galore_projected; left out: all,
                       with a device the first and the last; adamw is always there
    params=float32     dtype of parameters and moments, or bfloat16
    products=          dtype of products; left out: float32 on a CPU, bfloat16 on other devices
    device=            v5e, v5p, v6e, rtx3060, rtx4080, rtx4090, a100 or h100: compiles for it and
                       runs nothing; it may be absent, its compiler comes with the extra tpu or cuda
  With a device the rows are estimates, each with its ratio to AdamW's: milliseconds (ms), products
  (gflop), bytes to and from the device's memory (gb), bytes of instructions that only copy or
  transpose (copied_gb), and temporaries (temporary_mb); without_time names what takes time that the
  estimate leaves out. Two rows below say what part of the published peak the estimate of a simple
  program reaches. See docs/accelerators.md for how far to trust it.
branch: a step of make_step, which branches on whether a basis is due, against two programs, on
  blocks as for step: time of a step without and with a refresh, of compiling, and temporaries.
    layers=2           number of blocks
    repeats=7          of each form
tokens: the same as step for stacked blocks, by tokens per step, and a picture.
    sizes=130m,350m,1b   widths and ranks, from configs/
    tokens=256,512,1024,2048,4096,8192  per step, multiples of 256
    layers=1             number of blocks
    dense=flax           as for step
    repeats=3            of each baseline
    picture=tokens.png   file to draw
optimizers: the same for every optimizer that a configuration compares, and bytes of state, for
  blocks with separate leaves.
    compare=5m           one of configs/llama_*.toml with tables [compare.LABEL]
    size=350m            the width; this and the next as for step
    layers=0
    tokens=2048
    optimizers=          some of the labels beside adamw; left out: all
    repeats=7            of each optimizer
    device=              estimates, as for step
finetuning: time of a fine-tuning step, its share of the refreshes included, and bytes of state, for
  every optimizer of configs/glue/minilm.toml, on a batch of random tokens.
    repeats=21           of each optimizer
state: bytes of the optimizer's state, by part, and of the gradients that micro-batches accumulate
  for the blocks, for each size in configs/, in float32; nothing is allocated.
refresh: time and captured energy of each method to refresh a basis, for the gradient of a gate
  projection along a real training run, warm-started from the basis of 50 updates earlier.
    sizes=512,1024,2048  widths of the model, any of these
    tokens=1024          per training step, a multiple of 256
    repeats=3            of each method
kernels: time of 8-bit Adam and of the lift at the shape of a gate projection, in plain JAX and, on
  TPUs and GPUs, as kernels, whose results are compared first: with a larger difference than one
  unit in the last place of bfloat16 they are not timed.
    size=350m          one of configs/llama_*.toml
    repeats=21         of each form
    device=            estimates, as for step
training: time of a step of the trainer, losses and peak memory, on the standard library's source.
    size=350m          one of configs/llama_*.toml
    optimizer=         its optimizer.name; left out: that of the configuration
    weights=           its model.weights, likewise
    rows=16            of the configuration's data.sequence_length, per step
    steps=50           of the training
    device=            an estimate, as for step
    program=train_step   which it is of, or refresh_step
sketch: energy that bases from sketches capture at each refresh of a training run, for every matrix,
  relative to the singular vectors of the same gradient.
    size=5m              one of configs/
    source=data          data.source of that configuration
    tokenizer=data/spiece4096.model  its data.tokenizer
    steps=1000           of training
all: the benchmarks that fit the device at hand, each in a process of its own, with a page of their
  results and the same as JSON: make benchmark.
    folder=benchmark   for results.md and results.json
    minutes=15         after which the rest is left out
    form=              device, at full size, or small, for CPUs; left out: by what is at hand

With --json a file gets the rows too: {"bench": ..., "rows": [{"name": ..., "seconds": ...}, ...]}.
"""

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import as_text

from galore_jax.errors import InputError, require_choice, run_cli, suggestion
from galore_jax.files import write_json

BENCHMARKS = (
    *("step", "branch", "tokens", "optimizers", "finetuning", "state"),
    *("refresh", "kernels", "training", "sketch", "all"),
)
Settings = TypeVar("Settings")


def main() -> None:
    """Reads the arguments, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", help=", ".join(BENCHMARKS))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see above")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    arguments = parser.parse_intermixed_args()
    require_choice("bench", arguments.bench, BENCHMARKS)
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"there is no folder {arguments.json.parent} for --json: make it first.")

    from importlib import import_module

    benchmark = import_module(f"benchmarks.{arguments.bench}")
    rows = benchmark.measure(read_settings(benchmark.Settings, arguments.settings))
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, {"bench": arguments.bench, "rows": rows})


def read_settings(kind: type[Settings], overrides: Sequence[str]) -> Settings:
    """The settings of a benchmark, a dataclass of integers and strings, from words `key=value`.

    Raises:
      InputError: a key is unknown, a number is not a whole one above 0, or a value is out of range.
    """
    hints, values = typing.get_type_hints(kind), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not a setting: write key=value, as in repeats=5.")
        if key not in hints:
            raise InputError(f"the setting {key} is unknown{suggestion(key, hints)}")
        if hints[key] is int and not (text.isdecimal() and int(text) > 0):
            raise InputError(f"{key} must be a whole number above 0, not {text!r}.")
        values[key] = hints[key](text)
    return kind(**values)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, with a column for each key and a dash if a row lacks it."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([as_text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


if __name__ == "__main__":
    run_cli(main)
