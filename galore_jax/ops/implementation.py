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

Kernels = Literal["xla", "pallas"]
KERNELS: tuple[str, ...] = get_args(Kernels)


def adam_8bit_of(kernels: Kernels) -> Callable[..., Any]:
    """`adam8bit.adam_8bit` or its Triton kernel."""
    return _triton().adam_8bit if _is_pallas(kernels) else adam8bit.adam_8bit


def lift_and_add_of(kernels: Kernels) -> Callable[..., Any]:
    """`lift.lift_and_add` or its Triton kernel."""
    return _triton().lift_and_add if _is_pallas(kernels) else lift.lift_and_add


def _is_pallas(kernels: Kernels) -> bool:
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}.")
    return kernels == "pallas"


def _triton() -> Any:
    # Pallas is imported by those who use it.
    from galore_jax.ops import pallas_triton

    return pallas_triton
