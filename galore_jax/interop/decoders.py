"""LLaMA-type models in the format of Hugging Face's transformers, read and written part by part.

Both pair component i of a head with i + head/2 in the rotary embedding. They differ in names, in
layers, which are stacked here, and in kernels, which PyTorch stores as (out, in).

A leaf of the parameters is named by its path, as in "layers/attention/q_proj/kernel".
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.errors import InputError
from galore_jax.files import write_json
from galore_jax.interop.config_json import to_json
from galore_jax.interop.tensors import (
    CONFIG,
    Index,
    Stored,
    check_dtypes,
    listed_names,
    make_folder,
    read_tensor,
    stored_tensors,
    write_tensors,
)
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.types import ReadPart

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}
# Old files hold the rotary frequencies too, which config.json determines.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_PREFIX = "model."  # of the names of all tensors but the head


class _Leaf(NamedTuple):
    """A leaf of the parameters as tensors of transformers.

    Attributes:
      shape: of the leaf.
      name: of the tensor; for a stack with `{}` for the number of the layer.
    """

    shape: tuple[int, ...]
    name: str

    @property
    def is_stack(self) -> bool:
        return "{}" in self.name

    @property
    def is_transposed(self) -> bool:
        # All matrices but the embedding, which a lookup reads.
        return len(self.shape) - self.is_stack == 2 and self.name != EMBEDDING

    @property
    def names(self) -> list[str]:
        """The names of the tensors, by layer."""
        return [self.name.format(n) for n in range(self.shape[0])] if self.is_stack else [self.name]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.is_stack else self.shape
        return shape[::-1] if self.is_transposed else shape


def model_leaves(config: LlamaConfig) -> dict[str, _Leaf]:
    """The leaves of the parameters, by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        words = [_NAMES.get(name, name) for name in names.split("/")]
        if words[0] == "layers":
            words.insert(1, "{}")
        if words[0] != "lm_head":
            words.insert(0, "model")
        leaves[names] = _Leaf(leaf.shape, ".".join(words))
    return leaves


class ModelFolder:
    """The parameters in a folder of transformers, checked by name and shape, and read on demand.

    Args:
      folder: the folder.
      config: the model that its tensors must fit, usually from `read_config`.

    Raises:
      InputError: a file is missing or damaged, or tensors do not fit the model; they are listed.
        `read` raises one if a tensor has numbers that are not finite.
    """

    def __init__(self, folder: Path, config: LlamaConfig):
        self._folder = folder
        self._leaves, self._dtype = model_leaves(config), jnp.dtype(config.dtype)
        self._tensors = stored_tensors(folder)
        if not any(name.startswith(_PREFIX) for name in self._tensors):
            # A model that was saved without its head, such as one for text embeddings.
            named = lambda name: name if name == HEAD else _PREFIX + name
            self._tensors = {named(name): tensor for name, tensor in self._tensors.items()}
        _check_fit(folder, self._leaves.values(), self._tensors)

    def read(self, path: str, index: Index) -> np.ndarray:
        """A part of a leaf, in the dtype of the model.

        Args:
          path: the path of the leaf.
          index: a slice for each of its axes.
        """
        leaf = self._leaves[path]
        if not leaf.is_stack:
            return self._read(leaf, leaf.name, index)
        layers, index = index[0], index[1:]
        return np.stack([self._read(leaf, name, index) for name in leaf.names[layers]])

    def _read(self, leaf: _Leaf, name: str, index: Index) -> np.ndarray:
        stored = self._tensors[name]
        part = read_tensor(stored, index[::-1] if leaf.is_transposed else index)
        _check_finite(part, name, self._folder)
        return (part.T if leaf.is_transposed else part).astype(self._dtype)


def write_model(
    folder: Path,
    config: LlamaConfig,
    read: ReadPart,
    *,
    settings: Mapping[str, Any] | None = None,
    shard_bytes: int = 10**9,
) -> None:
    """Writes a model that transformers can load: safetensors files and, last, config.json.

    Args:
      folder: made if it does not exist; it may not hold a model or an adapter.
      config: the model.
      read: returns parts of its parameters; called for one layer of a leaf at a time.
      settings: further keys of config.json, such as eos_token_id.
      shard_bytes: the size of a file; one file at a time is held in memory.

    Raises:
      InputError: the folder holds a model or an adapter, transformers has no such architecture, or
        a number is not finite.
    """
    content = to_json(config) | dict(settings or {})
    make_folder(folder)
    found = {}
    for path, leaf in model_leaves(config).items():
        for layer, name in enumerate(leaf.names):
            found[name] = path, leaf, layer

    def tensor(name: str) -> np.ndarray:
        path, leaf, layer = found[name]
        index = tuple(slice(0, size) for size in leaf.shape)
        if leaf.is_stack:
            index = (slice(layer, layer + 1), *index[1:])
        part = read(path, index)
        part = part[0] if leaf.is_stack else part
        _check_finite(part, name, "the checkpoint to write")
        return part.T if leaf.is_transposed else part

    shapes = {name: leaf.tensor_shape for name, (_, leaf, _) in found.items()}
    write_tensors(folder, shapes, jnp.dtype(config.dtype), tensor, shard_bytes)
    write_json(folder / CONFIG, content)


def _check_finite(part: np.ndarray, name: str, place: str | Path) -> None:
    unsigned = {2: np.uint16, 4: np.uint32}[part.dtype.itemsize]
    # Infinities and NaN have all bits of the exponent. NumPy takes five times as long in bfloat16.
    exponent = np.array(np.inf, part.dtype).view(unsigned)
    if (part.view(unsigned) & exponent == exponent).any():
        raise InputError(f"{name} in {place} has numbers that are not finite: take another one.")


def _check_fit(folder: Path, leaves: Any, tensors: Mapping[str, Stored]) -> None:
    shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    extra = {name for name in tensors if not _COMPUTED.fullmatch(name)} - shapes.keys()
    if HEAD in extra and _is_tied(tensors):
        extra.remove(HEAD)
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unknown": sorted(extra),
        "of another shape": [
            f"{name} {tensors[name].shape} in place of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    found = [f"{what}: {listed_names(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(
            f"the tensors in {folder} do not fit its {CONFIG} or the settings of the model: "
            f"{'; '.join(found)}."
        )
    check_dtypes(tensors[name] for name in shapes)


def _is_tied(tensors: Mapping[str, Stored]) -> bool:
    """Whether a head in the files equals the embedding."""
    if EMBEDDING not in tensors or tensors[HEAD].shape != tensors[EMBEDDING].shape:
        return False
    both = tensors[HEAD], tensors[EMBEDDING]
    check_dtypes(both)
    head, embedding = map(read_tensor, both)
    return np.array_equal(head, embedding)
