"""The config.json of Hugging Face's transformers, and `LlamaConfig`."""

import math
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError
from galore_jax.files import read_json
from galore_jax.interop.tensors import CONFIG
from galore_jax.models.llama import LlamaConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
}
_LLAMA3_ROPE = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
# Settings for which galore_jax has one value only.
_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# Only float32 holds every float16 number.
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


def read_config(folder: Path) -> LlamaConfig:
    """The model that a folder's config.json describes, of transformers 4 or 5.

    Raises:
      InputError: the file is missing or damaged, the architecture is unknown, a key is missing, or
        a setting is not supported.
    """
    path = folder / CONFIG
    table = read_json(path)
    try:
        return _from_json(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def to_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5.

    Raises:
      InputError: no architecture of transformers has this combination of settings.
    """
    kind = _architecture(config)
    table: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": _FIXED["hidden_act"],
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
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


def _from_json(table: dict[str, Any]) -> LlamaConfig:
    kind = table.get("model_type")
    if kind not in list(ARCHITECTURES):
        raise InputError(
            f"the model_type {kind!r} is unknown; there are {', '.join(ARCHITECTURES)}."
        )
    for key, value in _FIXED.items():
        if table.get(key) not in (None, value):
            raise InputError(f"{key} = {table[key]!r} is not supported, only {value!r}.")
    dtype = table.get("dtype") or table.get("torch_dtype") or "float32"
    if dtype not in list(_DTYPES):
        raise InputError(f"the dtype {dtype!r} is not supported; there are {', '.join(_DTYPES)}.")
    sizes: dict[str, Any] = {ours: _whole(table, theirs) for ours, theirs in _SIZES.items()}
    has_bias = kind in ("llama", "qwen3") and table.get("attention_bias", False)
    # Where a default of transformers is not that of LLaMA, the key must be there.
    heads = _whole(table, "num_key_value_heads", None if kind == "llama" else _REQUIRED)
    head_dim = _whole(table, "head_dim", _REQUIRED if kind == "qwen3" else None)
    return LlamaConfig(
        **sizes,
        num_kv_heads=heads,
        head_dim=head_dim,
        norm_epsilon=_real(table, "rms_norm_eps", 1e-6),
        initializer_range=_real(table, "initializer_range", 0.02),
        **_rope(table),
        attention_bias="qkv" if kind == "qwen2" else "qkvo" if has_bias else "",
        qk_norm=kind == "qwen3",
        sliding_window=None if kind == "llama" else _window(kind, table, sizes["num_layers"]),
        tie_embeddings=_flag(table, "tie_word_embeddings"),
        dtype=_DTYPES[dtype],
    )


_REQUIRED: Any = object()
_SLIDING, _FULL = "sliding_attention", "full_attention"  # what a layer is, in layer_types


def _whole(table: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    value = _value(table, key, default)
    if value is not default and type(value) is not int:
        raise InputError(f"{key} must be a whole number, not {value!r}.")
    return value


def _real(table: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    value = _value(table, key, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{key} must be a finite number, not {value!r}.")
    return float(value)


def _flag(table: dict[str, Any], key: str) -> bool:
    value = _value(table, key, False)
    if not isinstance(value, bool):
        raise InputError(f"{key} must be true or false, not {value!r}.")
    return value


def _value(table: dict[str, Any], key: str, default: Any) -> Any:
    value = table.get(key)
    if value is None and default is _REQUIRED:
        raise InputError(f"there is no {key}.")
    return default if value is None else value


def _rope(table: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding, which transformers 5 has in one object and 4 in two keys."""
    found = [table[key] for key in ("rope_parameters", "rope_scaling") if table.get(key)]
    if found[1:] and found[0] != found[1]:
        raise InputError("rope_parameters and rope_scaling differ: remove the one not meant.")
    rope = found[0] if found else {}
    if not isinstance(rope, dict):
        raise InputError(f"the rotary embedding must be an object, not {rope!r}.")
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError("rotary embeddings that differ between kinds of layers are not supported.")
    theta = _real(table, "rope_theta", 10000.0)
    settings: dict[str, Any] = {"rope_theta": _real(rope, "rope_theta", theta)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        read = lambda ours: _whole if ours == "rope_original_length" else _real
        settings |= {ours: read(ours)(rope, theirs) for ours, theirs in _LLAMA3_ROPE.items()}
    elif kind != "default":
        raise InputError(f"rotary embeddings of type {kind!r} are not supported, only llama3.")
    return settings


def _window(kind: str, table: dict[str, Any], layers: int) -> int | None:
    """The sliding window of all layers; some layers of Qwen and Mistral may not have it."""
    if kind == "mistral":
        if "sliding_window" not in table:
            raise InputError("there is no sliding_window.")
        first = 0 if table["sliding_window"] is not None else layers
    elif table.get("use_sliding_window", False):
        first = _whole(table, "max_window_layers")
    else:
        return None
    types = table.get("layer_types")
    if types is None:
        types = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    known = isinstance(types, list) and all(kind in (_SLIDING, _FULL) for kind in types)
    if not known or len(types) != layers:
        raise InputError(
            f"layer_types must be {layers} times {_SLIDING} or {_FULL}, not {types!r}."
        )
    if len(set(types)) > 1:
        raise InputError("some layers have a sliding window and others do not: not supported.")
    return _whole(table, "sliding_window") if types[0] == _SLIDING else None
