"""Bytes of a training: those of its state from shapes, and those of its programs as compiled."""

import collections
import re
from typing import Any

import jax
from jax.sharding import Mesh

from galore_jax.errors import InputError
from galore_jax.subspace.matrix_view import path_names
from galore_jax.training.config import Config
from galore_jax.training.mesh import on_mesh
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import (
    abstract_state,
    batch_shapes,
    program_bytes,
    starting_programs,
    tree_bytes,
)
from galore_jax.training.step import make_train_step
from galore_jax.types import PyTree

Parts = dict[str, int]

# Names in the state of galore and of what follows it, also of optax.contrib.galore.
PARTS_OF_STATE = {"vectors": "bases", "projector": "bases"} | dict.fromkeys(
    ("mu", "nu", "rows", "columns", "ema"), "moments"
)


def bytes_by_part(opt_state: PyTree) -> Parts:
    """Bytes of `bases`, `moments` and `rest`, recognised by the names in an optimizer's state."""
    parts = collections.Counter(bases=0, moments=0, rest=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        named = [PARTS_OF_STATE[name] for name in path_names(path) if name in PARTS_OF_STATE]
        parts[named[0] if named else "rest"] += tree_bytes(leaf)
    return dict(parts)


def on_one_device(tree: PyTree) -> PyTree:
    """The shapes of the part of each array that one device holds; shardings may be missing."""

    def part(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, tree)


def state_parts(config: Config, mesh: Mesh | None = None) -> Parts:
    """Bytes of `weights`, `bases` and `moments` on each device; counters are left out."""
    state = on_one_device(abstract_state(Pretraining(config), mesh))
    parts = bytes_by_part(state.opt_state)
    return {
        "weights": tree_bytes(state.params),
        "bases": parts["bases"],
        "moments": parts["moments"],
    }


def compiled(config: Config, mesh: Mesh | None = None) -> dict[str, Parts]:
    """Bytes of the compiled programs on each device, as assigned by XLA; nothing is run.

    Call it outside the mesh, where a run also makes its state and steps.

    Args:
      config: the configuration of the run.
      mesh: the devices to compile for, which may be absent: see `compile_targets.target`. None: the
        default device.

    Returns:
      Parts of `train_step`, of `refresh_step` with projected gradients or ReLoRA, which first
      refreshes the bases or restarts the adapters, and of `start`, the two programs that make the
      first state: `arguments`, `outputs`, `aliased` (outputs that share the memory of arguments),
      `temporaries`, and the `total` that the program needs. A compiler for TPUs refuses a program
      that does not fit, and names the total alone.
    """
    task = Pretraining(config)
    state, batch = abstract_state(task, mesh), batch_shapes(task, mesh)
    steps = {"train_step": make_train_step(task, mesh=mesh)}
    if config.optimizer.has_refreshes:
        steps["refresh_step"] = make_train_step(task, refreshes=True, mesh=mesh)
    with on_mesh(mesh):
        parts = {name: _assigned(step.lower(state, batch)) for name, step in steps.items()}
    return parts | {"start": _start_of(*(one.lower(0) for one in starting_programs(task, state)))}


def _start_of(first: Any, second: Any) -> Parts:
    """The parts of both programs of the start together; what the first one made stays."""
    first, second = _assigned(first), _assigned(second)
    total = max(first["total"], first.get("outputs", 0) + second["total"])
    if "outputs" not in first or "outputs" not in second:
        return {"total": total}
    made = first["outputs"] + second["outputs"]
    parts = {"arguments": first["arguments"], "outputs": made, "aliased": 0}
    return parts | {"temporaries": total - made - first["arguments"], "total": total}


def _assigned(lowered: Any) -> Parts:
    try:
        program = compile_fitting(lowered)
    except DoesNotFit as error:
        return {"total": error.needed}
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": program_bytes(program),
    }


class DoesNotFit(InputError):
    """A compiler refused a program that is larger than the memory of the device.

    Attributes:
      needed: the bytes that it counted.
    """

    def __init__(self, needed: int):
        super().__init__(f"it does not fit the device: it needs {needed / 2**30:.1f} GiB.")
        self.needed = needed


def compile_fitting(lowered: Any) -> Any:
    """Compiles, for which a compiler for TPUs needs the memory that the program needs.

    Raises:
      DoesNotFit: the device has less.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        found = message.startswith("RESOURCE_EXHAUSTED") and (
            re.search(r"Used ([\d.]+)([KMGT]?) of", message)
            or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
        )
        if not found:
            raise
        raise DoesNotFit(int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))) from error
