"""Memory and communication of a training step on many devices, in bytes.

python scripts/scaling.py --picture scaling.png
python scripts/scaling.py --models 7b --layouts data --devices 8 --optimizers adamw,projected
python scripts/scaling.py --models 350m --device h100
python scripts/scaling.py --models 350m --layouts fsdp --devices 8 --device v5e

Compiles the training step of a LLaMA for meshes of virtual CPU devices, or with --device for absent
GPUs or TPUs (this needs galore-jax[cuda] or galore-jax[tpu], but no such device). Nothing is run,
no array is allocated. The table has GiB per device and step: the state, XLA's temporaries, the
arrays that each kind of collective moves, how much of that is asynchronous, and what a device sends
to the others of its node and to other nodes. A node of TPUs is the whole slice.

optimizers  adamw      optax.adamw
            contrib    optax.contrib.galore, mapped over the stacked layers
            full       galore_jax.adamw with full gradients
            projected  galore_jax.adamw with gradients that the backward pass projects
            over       the same, with the moments divided along the data axis too
layouts     data       each device has all weights and a part of the batch
            fsdp       weights and optimizer state are divided over all devices too
            hybrid     as fsdp over 8 devices, a node of GPUs, with a copy for every 8

All have bfloat16 weights, float32 gradients, accumulated before they are reduced, and float32
moments. The batch is that of the configuration, in micro-batches of at most --rows rows per device.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from command_line import positive, separated

from galore_jax.errors import InputError, check_installed, require_choice, run_cli
from galore_jax.files import write_json

GIB = 2**30
NODE = 8  # as in analysis.gpus, which starts JAX
ROOT = Path(__file__).parents[1]
MODELS = ("350m", "1b", "7b")
LAYOUTS = ("data", "fsdp", "hybrid")
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer.name=adamw",),
    "contrib": ("optimizer.name=adamw",),
    "full": ("optimizer.name=galore_adamw", "optimizer.gradients=full"),
    "projected": ("optimizer.name=galore_adamw",),
    "over": ("optimizer.name=galore_adamw", "mesh.shard_moments=true"),
}
LABELS = {
    "adamw": "AdamW",
    "contrib": "optax.contrib.galore",
    "full": "GaLore, full gradients",
    "projected": "GaLore, projected gradients",
    "over": "the same, moments over data too",
}
# Okabe and Ito's palette, suitable for colour-blind readers. Later lines are thinner, so that lines
# that coincide are all visible.
STYLES: dict[str, dict[str, Any]] = {
    "adamw": {"color": "#D55E00", "marker": "o", "linewidth": 4.8, "markersize": 7.5},
    "contrib": {"color": "#E69F00", "marker": "o", "linewidth": 2.8, "markersize": 5.5},
    "full": {"color": "#333333", "marker": "o", "linewidth": 1.2, "markersize": 3.2},
    "projected": {"color": "#0072B2", "marker": "o", "linewidth": 2.4, "markersize": 6},
    "over": {"color": "#009E73", "marker": "^", "linewidth": 1.4, "markersize": 6},
}
TITLES = {
    "data": "data parallel",
    "fsdp": "fully sharded",
    "hybrid": "sharded in nodes of 8,\nbetween nodes alone",
}


@dataclass(frozen=True)
class Case:
    """A step to compile."""

    model: str
    layout: str
    optimizer: str
    devices: int

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        fsdp = {"data": 1, "fsdp": self.devices, "hybrid": min(NODE, self.devices)}[self.layout]
        return {"data": self.devices // fsdp, "fsdp": fsdp, "tensor": 1}


@contextmanager
def mesh_for(case: Case, device: str) -> Iterator[Any]:
    """The mesh of a case, on virtual CPU devices or absent GPUs; None for a single CPU device."""
    import jax
    import numpy as np
    from analysis.compile_targets import target
    from jax.sharding import Mesh

    if device != "cpu":
        with target(device, case.axes) as sharding:
            yield sharding.mesh
    elif case.devices == 1:
        yield None
    else:
        devices = np.reshape(jax.devices()[: case.devices], tuple(case.axes.values()))
        yield Mesh(devices, tuple(case.axes))


def configuration(case: Case, rows: int, overrides: list[str]) -> Any:
    """The model's configuration, with the case's optimizer and mesh."""
    from galore_jax.training.config_file import load_config

    axes = [f"mesh.{name}={size}" for name, size in case.axes.items()]
    settings = [*OPTIMIZERS[case.optimizer], *axes, "training.accumulation=1", *overrides]
    config = load_config(ROOT / "configs" / f"llama_{case.model}.toml", settings)
    size = config.data.batch_size
    least = -(-size // (rows * case.devices))
    accumulation = next(parts for parts in range(least, size + 1) if size % parts == 0)
    return replace(config, training=replace(config.training, accumulation=accumulation))


def contrib_steps(config: Any, mesh: Any) -> tuple[Any, list[Any]]:
    """The state and the step of optax.contrib.galore.

    It projects matrices without batch axes, so it is mapped over the stacked layers, with one count
    for all of them. Its state is divided along the largest axis that the mesh's fsdp divides.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from galore_jax.training.mesh import whole
    from galore_jax.training.pretraining import Pretraining
    from galore_jax.training.state import abstract_state
    from galore_jax.training.step import make_gradients

    galore = config.optimizer.galore
    tx = optax.contrib.galore(1e-3, galore.rank, galore.update_proj_gap)
    rest = optax.adam(1e-3)
    gradients_of = make_gradients(Pretraining(config), mesh)
    start = abstract_state(Pretraining(config), mesh)
    layer = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), start.params["layers"]
    )
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, jax.eval_shape(tx.init, layer))

    def init(params: Any) -> Any:
        others = {name: leaf for name, leaf in params.items() if name != "layers"}
        return jax.vmap(tx.init, out_axes=axes)(params["layers"]), rest.init(others)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        gradients, metrics = gradients_of(state.params, state.opt_state, batch)
        layers, (of_layers, of_rest) = gradients.pop("layers"), state.opt_state
        update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        layers, of_layers = update(layers, of_layers, state.params["layers"])
        others, of_rest = rest.update(gradients, of_rest)
        updates = dict(cast(dict, others), layers=layers)
        params = optax.apply_updates(state.params, updates)
        new = state._replace(params=params, opt_state=(of_layers, of_rest), step=state.step + 1)
        return new, metrics

    def placed(leaf: Any) -> Any:
        if mesh is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        sizes = [(n, axis) for axis, n in enumerate(leaf.shape) if n % mesh.shape["fsdp"] == 0]
        largest = max(sizes, default=(0, None))[1]
        spec = ["fsdp" if axis == largest else None for axis in range(leaf.ndim)]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), start.params)
    state = start._replace(opt_state=jax.tree.map(placed, jax.eval_shape(init, wide)))
    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state), whole(mesh)
    return state, [jax.jit(step, out_shardings=shardings, donate_argnums=0)]


def table(costs: dict[Case, Any]) -> str:
    """All costs in GiB, a line each."""
    other = lambda moved: moved["all-to-all"] + moved["collective-permute"]
    columns = {
        "state": lambda cost: cost.state,
        "moments": lambda cost: cost.moments,
        "temporaries": lambda cost: cost.temporaries,
        "all-gather": lambda cost: cost.payload["all-gather"],
        "all-reduce": lambda cost: cost.payload["all-reduce"],
        "reduce-scatter": lambda cost: cost.payload["reduce-scatter"],
        "other": lambda cost: other(cost.payload),
        "async": lambda cost: cost.asynchronous,
        "in node": lambda cost: cost.inside,
        "between": lambda cost: cost.between,
        "refresh": lambda cost: sum(cost.refresh.values()),
    }
    width = {name: max(len(name), 7) + 2 for name in columns}
    lines, last = [], None
    for case, cost in costs.items():
        if (case.model, case.layout) != last:
            last = case.model, case.layout
            head = f"{case.model.upper()}, {case.layout}"
            names = "".join(f"{name:>{width[name]}}" for name in columns)
            lines += ["", f"{head:<14}{'devices':>7}{names}"]
        figures = "".join(f"{get(cost) / GIB:>{width[name]}.3f}" for name, get in columns.items())
        lines.append(f"{case.optimizer:<14}{case.devices:>7}{figures}")
    return "\n".join(lines[1:])


def statement(costs: dict[Case, Any], rate: float, network: float) -> str:
    """Sentences on what is all-reduced, and on the time of work and of the network between nodes.

    Args:
      costs: of all cases.
      rate: floating-point operations a second and device.
      network: bytes a second that a device sends to other nodes.
    """
    lines = []
    for case, cost in costs.items():
        base = costs.get(replace(case, optimizer="adamw"))
        reduced = base.payload["all-reduce"] if base else 0
        if case.layout == "data" and case.devices == NODE and reduced and case.optimizer != "adamw":
            part = cost.payload["all-reduce"] / reduced
            lines.append(
                f"{case.model.upper()}, data parallel over {NODE}: {case.optimizer} all-reduces "
                f"{part:.3f} of the bytes that adamw does."
            )
    largest = max((case.devices for case in costs), default=0)
    if any(cost.between for case, cost in costs.items() if case.devices == largest):
        lines += [
            "",
            f"Bytes that a device sends to other nodes, on {largest} devices, at "
            f"{network / 1e9:g} GB/s, and its matrix products, at {rate / 1e12:g} TFLOP/s:",
            "",
            f"{'':<26}{'GiB sent':>10}{'ms for it':>12}{'ms of work':>12}",
        ]
    for case, cost in costs.items():
        if case.devices == largest and cost.between:
            work, sending = cost.flops / rate, cost.between / network
            name = f"{case.model.upper():<6}{case.layout:<8}{case.optimizer:<12}"
            figures = f"{cost.between / GIB:>10.3f}{1e3 * sending:>12.0f}{1e3 * work:>12.0f}"
            lines.append(f"{name}{figures}")
    return "\n".join(lines)


def draw(costs: dict[Case, Any], picture: Path) -> None:
    """Draws the bytes that a device sends in a step: a column for each model, a row per layout."""
    from matplotlib.ticker import FuncFormatter

    from galore_jax.training.plots import new_figure, write_png

    models = list(dict.fromkeys(case.model for case in costs))
    layouts = list(dict.fromkeys(case.layout for case in costs))
    size = (max(7.2, 1.0 + 3.4 * len(models)), 1.4 + 2.6 * len(layouts))
    figure = new_figure(size)
    grid = figure.subplots(len(layouts), len(models), squeeze=False, sharex=True)
    for row, layout in enumerate(layouts):
        for column, model in enumerate(models):
            axes = grid[row][column]
            for optimizer, style in STYLES.items():
                points = sorted(
                    (case.devices, (cost.between + cost.inside * (layout != "hybrid")) / GIB)
                    for case, cost in costs.items()
                    if (case.model, case.layout, case.optimizer) == (model, layout, optimizer)
                )
                if points:
                    axes.plot(*zip(*points, strict=True), label=LABELS[optimizer], **style)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xticks(sorted({case.devices for case in costs}))
            axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(model.upper(), fontweight="bold")
            if column == 0:
                axes.set_ylabel(f"{TITLES[layout]}\nGiB")
            if row == len(layouts) - 1:
                axes.set_xlabel("devices")
    labelled = {
        label: line
        for axes in grid.flat
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in LABELS.values() if label in labelled]
    lines = [labelled[label] for label in labels]
    columns = min(3, len(models) + 1)
    figure.legend(lines, labels, loc="outside lower center", frameon=False, ncols=columns)
    figure.suptitle("Bytes that a device sends in a training step", fontweight="bold")
    write_png(figure, picture)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases to compile, without those that equal another."""
    chosen = [
        Case(model, layout, optimizer, devices)
        for model in arguments.models
        for layout in arguments.layouts
        for devices in sorted(arguments.devices)
        for optimizer in arguments.optimizers
    ]

    def is_new(case: Case) -> bool:
        if case.optimizer == "over" and case.axes["data"] == 1:
            return "projected" not in arguments.optimizers
        if case.layout != "data" and case.devices == 1:
            return "data" not in arguments.layouts
        is_fsdp = case.layout == "hybrid" and case.devices <= NODE
        return not is_fsdp or "fsdp" not in arguments.layouts

    return [case for case in chosen if is_new(case)]


def main() -> None:
    """Reads the arguments, compiles, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names: dict[str, Any] = {"type": separated(), "metavar": "NAME,…"}
    parser.add_argument("--models", default=list(MODELS), **names)
    parser.add_argument("--layouts", default=list(LAYOUTS), **names)
    parser.add_argument("--optimizers", default=list(OPTIMIZERS), **names)
    parser.add_argument("--devices", default=[1, 8, 16, 64], type=separated(int), metavar="N,…")
    known = "cpu, rtx3060, rtx4080, rtx4090, a100, h100, v5e, v5p or v6e"
    parser.add_argument("--device", default="cpu", help=known)
    parser.add_argument("--rows", type=positive, default=64, help="of a micro-batch on a device")
    rate: dict[str, Any] = {"type": float, "metavar": "RATE"}
    parser.add_argument("--tflops", default=400, help="of a device, for the last lines", **rate)
    parser.add_argument("--network", default=50, help="GB/s between nodes, likewise", **rate)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, in bytes")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw into this PNG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    check(arguments)
    if arguments.picture:
        check_installed("matplotlib")
    if arguments.device == "cpu":
        start_cpus(max(arguments.devices))

    from analysis.compile_targets import TARGETS, TPUS
    from analysis.memory import DoesNotFit
    from analysis.step_cost import step_cost, trainer_steps

    from galore_jax.training.mesh import check_training_mesh
    from galore_jax.training.pretraining import Pretraining

    require_choice("--device", arguments.device, ("cpu", *TARGETS))
    costs: dict[Case, Any] = {}
    misfits, todo = [], cases(arguments)
    for number, case in enumerate(todo, 1):
        start = time.perf_counter()
        name = f"{case.model} {case.layout} {case.devices} {case.optimizer}"
        config = configuration(case, arguments.rows, arguments.overrides)
        with mesh_for(case, arguments.device) as mesh:
            check_training_mesh(Pretraining(config), mesh)
            steps = contrib_steps if case.optimizer == "contrib" else trainer_steps
            node = case.devices if arguments.device in TPUS else NODE
            try:
                costs[case] = step_cost(config, mesh, *steps(config, mesh), node)
            except DoesNotFit as error:
                misfits.append(f"{name}: {error}")
        seconds = time.perf_counter() - start
        print(f"[{number}/{len(todo)}] {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print("\n\n".join([*([table(costs)] if costs else []), *misfits]))
    if arguments.json:
        rows = [asdict(case) | asdict(cost) for case, cost in costs.items()]
        write_json(arguments.json, rows)
    print(f"\n{statement(costs, 1e12 * arguments.tflops, 1e9 * arguments.network)}".rstrip())
    if arguments.picture and costs:
        draw(costs, arguments.picture)


def check(arguments: argparse.Namespace) -> None:
    """Raises an `InputError` for options that cannot be used."""
    for option in ("json", "picture"):
        file = getattr(arguments, option)
        if file and not file.parent.is_dir():
            raise InputError(f"there is no folder {file.parent} for --{option}: make it first.")
    for option, known in (("models", MODELS), ("layouts", LAYOUTS), ("optimizers", OPTIMIZERS)):
        for name in getattr(arguments, option):
            require_choice(f"--{option}", name, known)
    for option in ("tflops", "network"):
        if not getattr(arguments, option) > 0:
            raise InputError(f"--{option} = {getattr(arguments, option)} is not above 0.")
    for number in arguments.devices:
        if number < 1 or number.bit_count() != 1:
            raise InputError(f"--devices {number} is not a power of two: take 1, 2, 4, 8, …")
    chosen = ("optimizer.name", "optimizer.gradients", "training.accumulation", "mesh.")
    for override in arguments.overrides:
        if override.startswith(chosen):
            raise InputError(f"{override}: the options choose this, see --help.")


def start_cpus(number: int) -> None:
    """Makes JAX start with virtual CPU devices, for programs that are compiled but never run."""
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".lstrip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)


if __name__ == "__main__":
    run_cli(main)
