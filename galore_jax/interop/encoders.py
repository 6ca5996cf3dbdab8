"""RoBERTa and BERT from and to folders of Hugging Face: `config.json` and safetensors.

A folder holds only a body (RobertaModel, BertModel), or a body with a head; then the names of the
body's tensors begin with `roberta.` or `bert.`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.errors import InputError, require_choice
from galore_jax.files import read_json, write_json
from galore_jax.interop.config_json import completed_settings
from galore_jax.interop.tensors import (
    CONFIG,
    SINGLE,
    Stored,
    check_dtypes,
    listed_names,
    read_tensor,
    stored_tensors,
    write_file,
)
from galore_jax.models.adapters import HEAD
from galore_jax.models.encoder import (
    ARCHITECTURES,
    Classifier,
    Encoder,
    EncoderConfig,
)
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


class LoadedEncoder(NamedTuple):
    """Parameters from a folder, and the tensors that only the folder or only the model has.

    Attributes:
      params: the parameters of the model, on the default device.
      initialized: names of the head's tensors that the folder lacks; they have initial values.
      unused: names of tensors in the folder that the model does not need, such as another head's.
    """

    params: PyTree
    initialized: tuple[str, ...]
    unused: tuple[str, ...]


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
) -> LoadedEncoder:
    """Reads the parameters of a model from the safetensors of a folder.

    Args:
      folder: holds `model.safetensors`, or its shards and `model.safetensors.index.json`.
      model: an encoder with the folder's `encoder_config`, with or without a head.
      key: random key for tensors of the head that the folder lacks.
      labels: the names of the classes, in order, or none for a regression. A classifier in the
        folder is not used if its config.json names others. None: it is always used.

    Raises:
      InputError: a file is missing or damaged; a tensor of the body is missing; a tensor has no
        place in the model, or another shape or dtype. The message names the tensors.
    """
    tensors = stored_tensors(Path(folder))
    stored = _stored_names(tensors, model.config.architecture)
    discarded = _discard_other_head(stored, Path(folder), labels)
    initialize = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.eval_shape(initialize, key)
    wanted = {name: path for path, leaf in _leaves(params) for name in _names(path, leaf, model)}
    missing, unused = _differences(folder, model, stored, wanted)
    check_dtypes(tensors[stored[name]] for name in wanted if name in stored)
    if missing:
        # Only the head is computed.
        params |= jax.jit(lambda key: {HEAD: initialize(key)[HEAD]})(key)

    def read(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = _names(_keys(path), leaf, model)
        if names[0] in missing:
            return leaf
        return _read_leaf(_keys(path), leaf, [tensors[stored[name]] for name in names])

    params = jax.tree_util.tree_map_with_path(read, params)
    return LoadedEncoder(params, tuple(missing), (*discarded, *(stored[name] for name in unused)))


def _discard_other_head(
    stored: dict[str, str], folder: Path, labels: Sequence[str] | None
) -> list[str]:
    """Removes a classifier for other labels from the names; returns its tensors."""
    if labels is None or _class_names(labels) == _stored_class_names(folder):
        return []
    return [stored.pop(name) for name in list(stored) if name.startswith("classifier.")]


def _differences(
    folder: str | Path,
    model: EncoderModel,
    stored: Mapping[str, str],
    wanted: Mapping[str, tuple[str, ...]],
) -> tuple[list[str], list[str]]:
    """The head's tensors that the folder lacks, and tensors that the model does not need."""
    missing = [name for name in wanted if name not in stored]
    if lost := [name for name in missing if wanted[name][0] != HEAD]:
        raise InputError(
            f"{folder} lacks {listed_names(lost)}, which a model of this config.json has: take "
            "weights that belong to it."
        )
    unused = [name for name in stored if name not in wanted]
    if unknown := [stored[name] for name in unused if not _UNUSED.match(name)]:
        raise InputError(
            f"{folder} holds {listed_names(unknown)}, for which this {model.config.architecture} "
            "model has no place: take weights that belong to it."
        )
    return missing, unused


def _read_leaf(path: tuple[str, ...], leaf: Any, tensors: Sequence[Stored]) -> jax.Array:
    """A parameter from its tensors, one for each layer."""
    is_stacked, is_kernel = "layers" in path, path[-1] == "kernel"
    shape = leaf.shape[is_stacked:]
    shape = shape[::-1] if is_kernel else shape
    for found in tensors:
        if found.shape != shape:
            raise InputError(
                f"{found.file}: {found.name} has the shape {found.shape}, but the model needs "
                f"{shape}: take the weights that belong to this config.json, and a head with as "
                "many labels."
            )
    layers = [read_tensor(found) for found in tensors]
    values = np.stack(layers) if is_stacked else layers[0]
    return jnp.asarray(values.mT if is_kernel else values, leaf.dtype)


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
    tensors = {}
    prefix = f"{model.config.architecture}."
    for path, leaf in _leaves(params):
        leaf = np.asarray(leaf)
        layers = leaf if "layers" in path else [leaf]
        for name, value in zip(_names(path, leaf, model), layers, strict=True):
            in_body = name.startswith(("embeddings.", "encoder.", "pooler."))
            name = prefix + name if in_body and not isinstance(model, Encoder) else name
            tensors[name] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / SINGLE, tensors)
    write_json(folder / CONFIG, _hugging_face_config(model, labels))


def _class_names(labels: Sequence[str], count: int = 1) -> list[str]:
    return list(labels) or [f"LABEL_{index}" for index in range(count)]


def _stored_class_names(folder: Path) -> list[str]:
    path = folder / CONFIG
    names = read_json(path).get("id2label") or {}
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        raise InputError(f"{path}: id2label must map whole numbers to labels, not {names!r}.")
    return [names[key] for key in sorted(names, key=int)]


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


def _leaves(params: PyTree) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield _keys(path), leaf


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _names(path: tuple[str, ...], leaf: Any, model: EncoderModel) -> list[str]:
    """The names of a parameter's tensors without the model's prefix, one for each layer."""
    modules = "/".join(path[:-1]).removeprefix("encoder/")
    module = (_BODY | _HEADS[model.config.architecture])[modules]
    name = f"{module}.{_LEAVES[path[-1]]}"
    return [name.format(layer) for layer in range(leaf.shape[0])] if "{}" in name else [name]


def _stored_names(tensors: Iterable[str], architecture: str) -> dict[str, str]:
    """The name in the files of each tensor, by its name in this module.

    That is without the prefix of a model with a head, and without the older names of norms in
    checkpoints that were converted from TensorFlow.

    Raises:
      InputError: two tensors have one name here.
    """

    def ours(name: str) -> str:
        name = name.removeprefix(f"{architecture}.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        return name.replace("LayerNorm.beta", "LayerNorm.bias")

    stored: dict[str, str] = {}
    for name in sorted(tensors):
        if (other := stored.setdefault(ours(name), name)) != name:
            raise InputError(f"the tensors {other} and {name} mean the same: remove one.")
    return stored
