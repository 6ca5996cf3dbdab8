"""Bytes of a training, as compiled for a CPU, or for a GPU or TPU that is absent.

python scripts/memory.py --config configs/llama_7b_24gb.toml --device rtx4090
python scripts/memory.py --config configs/llama_7b_12gb.toml --device rtx3060
python scripts/memory.py --config configs/llama_7b_24gb.toml --device v6e
python scripts/memory.py --config configs/llama_7b.toml --device h100 mesh.fsdp=8
python scripts/memory.py --config configs/llama_60m.toml --optimizers adamw,galore_adamw,lora
python scripts/memory.py --config configs/llama_1b.toml --fit 12GB

Compiles three programs: the training step; a step that also refreshes the bases, if there are any;
and the start, which makes the first weights and the optimizer's state. A device must have room for
the largest of them. Nothing is run. A GPU or TPU is only the compiler's target: that needs
galore-jax[cuda] or galore-jax[tpu], but no such device. On a mesh all figures are those of each
device; mesh.data is 1 unless it is set, however many devices there are.

The table has, in GiB: the weights, bases and moments, whose sizes follow from their shapes; the
step's temporaries, which are gradients and activations above all; and the total of each program.
--optimizers compares several optimizers, by the labels of [compare.LABEL] in the file or by
optimizer.name.

--fit changes the configuration until it fits a device, one setting after another, the one that
costs least first: micro-batches of one row, moments in 8 bits, narrower bases, layer-wise updates,
weights in 8 bits, fewer rows, shorter rows. Each line has the memory of the largest program, a
setting, which is added to those above, and what it costs. Then batches are made as large as they
fit, and the last line is the command to train with. Without a CUDA compiler the programs are those
of a CPU, which need more.

With --json a file gets the figures in bytes: {optimizer: {"trained": parameters, "weights": ...,
"bases": ..., "moments": ..., "programs": {"train_step": {"arguments", "outputs", "aliased",
"temporaries", "total"}, "refresh_step": ..., "start": ...}}}. The compiler for TPUs refuses a
program that does not fit: of such a one there is the total alone, as far as it was counted.
"""

import argparse
import functools
import math
import sys
from bisect import bisect_left
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from command_line import separated

from galore_jax.errors import InputError, require_choice, run_cli
from galore_jax.files import write_json

GIB = 2**30
MAX_NUMBERS = 2**48  # In bytes, sizes still fit 64 bits, which XLA does not check.


def main() -> None:
    """Reads the arguments, compiles and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/llama_60m.toml")
    known = "rtx3060, rtx4080, rtx4090, a100, h100, v5e, v5p or v6e"
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--device", default="cpu", help=f"cpu, {known}")
    either.add_argument("--fit", metavar="SIZE", help=f"make it fit: 12GB, …, {known}")
    parser.add_argument("--optimizers", type=separated(), metavar="LABEL,…", help="compare these")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to this file too"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"there is no folder {arguments.json.parent} for --json: make it first.")

    import jax
    from analysis.compile_targets import TARGETS, target

    from galore_jax.training.config_file import load_comparison, load_config
    from galore_jax.training.mesh import make_mesh, mesh_sizes

    if arguments.fit:
        fit_to(arguments.fit, arguments.config, arguments.overrides)
        return
    require_choice("--device", arguments.device, ("cpu", *TARGETS))
    config = load_config(arguments.config, arguments.overrides)
    configs = {config.optimizer.name: config}
    if arguments.optimizers is not None:
        configs = load_comparison(arguments.config, arguments.overrides, arguments.optimizers)
    chosen = config.mesh
    devices = math.prod(n for n in (chosen.data, chosen.fsdp, chosen.tensor) if n != -1)
    card = TARGETS.get(arguments.device)
    name = card.name if card else "a CPU"
    if devices > 1:
        name = f"{devices} × {card.name}" if card else f"{devices} CPUs"
    if card is None:
        jax.config.update("jax_platforms", "cpu")
        if devices > 1:
            jax.config.update("jax_num_cpu_devices", devices)
    cards = target(arguments.device, mesh_sizes(chosen, devices)) if card else nullcontext()
    # A target enters its mesh, but a training makes its state and its steps outside of it.
    with cards as sharding, jax.set_mesh(None):
        # XLA_FLAGS may have made more CPU devices than are asked for here.
        mesh: Any = sharding.mesh if sharding else make_mesh(chosen, jax.devices()[:devices])
        print(f"compiling for {name}, up to a few minutes …", file=sys.stderr, flush=True)
        rows = {label: measure(config, mesh) for label, config in configs.items()}

    print(table(rows))
    if devices > 1:
        print("\nAll figures are those of each device.")
    if card is None:
        print(f"\nCompiled for {name}. A GPU needs less: on CPUs XLA computes bfloat16 in float32.")
    else:
        print(f"\nCompiled for {name}, without such a device: nothing was run.")
        for label, row in rows.items():
            print(f"{label}: {verdict(max(program_totals(row)), card)}")
    if arguments.json:
        write_json(arguments.json, rows)


def fit_to(size: str, file: str, overrides: list[str]) -> None:
    """Changes settings until the training fits a device, and prints them: see --fit above.

    Raises:
      InputError: the size is not one, the configuration is for a mesh, or no setting helps.
    """
    import jax
    from analysis.compile_targets import TARGETS, target
    from analysis.fit import Rung, larger_batches, next_rung, usable_bytes

    from galore_jax.training.config_file import load_config
    from galore_jax.training.mesh import mesh_sizes

    name, usable = usable_bytes(size)
    configured = load_config(file, overrides)
    if any(n > 1 for n in (configured.mesh.data, configured.mesh.fsdp, configured.mesh.tensor)):
        raise InputError("--fit is for one device: leave out the sizes of [mesh].")
    with ExitStack() as stack:
        mesh, compiler = None, "a CPU, which needs more"
        try:
            sharding = stack.enter_context(target(name, mesh_sizes(configured.mesh, 1)))
            stack.enter_context(jax.set_mesh(None))
            mesh, compiler = sharding.mesh, TARGETS[name].name
        except InputError as error:
            print(f"memory.py: {error}", file=sys.stderr)
            jax.config.update("jax_platforms", "cpu")
        print(f"JAX can take {usable / GIB:.1f} GiB; compiled for {compiler}.\n")

        @functools.cache  # The configured micro-batches may be tried again at the end.
        def largest(config: Any) -> tuple[int, bool]:
            return largest_program(config, mesh, usable)

        def fits(settings: list[str], rung: Rung) -> bool:
            needed, compiled = largest(load_config(file, settings))
            figure = f"{'' if compiled else '>'}{needed / GIB:.2f} GiB"
            cost = f"costs {rung.cost}" if rung.cost else ""
            print(f"{figure:>11}  {rung.setting:<42}  {cost}".rstrip(), flush=True)
            return needed <= usable

        settings, rung = list(overrides), Rung("as configured", "")
        while not fits(settings, rung):
            rung = next_rung(load_config(file, settings))
            if rung is None:
                raise InputError(
                    "no setting makes it fit: choose a smaller model or a larger device."
                )
            settings += rung.setting.split()
        larger = larger_batches(load_config(file, settings), configured)
        too_large = lambda setting: not fits([*settings, setting], Rung(setting, ""))
        number = bisect_left(larger, True, key=too_large)
        settings += larger[:number][-1:]
    # Of several values of a setting the last one counts.
    last = {setting.partition("=")[0]: setting for setting in settings}
    print(f"\npython scripts/train.py --config {file} {' '.join(last.values())}".rstrip())


def largest_program(config: Any, mesh: Any, usable: float) -> tuple[int, bool]:
    """The bytes of the largest program; or only of its state, and False, if that is too large."""
    from analysis.memory import state_parts

    state = sum(state_parts(config, mesh).values())
    if state > usable:
        return state, False
    return max(program_totals(measure(config, mesh))), True


def measure(config: Any, mesh: Any) -> dict[str, Any]:
    """The figures of a configuration: see the top of the file."""
    import jax
    from analysis.memory import compiled, state_parts

    from galore_jax.training.mesh import check_training_mesh
    from galore_jax.training.pretraining import Pretraining
    from galore_jax.training.state import init_state, trained, tree_size

    task = Pretraining(config)
    check_training_mesh(task, mesh)
    params = jax.eval_shape(lambda: init_state(task)).params
    size = tree_size(trained(task, params)[0])
    tokens = config.data.batch_size * config.data.sequence_length
    if max(size, tokens * config.model.vocab_size) > MAX_NUMBERS:
        raise InputError(
            "XLA cannot compile arrays as large as these sizes make: choose smaller ones."
        )
    return {"trained": size, **state_parts(config, mesh), "programs": compiled(config, mesh)}


def program_totals(row: dict[str, Any]) -> list[int]:
    """The bytes that each program needs."""
    return [program["total"] for program in row["programs"].values()]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each optimizer, in GiB; a dash if it has nothing to refresh."""
    parts = ("weights", "bases", "moments")
    programs = {"train_step": "step", "refresh_step": "refresh", "start": "start"}
    columns = (*parts, "temporaries", *programs.values())
    width = max(len("GiB of"), *map(len, rows)) + 2
    lines = [f"{'GiB of':<{width}}{'trained':>14}" + "".join(f"{name:>13}" for name in columns)]
    for label, row in rows.items():
        compiled = row["programs"]
        sizes = [row[part] for part in parts] + [compiled["train_step"].get("temporaries")]
        sizes += [compiled[name]["total"] if name in compiled else None for name in programs]
        figures = ("-" if size is None else f"{size / GIB:.3f}" for size in sizes)
        cells = "".join(f"{figure:>13}" for figure in figures)
        lines.append(f"{label:<{width}}{row['trained']:>14,}{cells}")
    return "\n".join(lines)


def verdict(needed: int, device: Any) -> str:
    """Whether a program fits what JAX can take of the memory of a target, and by how much."""
    usable, memory = device.usable / GIB, device.memory / GIB
    sizes = f"the {usable:.1f} GiB that JAX can take of the device's {memory:.1f}"
    left = usable - needed / GIB
    if left < 0:
        return f"it needs {needed / GIB:.1f} GiB and does not fit {sizes}: {-left:.1f} are missing."
    sentence = f"it fits {sizes}: {left:.1f} are left."
    if needed > device.taken:
        sentence += (
            f"\nBut JAX takes only {device.taken / device.memory:.0%} of it by default: "
            f"set XLA_CLIENT_MEM_FRACTION={device.usable / device.memory:.2f}."
        )
    return sentence


if __name__ == "__main__":
    run_cli(main)
