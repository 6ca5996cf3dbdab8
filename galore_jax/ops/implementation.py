"""Chooses between plain JAX and Pallas kernels for 8-bit Adam and for the lift.

XLA does not fuse either of these operations into one pass over memory. `adam_step` and `lift`
implement them in plain JAX ("xla"); modules with the same functions as kernels ("pallas") loop over
tiles and apply the formulas of `adam_step` and `lift` to each.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax import lax

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
# Cards of compute capability 9.0, as their driver names them.
HOPPER = tuple(f"NVIDIA {name}" for name in ("H100", "H200", "H800", "H20", "GH200"))


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
    from galore_jax.ops import pallas_tpu

    kernels = {"tpu": getattr(pallas_tpu, name)}
    if jax.__version_info__ >= (0, 12) and _device_kind().startswith(HOPPER):
        from galore_jax.ops import pallas_hopper

        kernels["cuda"] = getattr(pallas_hopper, name)
    else:
        # JAX has deprecated Pallas' Triton backend; without it other cards run plain JAX.
        with suppress(ImportError):
            from galore_jax.ops import pallas_triton

            kernels["cuda"] = getattr(pallas_triton, name)
    return kernels


def _device_kind() -> str:
    """The kind of device for which is compiled: that of the mesh's, or else of JAX's default."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return (abstract or jax.devices()[0]).device_kind
