"""Adapters of a decoder: merged into its kernels part by part, or in the format of PEFT."""

from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.files import write_json
from galore_jax.interop.decoders import model_leaves
from galore_jax.interop.tensors import ADAPTER, ADAPTER_CONFIG, make_folder, write_file
from galore_jax.models.adapters import KERNEL, A, Adapter, B, product
from galore_jax.models.llama import LlamaConfig
from galore_jax.types import ReadPart

# How PEFT names the tensors of its models.
_PREFIX, _NAMES = "base_model.model.", {A: "lora_A", B: "lora_B"}


def is_adapted(path: str) -> bool:
    """Whether a leaf is a kernel that adapters apply to: one in the blocks."""
    return path.startswith("layers/") and path.endswith(f"/{KERNEL}")


def merged(read: ReadPart, adapter: Adapter) -> ReadPart:
    """Reads the parameters of the equivalent model without adapters."""

    def read_merged(path: str, index: tuple[slice, ...]) -> np.ndarray:
        if not is_adapted(path):
            return read(path, index)
        layer = path.removesuffix(KERNEL)
        *batch, rows, columns = index
        a = read(layer + A, (*batch, rows, slice(None)))
        b = read(layer + B, (*batch, slice(None), columns))
        part = np.asarray(product(adapter, a, b))
        if adapter.has_kernel:
            part = part + read(path, index).astype(np.float32)
        return part.astype(a.dtype)

    return read_merged


def write_adapter(
    folder: Path, model: LlamaConfig, adapter: Adapter, read: ReadPart, base: str
) -> None:
    """Writes LoRA's factors so that PEFT adds them to a model of transformers.

    Args:
      folder: made if it does not exist; it may not hold a model or an adapter.
      model: the model.
      adapter: its adapter, with kernels.
      read: returns parts of the parameters; called for one layer of a leaf at a time.
      base: the folder or name of the model of transformers that the adapter belongs to.

    Raises:
      InputError: the folder holds a model or an adapter.
    """
    make_folder(folder)
    tensors, ranks = {}, {}
    for path, leaf in model_leaves(model).items():
        if not is_adapted(path):
            continue
        *_, rows, columns = leaf.shape
        ranks[path.split("/")[-2]] = adapter.rank_of(rows, columns)
        for layer, name in enumerate(leaf.names):
            module = _PREFIX + name.removesuffix(".weight")
            for factor, theirs in _NAMES.items():
                index = (slice(layer, layer + 1), slice(None), slice(None))
                part = read(path.removesuffix(KERNEL) + factor, index)
                tensors[f"{module}.{theirs}.weight"] = np.ascontiguousarray(part[0].T)
    write_file(folder / ADAPTER, tensors)
    usual = max(ranks.values())
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    write_json(folder / ADAPTER_CONFIG, content)
