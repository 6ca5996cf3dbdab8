"""Bytes of a training run, predicted and as compiled, for a CPU or for a GPU that is absent.

python scripts/memory.py --config configs/llama_7b_24gb.toml --device rtx4090
python scripts/memory.py --config configs/llama_60m.toml --json memory.json data.batch_size=16
python scripts/memory.py --config configs/llama_7b.toml --device h100 mesh.fsdp=8
python scripts/memory.py --config configs/llama_60m.toml --optimizers adamw,galore_adamw,lora

The prediction is that of a training step. Three programs are compiled: the step, the step with a
refresh, if there are any, and the start, which makes the first weights and optimizer state. A card
has to have room for the largest of them. A GPU is only a target of the compiler: that needs
galore-jax[cuda], but no GPU. On a mesh all figures are those of each device; mesh.data is 1 unless
it is set, however many devices there are.

With --json a file gets the figures, in bytes, too: {"predicted": {part: ..., "total": ...},
"compiled": {"train_step": {"arguments", "outputs", "aliased", "temporaries", "total"},
"refresh_step": ..., "start": ...}}. --picture draws the predicted parts together with those of
other optimizers for the same model and batch. --optimizers predicts for several optimizers, of the
tables [compare.LABEL] of the file or by optimizer.name, and compiles nothing; its file has
{label: {part: ..., "total": ...}}.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

from galore_jax.command_line import comma_separated
from galore_jax.errors import InputError, check_installed, run_cli
from galore_jax.files import write_json

GIB = 2**30
# The fraction of a card's memory that JAX allocates by default, and the one that it can be told to
# allocate: the rest is for the driver and the CUDA context.
JAX_FRACTION, MAX_FRACTION = 0.75, 0.95
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "bases": "#009E73",
    "moments": "#56B4E9",
    "activations": "#E69F00",
}
LIGHT = ("moments", "activations")
Parts = dict[str, int]


def main() -> None:
    """Reads the arguments, compiles, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/llama_60m.toml")
    parser.add_argument("--device", default="cpu", help="cpu, rtx4090, a100 or h100")
    parser.add_argument("--optimizers", metavar="LABEL,…", help="predict for each of these")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to this file too"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the parts into this PNG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    for option in ("json", "picture"):
        file = getattr(arguments, option)
        if file and not file.parent.is_dir():
            raise InputError(f"there is no folder {file.parent} for --{option}: make it first.")
    if arguments.picture:
        check_installed("matplotlib")

    import jax

    from galore_jax.training.compile_targets import TARGETS, target
    from galore_jax.training.config_file import load_config
    from galore_jax.training.layout import check_training_mesh
    from galore_jax.training.memory import baselines, compiled, predict
    from galore_jax.training.mesh import make_mesh, mesh_sizes
    from galore_jax.training.stepper import check_gpu

    if arguments.device not in ("cpu", *TARGETS):
        names = ", ".join(("cpu", *TARGETS))
        raise InputError(f"there is no device {arguments.device}: take one of {names}.")
    config = load_config(arguments.config, arguments.overrides)
    chosen = config.mesh
    devices = math.prod(n for n in (chosen.data, chosen.fsdp, chosen.tensor) if n != -1)
    sizes = mesh_sizes(chosen, devices)
    if arguments.picture and devices > 1:
        raise InputError("--picture compares optimizers on one device: leave out mesh settings.")
    if arguments.optimizers is not None:
        if arguments.picture or devices > 1 or arguments.device != "cpu":
            raise InputError(
                "--optimizers is for one device, compiles nothing and draws nothing: leave out "
                "--device, --picture and mesh settings."
            )
        compare(arguments)
        return
    card = TARGETS.get(arguments.device)
    if card is None:
        jax.config.update("jax_platforms", "cpu")
        if devices > 1:
            jax.config.update("jax_num_cpu_devices", devices)
        check_gpu(config.optimizer)
    cards = target(arguments.device, sizes) if card else nullcontext()
    # A target enters its mesh, but a training makes its state and its steps outside of it.
    with cards as sharding, jax.set_mesh(None):
        if sharding is None:  # XLA_FLAGS may have made more CPU devices than are asked for here.
            mesh: Any = make_mesh(chosen, jax.devices()[:devices])
        else:
            mesh = sharding.mesh
        check_training_mesh(config, mesh)
        predicted = predict(config, mesh)
        name = name_of_devices(card, devices)
        print(f"compiling for {name}, up to a few minutes …", file=sys.stderr, flush=True)
        others = baselines(config) if arguments.picture else {}
        programs = compiled(config, mesh)

    if devices > 1:
        print(f"Of each of {devices} devices:\n")
    print(table(predicted, programs))
    if card is None:
        print("\nThe prediction is for a GPU; a CPU needs more: it computes bfloat16 in float32.")
    else:
        print(f"\nCompiled for {name}, without such a card: nothing was run.")
        print(fit(max(parts["total"] for parts in programs.values()), card.memory))
    if arguments.json:
        write_json(arguments.json, {"predicted": predicted, "compiled": programs})
    if arguments.picture:
        shape = f"{config.data.batch_size} × {config.data.sequence_length} tokens per step"
        title = f"{Path(arguments.config).stem}, {shape}"
        others[name_of(config)] = predicted
        draw(others, programs["train_step"]["total"], title, card, arguments.picture)


def compare(arguments: argparse.Namespace) -> None:
    """Predicts for each of --optimizers."""
    from galore_jax.training.config_file import load_comparison
    from galore_jax.training.memory import predict, trained_size

    labels = comma_separated("--optimizers", arguments.optimizers)
    configs = load_comparison(arguments.config, arguments.overrides, labels)
    predictions = {label: predict(config) for label, config in configs.items()}
    trained = {label: trained_size(config) for label, config in configs.items()}
    print(predictions_table(predictions, trained))
    if arguments.json:
        write_json(arguments.json, predictions)


def name_of_devices(card: Any, number: int) -> str:
    """As in "a CPU" or "8 × NVIDIA H100 80GB HBM3"."""
    if card is None:
        return "a CPU" if number == 1 else f"{number} CPUs"
    return card.name if number == 1 else f"{number} × {card.name}"


def name_of(config: Any) -> str:
    """The name of a configuration among the baselines."""
    name = config.optimizer.name
    bits = "8-bit " if name.endswith("8bit") else ""
    kinds = {"adamw": "Adam", "galore_adamw": "GaLore"}
    kind = name.removesuffix("8bit")
    return f"{bits}{kinds.get(kind, kind)}, here"


def table(predicted: Parts, programs: dict[str, Parts]) -> str:
    """The predicted parts on the left and the compiled figures on the right, in GiB."""
    gib = lambda size: f"{size / GIB:.3f}"
    left = [("predicted", "GiB"), *((part, gib(size)) for part, size in predicted.items())]
    right = [("compiled, GiB", *programs)]
    for key in programs["train_step"]:
        right.append((key, *(gib(parts[key]) for parts in programs.values())))
    error = 100 * (predicted["total"] / programs["train_step"]["total"] - 1)
    right.append(("prediction is off by", f"{error:+.1f}%"))
    lines = []
    for (part, size), (key, *sizes) in zip_longest(left, right, fillvalue=("", "")):
        line = f"{part:<12}{size:>8}    {key:<24}" + "".join(f"{size:>14}" for size in sizes)
        lines.append(line.rstrip())
    return "\n".join(lines)


def predictions_table(predictions: dict[str, Parts], trained: dict[str, int]) -> str:
    """A line for each optimizer: its trained parameters, and the predicted parts in GiB."""
    width = max(len("GiB of"), *map(len, predictions)) + 2
    parts = list(next(iter(predictions.values())))
    lines = [f"{'GiB of':<{width}}{'trained':>14}" + "".join(f"{part:>12}" for part in parts)]
    for label, sizes in predictions.items():
        figures = "".join(f"{sizes[part] / GIB:>12.3f}" for part in parts)
        lines.append(f"{label:<{width}}{trained[label]:>14,}{figures}")
    return "\n".join(lines)


def fit(needed: int, memory: int) -> str:
    """Whether a program fits what JAX can take of a card's memory, and by how much."""
    usable = MAX_FRACTION * memory
    sizes = f"the {usable / GIB:.1f} GiB that JAX can take of the card's {memory / GIB:.1f}"
    left = (usable - needed) / GIB
    if left < 0:
        return f"It does not fit {sizes}: {-left:.1f} are missing."
    sentence = f"It fits {sizes}: {left:.1f} are left."
    if needed > JAX_FRACTION * memory:
        sentence += (
            f"\nBut JAX takes only {JAX_FRACTION:.0%} of a card by default: "
            f"set XLA_CLIENT_MEM_FRACTION={MAX_FRACTION}."
        )
    return sentence


def draw(
    baselines: dict[str, Parts],
    compiled: int,
    title: str,
    card: Any,
    picture: Path,
) -> None:
    """Draws the parts of each baseline as a bar.

    Args:
      baselines: the parts by name; the last one was compiled too.
      compiled: the compiled total of the last one.
      title: title of the picture.
      card: the `GpuTarget` whose memory is marked, or None.
      picture: the PNG to write.
    """
    from galore_jax.training.plots import new_figure, write_png

    figure = new_figure((10, 4.4))
    axes = figure.subplots()
    longest = max(parts["total"] for parts in baselines.values()) / GIB
    for row, parts in enumerate(baselines.values()):
        start = 0.0
        for part, colour in COLOURS.items():
            size = parts[part] / GIB
            label = part if row == 0 else None
            edge = {"edgecolor": "white", "linewidth": 0.4}
            axes.barh(row, size, 0.62, start, color=colour, label=label, **edge)
            if size > 0.045 * longest:
                ink = "black" if part in LIGHT else "white"
                where = {"ha": "center", "va": "center", "color": ink, "fontsize": 10}
                axes.text(start + size / 2, row, f"{size:.1f}", **where)
            start += size
        total = f"{start:.1f} GiB"
        if row == len(baselines) - 1:
            total += f"\n(compiled: {compiled / GIB:.1f})"
        behind = {"color": "white", "pad": 1.5}
        place = (start + 0.008 * longest, row)
        axes.text(*place, total, va="center", fontsize=11, fontweight="bold", bbox=behind)
    axes.set_yticks(range(len(baselines)), [name.replace(", ", ",\n") for name in baselines])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * longest)
    if card is not None and card.memory / GIB < 1.14 * longest:
        memory = card.memory / GIB
        axes.axvline(memory, color="#222222", linewidth=1.4, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{card.name.removeprefix('NVIDIA ')}: {memory:.0f} GB",
            (memory, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=10,
        )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=11)
    axes.set_xlabel("GiB, predicted from shapes; only the last one was compiled too")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.legend(loc="outside lower center", frameon=False, ncols=len(COLOURS), fontsize=10)
    write_png(figure, picture)


if __name__ == "__main__":
    run_cli(main)
