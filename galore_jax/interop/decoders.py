"""LLaMA-type models in the format of Hugging Face's transformers, read and written part by part."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from galore_jax.files import write_json
from galore_jax.interop.config_json import to_json
from galore_jax.interop.leaves import Leaf, check_finite, check_fit, model_leaves
from galore_jax.interop.tensors import (
    CONFIG,
    Stored,
    check_dtypes,
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


def open_model(folder: Path, config: LlamaConfig) -> ReadPart:
    """Checks the tensors in a folder of transformers by name and shape, to be read on demand.

    Args:
      folder: the folder.
      config: the model that its tensors must fit, usually from `read_config`.

    Returns:
      A function that reads a part of a leaf, in the dtype of the model.

    Raises:
      InputError: a file is missing or damaged, or tensors do not fit the model; they are listed.
        The function raises one if a tensor has numbers that are not finite.
    """
    leaves, dtype, tensors = _leaves(config), jnp.dtype(config.dtype), stored_tensors(folder)
    if not any(name.startswith(_PREFIX) for name in tensors):
        # A model that was saved without its head, such as one for text embeddings.
        named = lambda name: name if name == HEAD else _PREFIX + name
        tensors = {named(name): tensor for name, tensor in tensors.items()}
    tensors = {name: each for name, each in tensors.items() if not _COMPUTED.fullmatch(name)}
    if config.tie_embeddings and HEAD in tensors and _is_tied(tensors):
        del tensors[HEAD]
    check_fit(folder, leaves.values(), tensors)
    return lambda path, index: leaves[path].read(tensors, index, dtype)


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
      folder: made if it does not exist; it may not hold a model.
      config: the model.
      read: returns parts of its parameters; called for one layer of a leaf at a time.
      settings: further keys of config.json, such as eos_token_id.
      shard_bytes: the size of a file; one file at a time is held in memory.

    Raises:
      InputError: the folder holds a model, transformers has no such architecture, or a number is
        not finite.
    """
    content = to_json(config) | dict(settings or {})
    make_folder(folder)
    found: dict[str, tuple[str, Leaf, int]] = {}
    for path, leaf in _leaves(config).items():
        for layer, name in enumerate(leaf.names):
            found[name] = path, leaf, layer

    def tensor(name: str) -> np.ndarray:
        path, leaf, layer = found[name]
        index = tuple(slice(0, size) for size in leaf.shape)
        if leaf.is_stack:
            part = read(path, (slice(layer, layer + 1), *index[1:]))[0]
        else:
            part = read(path, index)
        check_finite(part, name, "the checkpoint to write")
        return part.T if leaf.is_kernel else part

    shapes = {name: leaf.tensor_shape for name, (_, leaf, _) in found.items()}
    write_tensors(folder, shapes, jnp.dtype(config.dtype), tensor, shard_bytes)
    write_json(folder / CONFIG, content)


def _leaves(config: LlamaConfig) -> dict[str, Leaf]:
    def tensor_name(path: str) -> str:
        words = [_NAMES.get(name, name) for name in path.split("/")]
        if words[0] == "layers":
            words.insert(1, "{}")
        return ".".join(words if words[0] == "lm_head" else ["model", *words])

    return model_leaves(Llama(config.plain), tensor_name)


def _is_tied(tensors: Mapping[str, Stored]) -> bool:
    """Whether a head in the files equals the embedding."""
    if EMBEDDING not in tensors or tensors[HEAD].shape != tensors[EMBEDDING].shape:
        return False
    both = tensors[HEAD], tensors[EMBEDDING]
    check_dtypes(both)
    head, embedding = map(read_tensor, both)
    return np.array_equal(head, embedding)
