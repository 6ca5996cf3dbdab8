"""The multiplications and additions in the matrix products of a compiled program."""

import json
import math
import re
from collections.abc import Callable

import numpy as np

from analysis.hlo import Computation, Instruction, Program, integers, parse


def flops(program: str, runs: Callable[[tuple[str, ...]], int] = lambda within: 1) -> int:
    """The multiplications and additions in the matrix products of one device.

    Args:
      program: HLO after compilation, `compiled.as_text()`.
      runs: how often something inside these loops and conditionals runs, given their names as in
        `hlo.Executed.within`.
    """
    return sum(
        times * (runs(within) if within else 1) * flops_of(computation, instruction)
        for computation, instruction, times, within in parse(program).executed()
    )


def flops_within(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Those of an instruction, and in a fusion of all that it runs."""
    if instruction.opcode != "fusion":
        return flops_of(computation, instruction)
    (body,) = (program.computations[name] for name in instruction.calls)
    return sum(flops_within(program, body, one) for one in body.by_name.values())


def flops_of(computation: Computation, instruction: Instruction) -> int:
    """Those of a single instruction: a `dot`, a `convolution`, or a product of cuBLAS."""
    match instruction.opcode:
        case "dot":
            found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
            return _product(computation, instruction, integers(found[1]) if found else [])
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call" if '_target="__cublas$' in instruction.text:
            found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.text)
            axes = [int(axis) for axis in json.loads(found[1])] if found else []
            return _product(computation, instruction, axes)
    return 0


def _product(computation: Computation, instruction: Instruction, contracted: list[int]) -> int:
    left = computation.by_name[instruction.operands[0]].arrays[0].axes
    return 2 * instruction.arrays[0].size * math.prod(left[axis] for axis in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> int:
    """Counts what is multiplied, without the zeros of padding and of dilation.

    A product with batch axes is compiled for TPUs as a convolution with a window over them, of
    which most is zeros.
    """
    left, right = (computation.by_name[name].arrays[0].axes for name in instruction.operands[:2])
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert found is not None
    of_left, of_right, of_result = found.groups()
    result = instruction.arrays[0].axes
    total = 2 * right[of_right.index("i")]
    total *= result[of_result.index("b")] * result[of_result.index("f")]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    for axis in sorted(label for label in of_result if label.isdigit()):
        sizes = left[of_left.index(axis)], result[of_result.index(axis)]
        total *= _pairs(*sizes, window[1] if window else "", int(axis))
    return total


def _pairs(left: int, result: int, window: str, axis: int) -> int:
    """Along one axis, the pairs of a position in the result and one in the window that meet."""

    def value(key: str, default: str) -> str:
        found = re.search(rf"\b{key}=(\S+)", window)
        return found[1].split("x")[axis] if found else default

    size, stride = int(value("size", "1")), int(value("stride", "1"))
    dilated, spread = int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))
    before = int(value("pad", "0_0").split("_")[0])
    places = np.arange(result)[:, None] * stride + np.arange(size) * spread - before
    inside = (places >= 0) & (places <= (left - 1) * dilated) & (places % dilated == 0)
    return int(inside.sum())
