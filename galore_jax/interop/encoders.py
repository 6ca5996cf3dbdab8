"""RoBERTa and BERT from and to folders of Hugging Face: `config.json` and safetensors.

A folder holds only a body (RobertaModel, BertModel), or a body with a head; then the names of the
body's tensors begin with `roberta.` or `bert.`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.errors import InputError, require_choice
from galore_jax.files import write_json
from galore_jax.interop.config_json import completed_settings
from galore_jax.interop.leaves import Leaf, check_fit, model_leaves
from galore_jax.interop.tensors import CONFIG, SINGLE, Stored, stored_tensors, write_file
from galore_jax.models.adapters import HEAD
from galore_jax.models.encoder import ARCHITECTURES, Classifier, Encoder, EncoderConfig
from galore_jax.types import PyTree

EncoderModel = Encoder | Classifier

# Our modules and theirs; "layers" become `encoder.layer.0`, `encoder.layer.1` and so on.
_BODY = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "token_type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers/attention/q_proj": "encoder.layer.{}.attention.self.query",
    "layers/attention/k_proj": "encoder.layer.{}.attention.self.key",
    "layers/attention/v_proj": "encoder.layer.{}.attention.self.value",
    "layers/attention/o_proj": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/mlp/up_proj": "encoder.layer.{}.intermediate.dense",
    "layers/mlp/down_proj": "encoder.layer.{}.output.dense",
    "layers/mlp_norm": "encoder.layer.{}.output.LayerNorm",
}
_HEADS = {
    "roberta": {"head/dense": "classifier.dense", "head/out_proj": "classifier.out_proj"},
    "bert": {"head/dense": "pooler.dense", "head/out_proj": "classifier"},
}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# Tensors that a model without their head does not need, and buffers of older versions.
_UNUSED = re.compile(r"(pooler|classifier|lm_head|cls|qa_outputs)\.|embeddings\.position_ids$")
# Settings of a config.json, and their names in EncoderConfig.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "type_vocab_size": "token_types",
    "pad_token_id": "pad_id",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "classifier_dropout",
    "layer_norm_eps": "norm_epsilon",
    "initializer_range": "initializer_range",
}
_SUPPORTED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}


def encoder_config(folder: str | Path) -> EncoderConfig:
    """The configuration in a folder's config.json, with parameters in float32.

    Raises:
      InputError: there is no such file, it is damaged, or describes a model of another kind.
    """
    return completed_settings(Path(folder), _from_settings)


def _from_settings(settings: dict[str, Any]) -> EncoderConfig:
    require_choice("model_type", settings["model_type"], ARCHITECTURES)
    for name, supported in _SUPPORTED.items():
        if settings.get(name) not in (None, supported):
            raise InputError(f"{name} = {settings[name]!r} is not supported, only {supported!r}.")
    rows = settings["max_position_embeddings"]
    config = EncoderConfig(
        architecture=settings["model_type"],
        max_length=rows,
        **{ours: settings[name] for name, ours in _SETTINGS.items()},
    )
    # The first rows of RoBERTa's table are not positions of tokens.
    return dataclasses.replace(config, max_length=rows - config.first_position)


def load_encoder(
    folder: str | Path, model: EncoderModel, key: jax.Array, labels: Sequence[str] | None = None
) -> PyTree:
    """Reads the parameters of a model, to the default device, from the safetensors of a folder.

    Args:
      folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`.
      model: an encoder with the folder's `encoder_config`, with or without a head.
      key: random key for tensors of the head that the folder lacks.
      labels: the names of the classes, in order, or none for a regression. A classifier in the
        folder is not used if its config.json names others. None: it is always used.

    Raises:
      InputError: a file is missing or damaged, tensors do not fit the model (they are listed), or
        one has numbers that are not finite.
    """
    folder, leaves = Path(folder), _leaves(model)
    tensors = _renamed(stored_tensors(folder), model.config.architecture)
    wanted = {name for leaf in leaves.values() for name in leaf.names}
    unused = {name for name in tensors.keys() - wanted if _UNUSED.match(name)}
    if labels is not None and _class_names(labels) != _stored_class_names(folder):
        unused |= {name for name in tensors if name.startswith("classifier.")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    missing = {
        path for path, leaf in leaves.items() if path.startswith(HEAD) and leaf.name not in tensors
    }
    check_fit(folder, [leaf for path, leaf in leaves.items() if path not in missing], tensors)
    initialize = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.eval_shape(initialize, key)
    if missing:
        # Only the head is computed.
        params |= jax.jit(lambda key: {HEAD: initialize(key)[HEAD]})(key)

    def read(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in missing:
            return leaf
        whole = tuple(slice(0, size) for size in leaf.shape)
        return jnp.asarray(leaves[name].read(tensors, whole, leaf.dtype))

    return jax.tree_util.tree_map_with_path(read, params)


def save_encoder(
    folder: str | Path, model: EncoderModel, params: PyTree, labels: Sequence[str] = ()
) -> None:
    """Writes a folder that `transformers` loads: `config.json` and `model.safetensors`.

    Args:
      folder: created if it does not exist; these two files in it are replaced.
      model: an encoder, with or without a head.
      params: its parameters.
      labels: the names of a classifier's classes, in order. Empty: LABEL_0, LABEL_1 and so on.
    """
    prefix = "" if isinstance(model, Encoder) else f"{model.config.architecture}."
    tensors = {}
    for leaf, value in zip(_leaves(model).values(), jax.tree.leaves(params), strict=True):
        layers = np.asarray(value) if leaf.is_stack else [np.asarray(value)]
        for name, layer in zip(leaf.names, layers, strict=True):
            name = name if name.startswith("classifier") else prefix + name
            tensors[name] = np.ascontiguousarray(layer.T if leaf.is_kernel else layer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SINGLE, tensors)
    write_json(folder / CONFIG, _hugging_face_config(model, labels))


def _leaves(model: EncoderModel) -> dict[str, Leaf]:
    """The leaves by path, with names of tensors as in a body alone."""
    modules = _BODY | _HEADS[model.config.architecture]

    def tensor_name(path: str) -> str:
        module, _, leaf = path.removeprefix("encoder/").rpartition("/")
        return f"{modules[module]}.{_LEAVES[leaf]}"

    return model_leaves(model, tensor_name)


def _renamed(tensors: Mapping[str, Stored], architecture: str) -> dict[str, Stored]:
    """The tensors with names as in a body alone, and the norms' names of PyTorch.

    In checkpoints that were converted from TensorFlow norms have other names.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(f"{architecture}.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    if len(renamed) < len(tensors):
        raise InputError(
            "two tensors of the checkpoint have the same name apart from a prefix or gamma and "
            "beta: leave out the ones that do not belong to the model."
        )
    return renamed


def _class_names(labels: Sequence[str], count: int = 1) -> list[str]:
    return list(labels) or [f"LABEL_{index}" for index in range(count)]


def _stored_class_names(folder: Path) -> list[str]:
    names = completed_settings(folder, lambda settings: settings["id2label"])
    return [names[key] for key in sorted(names)]


def _hugging_face_config(model: EncoderModel, labels: Sequence[str]) -> dict[str, Any]:
    config = model.config
    settings = {name: getattr(config, ours) for name, ours in _SETTINGS.items()}
    task = "Model"
    if isinstance(model, Classifier):
        task = "ForSequenceClassification"
        names = _class_names(labels, model.num_labels)
        settings["id2label"] = {str(index): name for index, name in enumerate(names)}
        settings["label2id"] = {name: index for index, name in enumerate(names)}
        if model.num_labels == 1:
            settings["problem_type"] = "regression"
    return settings | {
        "architectures": [config.architecture.capitalize() + task],
        "model_type": config.architecture,
        "hidden_act": "gelu",
        "max_position_embeddings": config.first_position + config.max_length,
        "torch_dtype": config.dtype,
    }
