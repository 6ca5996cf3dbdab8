"""The text of a compiled program: its computations, and how often each instruction runs.

    program = parse(jax.jit(step).lower(*arguments).compile().as_text())
    for computation, instruction, times, within in program.executed():
        print(instruction.opcode, times)

XLA's own cost analysis counts the body of a loop once; here it counts once for each iteration.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# How far a loop is followed to find out how often it runs.
LONGEST_LOOP = 2**17
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}
_IDENTIFIER = r"[\w.\-<>]+"
_HEADER = re.compile(rf"^(ENTRY )?%?({_IDENTIFIER}) \(.*\) -> .* \{{$")
_NAME = re.compile(rf"^\s+(ROOT )?%?({_IDENTIFIER}) = ")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    rf"|called_computations)=(\{{[^}}]*\}}|%?{_IDENTIFIER})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """The type of an array: dtype, axes, and layout as in `1,0:T(8,128)S(1)`."""

    dtype: str
    axes: list[int]
    layout: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.axes)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        digits = re.search(r"\d+", self.dtype)
        width = _BYTES.get(self.dtype, int(digits[0]) / 8 if digits else 0)
        return int(width * self.size)

    @property
    def is_in_main_memory(self) -> bool:
        """Whether it is not in a memory of its own, as a TPU's VMEM."""
        return "S(" not in self.layout


class Instruction(NamedTuple):
    """An instruction: its result has one array, or several if it is a tuple."""

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    inside: str  # the parentheses: operands, the number of a parameter, or a constant
    text: str  # the attributes
    is_root: bool

    @property
    def source(self) -> str:
        """JAX's name of it."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else self.name

    @property
    def bytes(self) -> int:
        """Bytes of its result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def calls(self) -> list[str]:
        """The computations that it runs, without those that combine two numbers of a reduction."""
        return [
            name.strip(" %")
            for attribute, names in _CALLED.findall(self.text.partition("metadata=")[0])
            if attribute != "to_apply" or self.opcode == "call"
            for name in names.strip("{}").split(",")
        ]

    def called(self, attribute: str) -> str:
        """The computation with this attribute, as in body."""
        return next(
            found[2].strip("%") for found in _CALLED.finditer(self.text) if found[1] == attribute
        )


@dataclass(frozen=True)
class Computation:
    """A computation's instructions, in the order in which a scheduled program runs them."""

    name: str
    by_name: dict[str, Instruction]
    is_entry: bool

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that use each instruction."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.by_name.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters in order."""
        found = [one for one in self.by_name.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.inside))

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction with its result."""
        return next(one for one in self.by_name.values() if one.is_root)


class Executed(NamedTuple):
    """An instruction with its computation, and how often it runs.

    Attributes:
      times: how often it runs, if everything in `within` runs once.
      within: the conditionals around it and the loops with an unknown number of iterations, from
        the outermost, by JAX's names.
    """

    computation: Computation
    instruction: Instruction
    times: int
    within: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The computations of a program by name, and its number of devices."""

    computations: dict[str, Computation]
    devices: int

    @property
    def entry(self) -> str:
        """The name of the computation with which it starts."""
        return next(name for name, one in self.computations.items() if one.is_entry)

    def executed(self) -> Iterator[Executed]:
        """Every instruction, those of loops, branches and fusions included."""

        def visit(name: str, times: int, within: tuple[str, ...]) -> Iterator[Executed]:
            computation = self.computations[name]
            for instruction in computation.by_name.values():
                yield Executed(computation, instruction, times, within)
                is_loop = instruction.opcode == "while"
                trips = self.trips(computation, instruction) if is_loop else None
                is_unknown = instruction.opcode == "conditional" or (is_loop and trips is None)
                inner_times = times if trips is None else times * trips
                inner = (*within, instruction.source) if is_unknown else within
                for called in instruction.calls:
                    yield from visit(called, inner_times, inner)

        return visit(self.entry, 1, ())

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """The number of iterations of a loop, None if it depends on the data.

        Where the compiler does not name it, the loop is run with what is known of its integers.
        """
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        start = computation.by_name[loop.operands[0]]
        if start.opcode != "tuple" or body.root.opcode != "tuple":
            return None
        state = [self._integer(computation, name, ()) for name in start.operands]
        for iteration in range(LONGEST_LOOP):
            holds = self._integer(condition, condition.root.name, state)
            if not holds:
                return None if holds is None else iteration
            state = [self._integer(body, name, state) for name in body.root.operands]
        return None

    def _integer(
        self, computation: Computation, name: str, values: Sequence[int | None]
    ) -> int | None:
        """An integer, given those of a fusion's parameters, or of the tuple that a loop carries."""
        instruction = computation.by_name[name]
        if len(instruction.arrays) != 1 or instruction.arrays[0].size != 1:
            return None

        def operand(place: int) -> int | None:
            return self._integer(computation, instruction.operands[place], values)

        match instruction.opcode:
            case "constant":
                text = {"true": "1", "false": "0"}.get(instruction.inside, instruction.inside)
                return int(text) if re.fullmatch(r"-?\d+", text) else None
            case "parameter":
                number = int(instruction.inside)
                return values[number] if number < len(values) else None
            case "get-tuple-element":
                of = computation.by_name[instruction.operands[0]]
                found = re.search(r"index=(\d+)", instruction.text)
                if found is None or of.opcode != "parameter" or int(found[1]) >= len(values):
                    return None
                return values[int(found[1])]
            case "copy" | "bitcast" | "convert" | "reshape" | "broadcast":
                return operand(0)
            case "fusion":
                (called,) = instruction.calls
                body = self.computations[called]
                inner = [operand(place) for place in range(len(instruction.operands))]
                return self._integer(body, body.root.name, inner)
            case "select":
                which = operand(0)
                return None if which is None else operand(1 if which else 2)
            case "compare":
                direction = re.search(r"direction=(\w+)", instruction.text)
                combine = getattr(operator, direction[1].lower()) if direction else None
            case opcode:
                combine = _ARITHMETIC.get(opcode)
        if combine is None:
            return None
        known = [operand(place) for place in range(len(instruction.operands))]
        return None if None in known else int(combine(*known))


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}


def parse(text: str) -> Program:
    """Reads HLO after compilation, `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = {}
            computations[header[2]] = Computation(header[2], current, bool(header[1]))
        elif name := _NAME.match(line):
            arrays, rest = _split_type(line[name.end() :])
            opcode, _, rest = rest.partition("(")
            inside, attributes = _until_closed(rest)
            operands = re.findall(rf"%({_IDENTIFIER})", inside)
            current[name[2]] = Instruction(
                name[2], arrays, opcode, operands, inside, attributes, bool(name[1])
            )
    devices = math.prod(
        int(number) for number in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text)
    )
    return Program(computations, devices)


def _split_type(text: str) -> tuple[list[Array], str]:
    """The arrays of the type at the start of the text, and the rest of the text."""
    if text.startswith("("):
        inside, rest = _until_closed(text[1:])
    else:
        inside, _, rest = text.partition(" ")
    arrays = [
        Array(dtype, integers(axes), layout) for dtype, axes, layout in _ARRAY.findall(inside)
    ]
    return arrays, rest.lstrip()


def _until_closed(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes one opened before the text."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.start()], text[found.end() :]
    return text, ""


def integers(text: str) -> list[int]:
    """The numbers between commas."""
    return [int(number) for number in text.split(",") if number]
