"""config.json of transformers: what is understood, and what is refused."""

import dataclasses
import json

import pytest

from galore_jax.errors import InputError
from galore_jax.interop.config_json import read_config, to_json
from galore_jax.models.llama import LlamaConfig

LLAMA = LlamaConfig(61, 8, 11, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=2)


def write_config(folder, **changes):
    table = to_json(LLAMA) | changes
    table = {key: value for key, value in table.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch_dtype": "float16"}, {"dtype": "float32"}),
        ({"torch_dtype": ..., "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"num_key_value_heads": ..., "head_dim": ...}, {"num_kv_heads": 4, "head_dim": 2}),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7}},
            {"rope_theta": 7.0},
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 3.0,
                    "original_max_position_embeddings": 16,
                }
            },
            {
                "rope_factor": 8.0,
                "rope_low_freq_factor": 2.0,
                "rope_high_freq_factor": 3.0,
                "rope_original_length": 16,
            },
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 3,
            },
            {"attention_bias": "qkv", "sliding_window": None},
        ),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "mistral", "sliding_window": 4}, {"sliding_window": 4}),
        ({"is_causal": True}, {}),
    ],
)
def test_config_json_of_other_versions_is_understood(changes, expected, tmp_path):
    write_config(tmp_path, **changes)
    assert read_config(tmp_path) == dataclasses.replace(LLAMA, **expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is unknown; there are llama, mistral"),
        ({"model_type": ...}, "Unrecognized model"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"is_causal": False}, "is_causal = False is not supported, only True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"torch_dtype": "float64"}, "dtype = 'float64' is unknown"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.* is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5.* is not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rotary embeddings that differ between kinds of layers",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings' expected bool"),
        ({"hidden_size": "8"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "some layers have a sliding window and others do not",
        ),
    ],
)
def test_a_model_that_would_be_another_is_refused_with_the_file(changes, named, tmp_path):
    write_config(tmp_path, **changes)
    with pytest.raises(InputError, match=named) as refused:
        read_config(tmp_path)
    assert str(refused.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(refused.value)
