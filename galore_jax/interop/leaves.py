"""Leaves of the parameters here, and the tensors that transformers has in their place.

Both differ in names, in layers, which are stacked here, and in kernels, which PyTorch stores as
(out, in). A leaf is named by its path, as in "layers/attention/q_proj/kernel".
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.errors import InputError
from galore_jax.interop.tensors import CONFIG, Index, Stored, check_dtypes, read_tensor


class Leaf(NamedTuple):
    """A leaf as tensors of transformers.

    Attributes:
      shape: of the leaf.
      name: of the tensor; for a stack with `{}` for the number of the layer.
      is_kernel: whether it is transposed there.
    """

    shape: tuple[int, ...]
    name: str
    is_kernel: bool

    @property
    def is_stack(self) -> bool:
        """Whether there is a tensor for each layer."""
        return "{}" in self.name

    @property
    def names(self) -> list[str]:
        """The names of the tensors, by layer."""
        return [self.name.format(n) for n in range(self.shape[0])] if self.is_stack else [self.name]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = self.shape[1:] if self.is_stack else self.shape
        return shape[::-1] if self.is_kernel else shape

    def read(self, tensors: Mapping[str, Stored], index: Index, dtype: Any) -> np.ndarray:
        """A part of the leaf, with a slice for each of its axes.

        Raises:
          InputError: it has numbers that are not finite.
        """
        inner = index[1:] if self.is_stack else index
        names = self.names[index[0]] if self.is_stack else self.names
        parts = []
        for stored in (tensors[name] for name in names):
            part = read_tensor(stored, inner[::-1] if self.is_kernel else inner)
            check_finite(part, stored.name, stored.file.parent)
            parts.append((part.T if self.is_kernel else part).astype(dtype))
        return np.stack(parts) if self.is_stack else parts[0]


def model_leaves(model: Any, tensor_name: Callable[[str], str]) -> dict[str, Leaf]:
    """The leaves of a model's parameters by path; `tensor_name` returns the `Leaf.name` of one."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves[name] = Leaf(leaf.shape, tensor_name(name), name.endswith("/kernel"))
    return leaves


def check_fit(folder: Path, leaves: Iterable[Leaf], tensors: Mapping[str, Stored]) -> None:
    """Raises an `InputError` that lists tensors that are missing, unknown or of another kind."""
    shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unknown": sorted(tensors[name].name for name in tensors.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {tensors[name].shape} in place of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(
            f"the tensors in {folder} do not fit its {CONFIG} or the settings of the model: "
            f"{'; '.join(found)}."
        )
    check_dtypes(tensors[name] for name in shapes)


def check_finite(part: np.ndarray, name: str, place: str | Path) -> None:
    """Raises an `InputError` if a part of a tensor has infinities or NaN."""
    unsigned = f"u{part.dtype.itemsize}"
    # Infinities and NaN have all bits of the exponent. NumPy takes five times as long in bfloat16.
    exponent = np.array(np.inf, part.dtype).view(unsigned)
    if (part.view(unsigned) & exponent == exponent).any():
        raise InputError(f"{name} in {place} has numbers that are not finite: take another one.")


def _listed(names: Iterable[str]) -> str:
    """Names of tensors, with those that all layers share once: "encoder.layer.*.query.weight"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return ", ".join(
        found[0] if len(found) == 1 else f"{pattern} ({len(found)} times)"
        for pattern, found in groups.items()
    )
