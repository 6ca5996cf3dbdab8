"""The collectives and matrix products of a compiled program, read from its HLO text.

    program = jax.jit(step).lower(*arguments).compile().as_text()
    for collective in collectives(program):
        print(collective.kind, collective.payload, collective.times)

XLA's own cost analysis counts the body of a loop once; here it counts once for each iteration. How
often the branch of a conditional runs is unknown to the compiler, and so are the iterations of some
loops, such as those over the matrices that are due for a refresh. A `Collective` names those around
it in `within`, and counts them as if they ran once.

A program compiled for CPUs differs from one for GPUs in two ways. On CPUs XLA computes bfloat16 in
float32, so collectives move float32 too; they are counted here in the dtype of the program. And XLA
has no pass for CPUs that turns an all-reduce of which each device uses only its part into a
reduce-scatter, which sends half as much. Such an all-reduce keeps its kind, but `scatters` is true
and `sent` is what a GPU sends.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

KINDS: tuple[str, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# Tolerance for counting an all-reduce as a reduce-scatter: small vectors may be reduced with it.
TOLERANCE = 1.05
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
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
    """

    kind: str
    size: int
    times: int
    within: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    name: str
    scatters: bool = False

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
    computations, devices = _parse(program)
    found = []
    for computation, instruction, times, within in _executed(computations):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(instruction.text, devices)
        if max(map(len, groups)) > 1:
            size = _size(instruction, computation, computations)
            end = _end(instruction, computation)
            used = _used(end, computation, computations)
            is_divided = len(groups[0]) * used < TOLERANCE * _bytes(end.shape)
            scatters = kind == "all-reduce" and is_divided
            source = instruction.source
            found.append(Collective(kind, size, times, within, groups, source, scatters))
    return found


def flops(program: str, runs: Callable[[tuple[str, ...]], int] = lambda within: 1) -> int:
    """The multiplications and additions in the matrix products of one device.

    Products that the compiler passes to a library, as on GPUs, are not found.

    Args:
      program: HLO after compilation, `compiled.as_text()`.
      runs: how often something inside these loops and conditionals runs, given their names as in
        `Collective.within`.
    """
    total = 0
    for computation, instruction, times, within in _executed(_parse(program)[0]):
        if instruction.opcode == "dot":
            (_, left), *_ = computation.by_name[instruction.operands[0]].shape
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
            dims = _integers(contracted[1]) if contracted else []
            result = math.prod(instruction.shape[0][1])
            count = 2 * result * math.prod(left[axis] for axis in dims)
            total += count * times * (runs(within) if within else 1)
    return total


class _Instruction(NamedTuple):
    name: str
    shape: list[tuple[str, list[int]]]  # of each array: its dtype and its axes
    opcode: str
    operands: list[str]
    number: str  # of a parameter
    text: str  # the attributes

    @property
    def source(self) -> str:
        """JAX's name of it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else self.name


@dataclasses.dataclass(frozen=True)
class _Computation:
    by_name: dict[str, _Instruction]
    is_entry: bool

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        """The instructions that use each instruction."""
        found: dict[str, list[_Instruction]] = {}
        for instruction in self.by_name.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[_Instruction]:
        """Its parameters in order."""
        found = [one for one in self.by_name.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.number))


def _parse(program: str) -> tuple[dict[str, _Computation], int]:
    """The computations by name, and the number of devices."""
    computations: dict[str, _Computation] = {}
    current: dict[str, _Instruction] = {}
    for line in program.splitlines():
        if header := _HEADER.match(line):
            current = {}
            computations[header[2]] = _Computation(current, bool(header[1]))
        elif name := _NAME.match(line):
            shape, rest = _split_type(line[name.end() :])
            opcode, _, rest = rest.partition("(")
            operands, text = _until_closed(rest)
            current[name[2]] = _Instruction(
                name[2], shape, opcode, re.findall(r"%([\w.\-]+)", operands), operands, text
            )
    devices = math.prod(
        int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", program)
    )
    return computations, devices


def _split_type(text: str) -> tuple[list[tuple[str, list[int]]], str]:
    """The arrays of the type at the start of the text, and the rest of the text."""
    if text.startswith("("):
        inside, rest = _until_closed(text[1:])
    else:
        inside, _, rest = text.partition(" ")
    arrays = [(dtype, _integers(axes)) for dtype, axes in _ARRAY.findall(inside)]
    return arrays, rest.lstrip()


def _until_closed(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes one opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _bytes(shape: list[tuple[str, list[int]]]) -> int:
    def one(dtype: str) -> float:
        digits = re.search(r"\d+", dtype)
        return _BYTES.get(dtype, int(digits[0]) / 8 if digits else 0)

    return sum(int(one(dtype) * math.prod(axes)) for dtype, axes in shape)


Executed = tuple[_Computation, _Instruction, int, tuple[str, ...]]


def _executed(computations: dict[str, _Computation]) -> Iterator[Executed]:
    """Every instruction with its computation, `times` and `within` as in `Collective`."""

    def visit(name: str, times: int, within: tuple[str, ...]) -> Iterator[Executed]:
        computation = computations[name]
        for instruction in computation.by_name.values():
            yield computation, instruction, times, within
            trips = _TRIPS.search(instruction.text) if instruction.opcode == "while" else None
            is_unknown = instruction.opcode in ("while", "conditional") and not trips
            inner_times = times * int(trips[1]) if trips else times
            inner = (*within, instruction.source) if is_unknown else within
            for called in _called(instruction):
                yield from visit(called, inner_times, inner)

    (entry,) = (name for name, computation in computations.items() if computation.is_entry)
    return visit(entry, 1, ())


def _called(instruction: _Instruction) -> list[str]:
    """The computations that it runs, without those that combine two numbers of a reduction."""
    found = _CALLED.findall(instruction.text.partition("metadata=")[0])
    return [
        name.strip(" %")
        for attribute, names in found
        if attribute != "to_apply" or instruction.opcode == "call"
        for name in names.strip("{}").split(",")
    ]


def _size(
    instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> int:
    """Bytes of the operands of a collective, in the dtype before XLA widened them for it."""
    operands = [computation.by_name[name] for name in instruction.operands]
    size = sum(_bytes(operand.shape) for operand in operands)
    if instruction.opcode in ("all-reduce", "reduce-scatter"):
        # XLA marks a sum that it computes in a dtype twice as wide.
        return size // 2 if re.search(r"to_apply=%?[\w.\-]*_promoted", instruction.text) else size
    users = _users(instruction, computation, computations)
    if users and all(user.opcode == "convert" for user, _ in users):
        widths = {_bytes(user.shape) / math.prod(user.shape[0][1]) for user, _ in users}
        elements = sum(math.prod(axes) for operand in operands for _, axes in operand.shape)
        return min(size, int(max(widths) * elements))
    return size


def _end(instruction: _Instruction, computation: _Computation) -> _Instruction:
    """The instruction that has the results: for an asynchronous collective, its end."""
    users = computation.users.get(instruction.name, ())
    ends = (user for user in users if user.opcode == instruction.opcode.replace("-start", "-done"))
    return next(ends, instruction) if instruction.opcode.endswith("-start") else instruction


def _used(
    instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> int:
    """Bytes of the results of a collective that are used: perhaps only a dynamic slice of each."""
    if len(instruction.shape) == 1:
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
                total += _bytes(user.shape)
            case _:
                total += _bytes(result.shape)
    return total


def _users(
    instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> list[tuple[_Instruction, int]]:
    """The users of an array, with the operand's number; also in fusions and after reshapes."""
    found = []
    for user in computation.users.get(instruction.name, ()):
        for place in (i for i, name in enumerate(user.operands) if name == instruction.name):
            if user.opcode == "fusion":
                (body,) = (computations[name] for name in _called(user))
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
        return _as_tuples(_iota(iota[2], iota[3]).reshape(_integers(iota[1])))
    explicit = re.search(r"replica_groups=\{(.*?\})\}", text)
    return _explicit(explicit[1]) if explicit else (tuple(range(devices)),)


def _explicit(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_integers(group)) for group in re.findall(r"\{([\d,]*)\}", text))


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
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(transposed)) if transposed else ids


def _as_tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())
