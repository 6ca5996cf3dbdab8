"""An estimate of the time of a compiled program on a device that is absent, and of what it moves.

Nothing here is measured. For a TPU the time follows from the cycles that its compiler writes beside
each scheduled instruction, its own guess: instructions run one after the other, asynchronous copies
beside them, and all share the bandwidth of the main memory. For a GPU it is a roofline: each
instruction takes as long as its products at the card's peak for bfloat16, or as its bytes at the
bandwidth of the memory, whichever is longer. Loops count once for each iteration. Ratios between
two forms of a program are worth more than the times themselves.

The estimate is of a step without refresh: conditionals take their cheaper branch, and loops whose
number of iterations depends on the data do not run. These, collectives, and calls of libraries,
whose time no compiler names, are listed in `Estimate.without_time`.
"""

import collections
import re
from dataclasses import dataclass, field

from analysis.collectives import kind_of
from analysis.gpus import Gpu
from analysis.hlo import Computation, Instruction, Program, parse
from analysis.products import flops_within
from analysis.tpus import Tpu

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
_MOVES = {"copy", "transpose"}
_KEEPS = {"parameter", "bitcast", "reshape", "tuple"}
# Calls that move nothing.
_RENAME = ("ConcatBitcast", "AllocateBuffer", "Sharding")


@dataclass(frozen=True)
class Estimate:
    """Of a program, or of one computation of it.

    Attributes:
      seconds: the estimated time.
      flops: multiplications and additions in products.
      bytes: read from and written to the main memory.
      copied: bytes read and written, in any memory, by instructions that do nothing but copy or
        transpose, as from one layout to another.
      without_time: how often something runs whose time is unknown and left out, by name.
    """

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    copied: int = 0
    without_time: collections.Counter = field(default_factory=collections.Counter)

    def times(self, number: int) -> "Estimate":
        """Of as many repetitions."""
        counts = {name: number * count for name, count in self.without_time.items() if number}
        return Estimate(
            number * self.seconds,
            number * self.flops,
            number * self.bytes,
            number * self.copied,
            collections.Counter(counts),
        )


def estimate(text: str, device: Gpu | Tpu) -> Estimate:
    """Of one execution.

    Args:
      text: HLO after compilation, `compiled.as_text()`.
      device: the one that it was compiled for.
    """
    reader = _Reader(parse(text), device)
    return reader.of(reader.program.entry)


class _Reader:
    def __init__(self, program: Program, device: Gpu | Tpu):
        self.program, self.device = program, device
        self._known: dict[str, Estimate] = {}

    def of(self, name: str) -> Estimate:
        """Of a computation."""
        if name not in self._known:
            self._known[name] = self._played(self.program.computations[name])
        return self._known[name]

    def _played(self, computation: Computation) -> Estimate:
        """Runs the schedule: the core is busy until `now`, the main memory until `free`."""
        now = free = 0.0
        ends: dict[str, float] = {}
        parts: list[Estimate] = []
        for instruction in computation.by_name.values():
            opcode = instruction.opcode
            if opcode in _FREE or _renames(instruction):
                continue
            if opcode.endswith("-done"):
                now = max(now, ends.get(instruction.operands[0], 0.0))
                continue
            if opcode in ("while", "conditional", "call"):
                parts.append(part := self._of_called(computation, instruction))
                now += part.seconds
                free = max(free, now)
                continue
            parts.append(part := self._of_one(computation, instruction))
            free = max(free, now) + part.bytes / self.device.bandwidth
            if opcode.endswith("-start"):
                ends[instruction.name] = free
            else:
                now = max(now + part.seconds, free if part.bytes else 0.0)
        unknown = sum((part.without_time for part in parts), collections.Counter())
        total = lambda key: sum(getattr(part, key) for part in parts)
        seconds = max([now, *ends.values()])
        return Estimate(seconds, total("flops"), total("bytes"), total("copied"), unknown)

    def _of_called(self, computation: Computation, instruction: Instruction) -> Estimate:
        if instruction.opcode == "call":
            (name,) = instruction.calls
            return self.of(name)
        if instruction.opcode == "conditional":
            return min((self.of(name) for name in instruction.calls), key=lambda of: of.seconds)
        number = self.program.trips(computation, instruction)
        if number is None:
            name = f"loop of unknown length: {instruction.source}"
            return Estimate(without_time=collections.Counter([name]))
        return self.of(instruction.called("body")).times(number)

    def _of_one(self, computation: Computation, instruction: Instruction) -> Estimate:
        flops = flops_within(self.program, computation, instruction)
        cycles = _CYCLES.search(instruction.text)
        if isinstance(self.device, Gpu):
            seconds = flops / self.device.peak
        else:
            seconds = int(cycles[1]) / self.device.clock if cycles else 0.0
        copied = 0
        if self._only_moves(instruction) and instruction.arrays[0].size > 1:
            operands = [computation.by_name[name] for name in instruction.operands]
            copied = instruction.bytes + sum(operand.bytes for operand in operands)
        moved = self._bytes(computation, instruction)
        return Estimate(
            seconds, flops, moved, copied, self._without_time(computation, instruction, flops)
        )

    def _without_time(
        self, computation: Computation, instruction: Instruction, flops: int
    ) -> collections.Counter:
        inside = [(computation, instruction)]
        if instruction.opcode in ("fusion", "async-start"):
            bodies = (self.program.computations[name] for name in instruction.calls)
            inside = [(body, one) for body in bodies for one in body.by_name.values()]
        elif instruction.opcode == "custom-call" and not flops:
            target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
            return collections.Counter([target[1] if target else "custom-call"])
        return collections.Counter(kind for one in inside if (kind := kind_of(*one)))

    def _only_moves(self, instruction: Instruction) -> bool:
        if instruction.opcode == "copy-start":
            # Copies between the main memory and another one are not made for the layout.
            return all(array.is_in_main_memory for array in instruction.arrays[:2])
        if instruction.opcode == "fusion":
            (body,) = (self.program.computations[name] for name in instruction.calls)
            opcodes = {one.opcode for one in body.by_name.values()}
            return bool(opcodes & _MOVES) and opcodes <= _MOVES | _KEEPS
        return instruction.opcode in _MOVES

    def _bytes(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes read from and written to the main memory."""
        if instruction.opcode.endswith("-start"):
            return _bytes_of_asynchronous(instruction)
        read = 0
        for name in dict.fromkeys(instruction.operands):
            operand = computation.by_name[name]
            if all(array.is_in_main_memory for array in operand.arrays):
                places = [i for i, other in enumerate(instruction.operands) if other == name]
                parts = (self._read(instruction, place, operand.bytes) for place in places)
                read += min(operand.bytes, sum(parts))
        return read + sum(
            size
            for array, size in zip(
                instruction.arrays, self._written(computation, instruction), strict=True
            )
            if array.is_in_main_memory
        )

    def _read(self, user: Instruction, place: int, whole: int) -> int:
        """Bytes that an instruction reads of an operand of `whole` bytes."""
        if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
            return user.bytes
        if user.opcode == "dynamic-update-slice" and place == 0:
            return 0
        if user.opcode == "fusion":
            (body,) = (self.program.computations[name] for name in user.calls)
            return min(whole, self._read_within(body, body.parameters[place], whole))
        return whole

    def _read_within(self, body: Computation, instruction: Instruction, whole: int) -> int:
        """Bytes that the instructions of a fusion read of another one's result."""
        total = 0
        for user in body.users.get(instruction.name, ()):
            # Fusions within fusions write nothing: on a TPU they tile an operand in another way.
            is_view = user.opcode == "bitcast" or "output_to_operand_aliasing" in user.text
            if is_view:
                total += self._read_within(body, user, whole)
            else:
                places = (i for i, name in enumerate(user.operands) if name == instruction.name)
                total += sum(self._read(user, place, whole) for place in places)
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> list[int]:
        """Bytes that an instruction writes to each array of its result."""
        if instruction.opcode == "dynamic-update-slice":
            return [computation.by_name[instruction.operands[1]].bytes]
        if instruction.opcode == "bitcast":
            return self._written(computation, computation.by_name[instruction.operands[0]])
        if instruction.opcode == "fusion":
            (body,) = (self.program.computations[name] for name in instruction.calls)
            names = body.root.operands if body.root.opcode == "tuple" else [body.root.name]
            return [size for name in names for size in self._written(body, body.by_name[name])]
        return [array.bytes for array in instruction.arrays]


def _renames(instruction: Instruction) -> bool:
    """Whether it is a call that moves nothing."""
    return instruction.opcode == "custom-call" and any(
        f'custom_call_target="{name}"' in instruction.text for name in _RENAME
    )


def _bytes_of_asynchronous(instruction: Instruction) -> int:
    """Bytes to and from the main memory of a copy, or of a copy of a slice."""
    if instruction.opcode == "copy-start":
        ends = instruction.arrays[:2]
    else:  # The operands of the operation, then its result.
        operand = instruction.arrays["update" in instruction.opcode]
        ends = [operand, instruction.arrays[len(instruction.operands)]]
    size = min(array.bytes for array in ends)
    return sum(size for array in ends if array.is_in_main_memory)
