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


def check_implementation(implementation: str) -> None:
    """Raises a ValueError unless there is such an implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}."
        )


def adam_8bit_of(implementation: Implementation) -> Callable[..., Any]:
    """`adam_step.adam_8bit` or its Triton kernel."""
    return _triton().adam_8bit if _is_pallas(implementation) else adam_step.adam_8bit


def lift_and_add_of(implementation: Implementation) -> Callable[..., Any]:
    """`lift.lift_and_add` or its Triton kernel."""
    return _triton().lift_and_add if _is_pallas(implementation) else lift.lift_and_add


def _is_pallas(implementation: Implementation) -> bool:
    check_implementation(implementation)
    return implementation == "pallas"


def _triton() -> Any:
    # Imported here so that only users of the kernels import Pallas.
    from galore_jax.ops import pallas_triton

    return pallas_triton
