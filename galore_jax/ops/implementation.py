"""Chooses between plain JAX and Pallas kernels for 8-bit Adam and for the lift.

XLA does not fuse either of these operations into one pass over memory. `adam_step` and `lift`
implement them in plain JAX ("xla"); modules with the same functions as kernels ("pallas") loop over
tiles and apply the formulas of `adam_step` and `lift` to each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from jax import lax

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def check_implementation(implementation: str) -> None:
    """Raises a `ValueError` if there is no such implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}."
        )


def use_implementation(
    implementation: Implementation, operation: Callable, use: Callable[..., Any], *arrays: Any
) -> Any:
    """`use(operation, *arrays)`, or `use(kernel, *arrays)` on platforms with such a kernel.

    Args:
      implementation: whether kernels are used.
      operation: `adam_step.adam_8bit` or `lift.lift_and_add`.
      use: a function of the operation, or of a kernel in its place, and of the arrays.
      *arrays: trees of arrays.
    """
    if implementation == "xla":
        return use(operation, *arrays)
    kernels = {platform: partial(use, f) for platform, f in _kernels(operation.__name__).items()}
    return lax.platform_dependent(*arrays, default=partial(use, operation), **kernels)


def _kernels(name: str) -> dict[str, Callable]:
    """The kernels of this name, by platform."""
    # Imported here so that only users of the kernels import Pallas.
    from galore_jax.ops import pallas_tpu, pallas_triton

    modules: dict[str, Any] = {"tpu": pallas_tpu, "cuda": pallas_triton}
    return {platform: getattr(module, name) for platform, module in modules.items()}
