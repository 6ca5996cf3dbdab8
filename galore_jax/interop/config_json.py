"""The config.json of Hugging Face's transformers as a `LlamaConfig`, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from galore_jax.data.tokenizers import from_pretrained
from galore_jax.errors import InputError, require_choice
from galore_jax.interop.tensors import CONFIG
from galore_jax.models.llama import LlamaConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Attributes of a LlamaConfig, and their names in config.json.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA3_ROPE = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
# Settings for which galore_jax has one value only.
_FIXED = {"hidden_act": "silu", "mlp_bias": False, "is_causal": True, "quantization_config": None}
# Only float32 holds every float16 number.
_DTYPES: dict[str, Any] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
T = TypeVar("T")


def completed_settings(folder: Path, build: Callable[[dict[str, Any]], T]) -> T:
    """The result of `build` on the settings of a config.json, completed by transformers.

    Raises:
      InputError: the file is missing or damaged, its model_type is unknown to transformers, or
        `build` raises one; the message begins with the file.
      ModuleNotFoundError: transformers is not installed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"there is no {path}: name a folder that has one.")
    config = from_pretrained("AutoConfig", folder, str(path))
    try:
        return build(config.to_dict())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_config(folder: Path) -> LlamaConfig:
    """The model that a folder's config.json describes, of transformers 4 or 5.

    Raises:
      InputError: as `completed_settings`; or the architecture or a setting is not supported.
    """
    return completed_settings(folder, _from_settings)


def to_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5.

    Raises:
      InputError: no architecture of transformers has this combination of settings.
    """
    kind = _architecture(config)
    table: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": _FIXED["hidden_act"],
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "torch_dtype": config.dtype,
    }
    if config.rope_factor != 1:
        scaling = {theirs: getattr(config, ours) for ours, theirs in _LLAMA3_ROPE.items()}
        table["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if kind in ("llama", "qwen3"):
        table["attention_bias"] = config.attention_bias == "qkvo"
    if kind != "llama":
        table["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        table["use_sliding_window"] = config.sliding_window is not None
        table["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    return table


def _architecture(config: LlamaConfig) -> str:
    match (config.attention_bias, config.qk_norm, config.sliding_window is not None):
        case ("" | "qkvo", True, _):
            return "qwen3"
        case ("qkv", False, _):
            return "qwen2"
        case ("", False, True):
            return "mistral"
        case ("" | "qkvo", False, False):
            return "llama"
    raise InputError(
        f"no architecture of transformers has model.attention_bias = {config.attention_bias!r}, "
        f"model.qk_norm = {config.qk_norm} and model.sliding_window = {config.sliding_window}; "
        f"there are {', '.join(ARCHITECTURES)}."
    )


def _from_settings(table: dict[str, Any]) -> LlamaConfig:
    kind = table["model_type"]
    require_choice("model_type", kind, ARCHITECTURES)
    for key, value in _FIXED.items():
        if table.get(key) not in (None, value):
            raise InputError(f"{key} = {table[key]!r} is not supported, only {value!r}.")
    dtype = table["dtype"] or "float32"
    require_choice("dtype", dtype, _DTYPES)
    has_bias = kind in ("llama", "qwen3") and table["attention_bias"]
    return LlamaConfig(
        **{ours: table[theirs] for ours, theirs in _SETTINGS.items()},
        num_kv_heads=table["num_key_value_heads"],
        head_dim=table.get("head_dim"),
        **_rope(table["rope_parameters"]),
        attention_bias="qkv" if kind == "qwen2" else "qkvo" if has_bias else "",
        qk_norm=kind == "qwen3",
        sliding_window=None if kind == "llama" else _window(table),
        dtype=_DTYPES[dtype],
    )


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError("rotary embeddings that differ between kinds of layers are not supported.")
    if rope["rope_type"] not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"the rotary embedding {rope} is not supported: only llama3 is.")
    settings: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "llama3":
        settings |= {ours: rope[theirs] for ours, theirs in _LLAMA3_ROPE.items()}
    return settings


def _window(table: dict[str, Any]) -> int | None:
    """The sliding window of all layers; some layers of Qwen and Mistral may not have it."""
    match sorted(set(table.get("layer_types") or ["sliding_attention"])):
        case ["sliding_attention"]:
            return table["sliding_window"]
        case ["full_attention"]:
            return None
    raise InputError("some layers have a sliding window and others do not: not supported.")
