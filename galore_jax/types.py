"""Types shared by the whole package."""

from collections.abc import Callable
from typing import Any

import numpy as np

# Any tree of arrays that JAX knows: parameters, gradients, states.
PyTree = Any

# Reads a part of a parameter: of "layers/mlp/up_proj/kernel", say, by a slice of each axis.
ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]
