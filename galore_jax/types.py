"""Types shared by the whole package."""

from typing import Any

# Any tree of arrays that JAX knows: parameters, gradients, states.
PyTree = Any
