"""The collectives of a compiled program, read from its HLO text.

    program = jax.jit(step).lower(*arguments).compile().as_text()
    for collective in collectives(program):
        print(collective.kind, collective.payload, collective.times)

How often the branch of a conditional runs is unknown to the compiler, and so are the iterations of
some loops, such as those over the matrices that are due for a refresh. A `Collective` names those
around it in `within`, and counts them as if they ran once.

A program compiled for CPUs differs from one for GPUs in two ways. On CPUs XLA computes bfloat16 in
float32, so collectives move float32 too; they are counted here in the dtype of the program. And XLA
has no pass for CPUs that turns an all-reduce of which each device uses only its part into a
reduce-scatter, which sends half as much. Such an all-reduce keeps its kind, but `scatters` is true
and `sent` is what a GPU sends.
"""

import dataclasses
import math
import re

import numpy as np

from analysis.hlo import Computation, Instruction, integers, parse

KINDS: tuple[str, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# Tolerance for counting an all-reduce as a reduce-scatter: small vectors may be reduced with it.
TOLERANCE = 1.05
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'?([^',=:]+)'?(?:=(\d+)|:\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of each device's operands.
      times: how often it runs, if everything in `within` runs once.
      within: the conditionals around it and the loops with an unknown number of iterations, from
        the outermost, by JAX's names.
      groups: the devices that exchange data with each other, by their position in the mesh.
      name: JAX's name of the operation.
      scatters: whether it is an all-reduce of which each device uses only its own part.
      is_asynchronous: whether other work runs between its start and its end.
    """

    kind: str
    size: int
    times: int
    within: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    name: str
    scatters: bool = False
    is_asynchronous: bool = False

    @property
    def payload(self) -> int:
        """Bytes of the whole array that one run moves; for an all-gather, of the gathered array."""
        return self.size * len(self.groups[0]) if self.kind == "all-gather" else self.size

    def sent(self, node: int) -> tuple[int, int]:
        """Bytes that a device sends in one run: inside its node, and to other nodes.

        They are those of the algorithms that send the fewest bytes: first among the devices of a
        node, then from each device its share of the array to those at the same position in other
        nodes. An all-reduce is a reduce-scatter and an all-gather, so it sends twice as much as
        either.

        Args:
          node: number of devices in a node; those of the first node come first in the mesh.
        """
        nodes = [{device // node for device in group} for group in self.groups]
        if self.kind == "collective-permute":
            crosses = any(len(ends) > 1 for ends in nodes)
            return (0, self.size) if crosses else (self.size, 0)
        members, crossed = len(self.groups[0]), len(nodes[0])
        neighbours = members // crossed
        if self.kind == "all-to-all":
            inside, between = neighbours - 1, members - neighbours
        else:
            inside, between = members - crossed, crossed - 1
        is_reduced = self.kind == "all-reduce" and not self.scatters
        total = self.payload * (2 if is_reduced else 1)
        return total * inside // members, total * between // members


def collectives(program: str) -> list[Collective]:
    """The collectives of a program, in the order of its text, including those inside loops.

    Those whose groups have a single device are left out.

    Args:
      program: HLO after compilation, `compiled.as_text()`.
    """
    parsed = parse(program)
    computations = parsed.computations
    wrapped = {
        name
        for computation in computations.values()
        for instruction in computation.by_name.values()
        if instruction.opcode == "async-start"
        for name in instruction.calls
    }
    found = []
    for computation, instruction, times, within in parsed.executed():
        kind = kind_of(computation, instruction)
        if kind is None:
            continue
        groups = _groups(instruction.text, parsed.devices)
        if max(map(len, groups)) > 1:
            size = _size(instruction, computation, computations)
            end = _end(instruction, computation)
            used = _used(end, computation, computations)
            is_divided = len(groups[0]) * used < TOLERANCE * end.bytes
            found.append(
                Collective(
                    kind,
                    size,
                    times,
                    within,
                    groups,
                    instruction.source,
                    kind == "all-reduce" and is_divided,
                    _is_asynchronous(computation, instruction, wrapped),
                )
            )
    return found


def kind_of(computation: Computation, instruction: Instruction) -> str | None:
    """The kind of a collective; None for other instructions, and for parts of a collective.

    A TPU runs a collective step by step beside other work: in a chain of fusions that all contain
    it, of which the first one starts it.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or ("chain_id=" in instruction.text and not _starts_a_chain(computation)):
        return None
    return kind


def _starts_a_chain(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in one.text for one in computation.by_name.values())


def _is_asynchronous(computation: Computation, instruction: Instruction, wrapped: set[str]) -> bool:
    """Whether other instructions run while the data are on their way."""
    if '"is_sync":true' in instruction.text:
        return False
    is_started = instruction.opcode.endswith("-start") or computation.name in wrapped
    return is_started or _starts_a_chain(computation)


def _size(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes of the operands of a collective, in the dtype before XLA widened them for it."""
    operands = [computation.by_name[name] for name in instruction.operands]
    size = sum(operand.bytes for operand in operands)
    if instruction.opcode in ("all-reduce", "reduce-scatter"):
        # XLA marks a sum that it computes in a dtype twice as wide.
        return size // 2 if re.search(r"to_apply=%?[\w.\-]*_promoted", instruction.text) else size
    users = _users(instruction, computation, computations)
    if users and all(user.opcode == "convert" for user, _ in users):
        widths = {user.bytes / user.arrays[0].size for user, _ in users}
        elements = sum(array.size for operand in operands for array in operand.arrays)
        return min(size, int(max(widths) * elements))
    return size


def _end(instruction: Instruction, computation: Computation) -> Instruction:
    """The instruction that has the results: for an asynchronous collective, its end."""
    users = computation.users.get(instruction.name, ())
    ends = (user for user in users if user.opcode == instruction.opcode.replace("-start", "-done"))
    return next(ends, instruction) if instruction.opcode.endswith("-start") else instruction


def _used(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes of the results of a collective that are used: perhaps only a dynamic slice of each."""
    if len(instruction.arrays) == 1:
        results = [instruction]
    else:
        results = [
            user
            for user, _ in _users(instruction, computation, computations)
            if user.opcode == "get-tuple-element"
        ]
    total = 0
    for result in results:
        match _users(result, computation, computations):
            case [(user, 0)] if user.opcode == "dynamic-slice":
                total += user.bytes
            case _:
                total += result.bytes
    return total


def _users(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> list[tuple[Instruction, int]]:
    """The users of an array, with the operand's number; also in fusions and after reshapes."""
    found = []
    for user in computation.users.get(instruction.name, ()):
        for place in (i for i, name in enumerate(user.operands) if name == instruction.name):
            if user.opcode == "fusion":
                (body,) = (computations[name] for name in user.calls)
                found += _users(body.parameters[place], body, computations)
            elif user.opcode in ("bitcast", "copy", "reshape", "transpose"):
                found += _users(user, computation, computations)
            else:
                found.append((user, place))
    return found


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices, in each of the formats in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", text):
        return _explicit(pairs[1])
    if mesh := _MESH.search(text):
        return _mesh_groups(*mesh.groups())
    if iota := _IOTA.search(text):
        return _as_tuples(_iota(iota[2], iota[3]).reshape(integers(iota[1])))
    explicit = re.search(r"replica_groups=\{(.*?\})\}", text)
    return _explicit(explicit[1]) if explicit else (tuple(range(devices)),)


def _explicit(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(integers(group)) for group in re.findall(r"\{([\d,]*)\}", text))


def _mesh_groups(
    axes: str, dims: str | None, transposed: str | None, grouped: str
) -> tuple[tuple[int, ...], ...]:
    """Groups along axes of a mesh, some of which may be parts of an axis: `axis:(outer)size`."""
    sizes = {name: int(size) for name, size, *_ in _AXIS.findall(axes)}
    parts: dict[str, list[int]] = {name: [size] for name, size in sizes.items()}
    chosen: list[tuple[str, int]] = []
    for name, _, outer, size in _AXIS.findall(grouped):
        if outer:
            parts[name] = [int(outer), int(size), sizes[name] // int(outer) // int(size)]
        chosen.append((name, 1 if outer else 0))
    ids = _iota(dims, transposed) if dims else np.arange(math.prod(sizes.values()))
    names = [(name, part) for name in parts for part in range(len(parts[name]))]
    ids = ids.reshape([size for split in parts.values() for size in split])
    inside = [names.index(axis) for axis in chosen]
    outside = [place for place in range(len(names)) if place not in inside]
    group_size = math.prod(ids.shape[place] for place in inside)
    return _as_tuples(ids.transpose(outside + inside).reshape(-1, group_size))


def _iota(dims: str, transposed: str | None) -> np.ndarray:
    ids = np.arange(math.prod(integers(dims))).reshape(integers(dims))
    return ids.transpose(integers(transposed)) if transposed else ids


def _as_tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())
