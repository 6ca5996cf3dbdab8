"""Types shared by the whole package."""

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

# Any tree of arrays that JAX knows: parameters, gradients, states.
PyTree = Any

# The keys on the way from the root of a tree to a node, as `jax.tree_util` gives them.
KeyPath = tuple[Hashable, ...]

# Which leaves of the parameters: booleans in a tree like them, or a function that makes these.
Mask = PyTree | Callable[[PyTree], PyTree] | None

# Reads a part of a parameter: of "layers/mlp/up_proj/kernel", say, by a slice of each axis.
ReadPart = Callable[[str, tuple[slice, ...]], np.ndarray]
