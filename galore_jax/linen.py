"""Flax Linen models as they are: their layers read projected kernels, and multiply by them.

`ProjectedKernel` counts as one of Flax's boxes around a parameter, which layers open by
themselves; it rides through `nn.scan`, `nn.vmap` and `nn.remat` with the parameters, whose layers
lie along leading axes. The `dot_general` of a Dense or DenseGeneral, and with them of attention, is
`projected_dot` for the time of a call. Other layers get full gradients.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.linen as nn
from flax.core.meta import AxisMetadata
from jax import lax

from galore_jax.backward import ProjectedKernel, projected_dot

AxisMetadata.register(ProjectedKernel)


def projected_layers() -> AbstractContextManager[None]:
    """While it is entered, layers multiply by projected kernels in the way of `projected_dot`."""
    return nn.intercept_methods(_multiply_by_projected)


def _multiply_by_projected(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    layer: Any = context.module
    # A layer that inherits its call: of another one nobody knows what it multiplies by what.
    is_dense = type(layer).__call__ in (nn.Dense.__call__, nn.DenseGeneral.__call__)
    if context.method_name != "__call__" or not is_dense or layer.dot_general_cls is not None:
        return call(*args, **kwargs)
    projected = layer.get_variable("params", "kernel")
    if not isinstance(projected, ProjectedKernel):
        return call(*args, **kwargs)
    own = layer.dot_general

    def dot_general(x: Any, kernel: Any, dimension_numbers: Any, **settings: Any) -> Any:
        dot = partial(own or lax.dot_general, **settings)
        return projected_dot(projected, x, kernel, dimension_numbers, dot)

    # A layer is frozen while it is called, for the sake of its users; it is put back as it was.
    object.__setattr__(layer, "dot_general", dot_general)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "dot_general", own)
