"""Chooses between plain JAX and GPU kernels for 8-bit Adam and for the lift with its weight update.

XLA does not fuse these operations into one pass over memory. `adam_step` and `lift` implement them
in plain JAX, for every backend ("xla"); `pallas_triton` has the same functions as kernels for
NVIDIA GPUs ("pallas"), which loop over tiles and apply the formulas of `adam_step` and `lift` to
each.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

from galore_jax.ops import adam_step, lift

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def implemented(name: Literal["adam_8bit", "lift_and_add"], implementation: str) -> Callable:
    """`adam_step.adam_8bit`, `lift.lift_and_add`, or the Triton kernel of that name.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}."
        )
    module: Any = adam_step if name == "adam_8bit" else lift
    if implementation == "pallas":
        # Imported here so that only users of the kernels import Pallas.
        from galore_jax.ops import pallas_triton as module
    return getattr(module, name)
