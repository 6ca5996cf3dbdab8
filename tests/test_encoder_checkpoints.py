"""Folders of Hugging Face for RoBERTa and BERT, against `transformers`, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from encoders import BERT, CONFIGS, initial, outputs, random_tokens, random_types

from galore_jax.errors import InputError
from galore_jax.interop.encoders import encoder_config, load_encoder, save_encoder
from galore_jax.models.encoder import Classifier, Encoder

safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
KEY = jax.random.key(5)
MODELS = pytest.mark.parametrize(
    "make",
    [
        lambda c: Encoder(c),
        lambda c: Classifier(c, 3),
        lambda c: Classifier(c, 1),
    ],
    ids=["body", "classification", "regression"],
)


@pytest.fixture
def hugging_face():
    """The torch and transformers libraries."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.set_num_threads(1)
    return torch, transformers


def transformers_model(library, model):
    """The class of `transformers` for a model."""
    if isinstance(model, Encoder):
        return library.AutoModel
    return library.AutoModelForSequenceClassification


def batch(config):
    """Rows with padding at the end, at the start and none."""
    tokens, types = random_tokens(3, 11), random_types(3, 11)
    return tokens.at[0, 7:].set(config.pad_id).at[1, :2].set(config.pad_id), types


def transformers_outputs(torch, theirs, tokens, types, config):
    tokens, types = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (tokens, types))
    with torch.no_grad():
        found = theirs.eval()(tokens, attention_mask=tokens != config.pad_id, token_type_ids=types)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).numpy()


@pytest.mark.filterwarnings("default")
@CONFIGS
@MODELS
def test_a_model_of_transformers_has_the_same_outputs_here_and_back_there(
    hugging_face, tmp_path, config, make
):
    torch, library = hugging_face
    model = make(config)
    settings = {"max_position_embeddings": config.first_position + config.max_length}
    kind = library.RobertaConfig if config.architecture == "roberta" else library.BertConfig
    theirs = transformers_model(library, model).from_config(
        kind(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            type_vocab_size=config.token_types,
            initializer_range=config.initializer_range,
            layer_norm_eps=config.norm_epsilon,
            num_labels=getattr(model, "num_labels", 2),
            **settings,
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    assert encoder_config(tmp_path) == config
    loaded = load_encoder(tmp_path, model, KEY)
    tokens, types = batch(config)
    expected = transformers_outputs(torch, theirs, tokens, types, config)
    np.testing.assert_allclose(outputs(model, loaded, tokens, types), expected, atol=1e-4)
    save_encoder(tmp_path / "ours", model, loaded)
    back, report = transformers_model(library, model).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"pooler"}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    found = transformers_outputs(torch, back, tokens, types, config)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@CONFIGS
@MODELS
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, config, make):
    config = dataclasses.replace(config, classifier_dropout=0.25)
    model = make(config)
    params = initial(model)
    save_encoder(tmp_path, model, params)
    assert encoder_config(tmp_path) == config
    loaded = load_encoder(tmp_path, model, KEY)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@CONFIGS
def test_a_head_that_the_folder_lacks_is_initialised(tmp_path, config):
    body, model = Encoder(config), Classifier(config, 3)
    save_encoder(tmp_path, body, initial(body))
    other = {"lm_head.bias": np.zeros(61, np.float32)}
    changed(tmp_path, lambda tensors: tensors.update(other))
    params = load_encoder(tmp_path, model, KEY)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], initial(body))
    expected = model.init(KEY, random_tokens(1, 1))["params"]["head"]
    # Compiled, as there, or not, random numbers differ in their last bit.
    same = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(same, params["head"], expected)


@CONFIGS
def test_a_head_for_other_labels_is_not_used(tmp_path, config):
    model = Classifier(config, 2)
    save_encoder(tmp_path, model, initial(model), ("no", "yes"))
    kept = load_encoder(tmp_path, model, KEY, ("no", "yes"))
    jax.tree.map(np.testing.assert_array_equal, kept, initial(model))
    for labels in (("yes", "no"), ("no", "yes", "maybe"), ()):
        new = load_encoder(tmp_path, Classifier(config, len(labels) or 1), KEY, labels)
        kernel = new["head"]["out_proj"]["kernel"]
        assert kernel.shape[1] == (len(labels) or 1)
        assert not np.array_equal(kernel, initial(model)["head"]["out_proj"]["kernel"])
        jax.tree.map(np.testing.assert_array_equal, new["encoder"], initial(model)["encoder"])


def test_one_file_takes_precedence_over_shards(tmp_path):
    model = Encoder(BERT)
    save_encoder(tmp_path, model, initial(model))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    loaded = load_encoder(tmp_path, model, KEY)
    jax.tree.map(np.testing.assert_array_equal, loaded, initial(model))


def changed(folder, change):
    """Rewrites the tensors of a folder after `change` of the dictionary of them."""
    tensors = dict(safetensors.load_file(folder / "model.safetensors"))
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    model = Classifier(BERT, 3)
    save_encoder(tmp_path, model, initial(model))
    return tmp_path


def test_names_of_converted_tensorflow_checkpoints_are_known(folder):
    def rename(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            new = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[new] = tensors.pop(name)

    changed(folder, rename)
    model = Classifier(BERT, 3)
    loaded = load_encoder(folder, model, KEY)
    jax.tree.map(np.testing.assert_array_equal, loaded, initial(model))


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), r"missing: encoder.layer.1.attention.self.query.weight\."),
        (
            lambda t: t.update(adapter=t[QUERY], **{"bert.rotary": t[QUERY]}),
            "unknown: adapter, bert.rotary",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY][:3].copy()}),
            r"1.attention.self.query.weight \(3, 32\) in place of \(32, 32\)",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}),
            rf"{QUERY} in .*safetensors has the dtype I8",
        ),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    changed(folder, change)
    with pytest.raises(InputError, match=message):
        load_encoder(folder, Classifier(BERT, 3), KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama' is unknown; there are roberta, bert"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = "),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"hidden_size": "32"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 5}, "model.num_heads 5 does not divide"),
    ],
)
def test_a_config_of_another_model_is_one_sentence(folder, settings, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(InputError, match=rf"config.json: .*{message}"):
        encoder_config(folder)


def test_a_config_that_is_no_json_object_is_named(folder):
    for content in ("{", "[]", '{"a":' * 10**5):
        (folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config.json: .*"):
            encoder_config(folder)
    with pytest.raises(InputError, match=r"there is no .*gone/config.json"):
        encoder_config(folder / "gone")
