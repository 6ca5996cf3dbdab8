"""Memory, communication and work of a compiled training step, for each device of a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from analysis.collectives import KINDS, Collective, collectives
from analysis.memory import bytes_by_part, compile_fitting, on_one_device
from analysis.products import flops
from galore_jax.training.config import Config
from galore_jax.training.mesh import on_mesh
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import TrainState, abstract_state, batch_shapes, tree_bytes
from galore_jax.training.step import make_train_step


@dataclass(frozen=True)
class Cost:
    """Bytes per device and step.

    Attributes:
      weights: of the parameters.
      bases: of GaLore's projections.
      moments: of the optimizer.
      state: of everything that is kept between steps: the three above, and counters.
      whole_state: the same on a single device.
      temporaries: the other memory of the step, as assigned by XLA.
      payload: sizes of the arrays that each kind of collective moves.
      asynchronous: those of them that move while the device does other work.
      inside: sent to other devices of the node.
      between: sent to other nodes.
      refresh: additional payload of a step that refreshes all bases, by kind.
      refresh_between: its additional bytes to other nodes.
      flops: operations of matrix products; not bytes.
    """

    weights: int
    bases: int
    moments: int
    state: int
    whole_state: int
    temporaries: int
    payload: dict[str, int]
    asynchronous: int
    inside: int
    between: int
    refresh: dict[str, int]
    refresh_between: int
    flops: int


def trainer_steps(config: Config, mesh: Mesh | None) -> tuple[TrainState, list[Any]]:
    """The shapes of a trainer's state, with their shardings, and the functions to compile.

    These are the training step and, if there are refreshes of bases or restarts of adapters, one
    that begins with them.
    """
    task, refreshes = Pretraining(config), (False, True)
    steps = [
        make_train_step(task, mesh=mesh, refreshes=refresh)
        for refresh in refreshes[: 1 + config.optimizer.has_refreshes]
    ]
    return abstract_state(task, mesh), steps


def step_cost(
    config: Config, mesh: Mesh | None, state: TrainState, steps: Sequence[Any], node: int
) -> Cost:
    """Compiles steps for a mesh and reads their costs; nothing is allocated or run.

    Args:
      config: the configuration of the run.
      mesh: the mesh; None: a single device.
      state: the shapes of the state, with their shardings.
      steps: from `trainer_steps`, or a single one that refreshes inside of a loop or conditional.
      node: number of devices in a node.

    Raises:
      DoesNotFit: the compiler refuses a program that is larger than the memory of a device.
    """
    with on_mesh(mesh):
        batch = batch_shapes(Pretraining(config), mesh)
        programs = [compile_fitting(step.lower(state, batch)) for step in steps]
    # Costs of a step without a refresh, and what a refresh adds.
    texts = [program.as_text() for program in programs]
    layers = config.model.num_layers
    usual = _moved([found for found in collectives(texts[0]) if not found.within], layers, node)
    refreshing = _moved(collectives(texts[-1]), layers, node)
    here = on_one_device(state)
    parts = bytes_by_part(here.opt_state)
    return Cost(
        weights=tree_bytes(here.params),
        bases=parts["bases"],
        moments=parts["moments"],
        state=tree_bytes(here),
        whole_state=tree_bytes(state),
        temporaries=programs[0].memory_analysis().temp_size_in_bytes,
        payload=usual.payload,
        asynchronous=usual.asynchronous,
        inside=usual.inside,
        between=usual.between,
        refresh={kind: refreshing.payload[kind] - usual.payload[kind] for kind in KINDS},
        refresh_between=refreshing.between - usual.between,
        flops=flops(texts[0], lambda within: 0),
    )


@dataclass(frozen=True)
class _Moved:
    payload: dict[str, int]
    asynchronous: int
    inside: int
    between: int


def _moved(found: Sequence[Collective], layers: int, node: int) -> _Moved:
    payload, asynchronous, inside, between = dict.fromkeys(KINDS, 0), 0, 0, 0
    for collective in found:
        times = collective.times * _runs(collective.within, layers)
        near, far = collective.sent(node)
        kind = "reduce-scatter" if collective.scatters else collective.kind
        payload[kind] += times * collective.payload
        asynchronous += times * collective.payload * collective.is_asynchronous
        inside += times * near
        between += times * far
    return _Moved(payload, asynchronous, inside, between)


def _runs(within: tuple[str, ...], layers: int) -> int:
    """How often something inside these loops and conditionals runs if all bases are refreshed.

    One loop is over the matrices of a leaf, one for each layer. The other one, which is around it
    with projected gradients and inside it with full ones, is over rounds of subspace iteration; a
    refresh after the first has one round.
    """
    loops = [name for name in within if name.endswith("while")]
    over_matrices = len(loops) > 1 or any("refresh_where_due" in name for name in loops)
    return layers if over_matrices else 1
