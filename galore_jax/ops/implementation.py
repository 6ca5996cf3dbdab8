"""What XLA cannot fuse, in one pass over memory: 8-bit moments, lift and weight update.

`adam` and `lift` are in plain JAX, for every backend. `triton` has the same functions, with the
same arguments, for NVIDIA GPUs: each is a loop over tiles around the formula that `adam` or `lift`
has. Which of them are used is a setting, "xla" or "pallas". The latter is compiled for real cards,
and in Pallas' interpreter gives what the former does up to rounding, but has not been timed on one;
so it is not the default.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

from galore_jax.ops import adam8bit, lift

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def adam_8bit_of(implementation: Implementation) -> Callable[..., Any]:
    """`adam8bit.adam_8bit` or its Triton kernel."""
    return _triton().adam_8bit if _is_pallas(implementation) else adam8bit.adam_8bit


def lift_and_add_of(implementation: Implementation) -> Callable[..., Any]:
    """`lift.lift_and_add` or its Triton kernel."""
    return _triton().lift_and_add if _is_pallas(implementation) else lift.lift_and_add


def _is_pallas(implementation: Implementation) -> bool:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}."
        )
    return implementation == "pallas"


def _triton() -> Any:
    # Pallas is imported by those who use it.
    from galore_jax.ops import pallas_triton

    return pallas_triton
