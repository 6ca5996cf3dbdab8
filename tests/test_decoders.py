"""Folders of transformers: names, layouts, settings, and what is refused, without transformers."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the files are safetensors")

from model_folder import load, random_params, save
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from galore_jax.errors import InputError
from galore_jax.interop.decoders import open_model
from galore_jax.interop.tensors import write_file
from galore_jax.models.llama import LlamaConfig

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=8,
    intermediate_size=11,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_length=32,
)
MODELS = {
    "llama": LLAMA,
    "llama 3": dataclasses.replace(
        LLAMA, tie_embeddings=True, rope_theta=5e5, rope_factor=32.0, attention_bias="qkvo"
    ),
    "mistral": dataclasses.replace(LLAMA, head_dim=6, sliding_window=7),
    "qwen2": dataclasses.replace(LLAMA, attention_bias="qkv", tie_embeddings=True),
    "qwen2 window": dataclasses.replace(LLAMA, attention_bias="qkv", sliding_window=7),
    "qwen3": dataclasses.replace(LLAMA, head_dim=6, qk_norm=True, dtype="bfloat16"),
}


def explicit(config):
    """The configuration with the sizes that config.json spells out."""
    return dataclasses.replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_size)


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 700], ids=["one file", "shards"])
def test_a_model_comes_back_bit_for_bit(config, shard_bytes, tmp_path):
    params = random_params(config)
    save(tmp_path, config, params, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    same, again = load(tmp_path)
    assert same == explicit(config)
    assert_equal_trees(again, params)
    # A shard is over the limit only if it has a single tensor.
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(each) <= shard_bytes or len(each) == 1 for each in sizes)


def test_tensors_have_the_names_and_the_layout_of_transformers(tmp_path):
    config = dataclasses.replace(MODELS["qwen3"], num_layers=1, dtype="float32")
    params = random_params(config)
    save(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    block = "model.layers.0."
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.embed_tokens.weight": (61, 8),
        block + "input_layernorm.weight": (8,),
        block + "self_attn.q_proj.weight": (24, 8),
        block + "self_attn.k_proj.weight": (12, 8),
        block + "self_attn.v_proj.weight": (12, 8),
        block + "self_attn.o_proj.weight": (8, 24),
        block + "self_attn.q_norm.weight": (6,),
        block + "self_attn.k_norm.weight": (6,),
        block + "post_attention_layernorm.weight": (8,),
        block + "mlp.gate_proj.weight": (11, 8),
        block + "mlp.up_proj.weight": (11, 8),
        block + "mlp.down_proj.weight": (8, 11),
        "model.norm.weight": (8,),
        "lm_head.weight": (61, 8),
    }
    kernel = params["layers"]["mlp"]["down_proj"]["kernel"][0]
    np.testing.assert_array_equal(tensors[block + "mlp.down_proj.weight"], kernel.T)
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], params["embed_tokens"]["embedding"]
    )
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_any_part_of_a_parameter_can_be_read(tmp_path):
    params = random_params(LLAMA)
    save(tmp_path, LLAMA, params, shard_bytes=700)
    read = open_model(tmp_path, LLAMA)
    index = slice(1, 3), slice(2, 5), slice(None, 4)
    part = read("layers/mlp/up_proj/kernel", index)
    np.testing.assert_array_equal(part, params["layers"]["mlp"]["up_proj"]["kernel"][index])
    part = read("embed_tokens/embedding", index[1:])
    np.testing.assert_array_equal(part, params["embed_tokens"]["embedding"][index[1:]])
    part = read("layers/input_norm/scale", index[:2])
    np.testing.assert_array_equal(part, params["layers"]["input_norm"]["scale"][index[:2]])


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": "qkv", "qk_norm": True},
        {"attention_bias": "qkvo", "sliding_window": 7},
    ],
)
def test_a_model_that_transformers_lacks_is_not_exported(changes, tmp_path):
    config = dataclasses.replace(LLAMA, **changes)
    with pytest.raises(InputError, match="no architecture of transformers"):
        save(tmp_path / "new", config, {})
    assert not (tmp_path / "new").exists()


def test_an_export_does_not_replace_a_model(tmp_path):
    save(tmp_path, LLAMA, random_params(LLAMA))
    with pytest.raises(InputError, match=r"already has the file config\.json"):
        save(tmp_path, LLAMA, random_params(LLAMA))


FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def change_tensors(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def truncate(folder):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])


def truncate_header(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:20])


def as_integers(folder):
    change_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].astype(np.int64)}))


def with_other_names(folder):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.lora_A"] = tensors.pop(UP)
        tensors["model.norm.weight"] = np.ones(9, np.float32)
        for layer in range(3):
            del tensors[f"model.layers.{layer}.input_layernorm.weight"]

    change_tensors(folder, change)


def with_another_head(folder):
    head = lambda tensors: tensors["model.embed_tokens.weight"] + 1
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head(tensors)}))


def with_a_head_of_float8(folder):
    """Adds a head as a safetensors file of 8-bit floats has it, which NumPy cannot hold."""
    content = (folder / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    shape = header["model.embed_tokens.weight"]["shape"]
    offsets = [len(data), len(data) + shape[0] * shape[1]]
    header["lm_head.weight"] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    data += bytes(offsets[1] - offsets[0])
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_index(text):
    def change(folder):
        (folder / FILE).rename(folder / SHARD)
        (folder / INDEX).write_text(text)

    return change


def with_map(**files):
    return with_index(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, rf"/{FILE} is not a complete safetensors file"),
        (truncate_header, rf"/{FILE} is not a complete safetensors file"),
        (as_integers, rf"{UP} in .*/{FILE} has the dtype I64"),
        (lambda folder: (folder / FILE).unlink(), rf"has neither {FILE} nor {INDEX}"),
        (with_other_names, rf"missing: .*\*.input_layernorm.weight \(3 times\), {UP};"),
        (with_other_names, "unknown: model.layers.0.mlp.up_proj.lora_A;"),
        (with_other_names, r"of another shape: model.norm.weight \(9,\) in place of \(8,\)"),
        (with_another_head, r"unknown: lm_head\.weight"),
        (with_a_head_of_float8, rf"lm_head\.weight in .*/{FILE} has the dtype F8_E4M3"),
        (with_map(x="a.safetensors", y=SHARD), rf"{INDEX} names a.safetensors, which"),
        (with_map(x=SHARD), rf"/{SHARD} has no x, which .*/{INDEX} says"),
        (with_map(x="../" + SHARD), "is not the name of a file beside it"),
        (with_map(x=1), "has no weight_map"),
        (with_index("{"), rf"/{INDEX} is not a JSON file"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence_that_names_the_file(damage, named, tmp_path):
    config = dataclasses.replace(LLAMA, tie_embeddings=True)
    save(tmp_path, config, random_params(config))
    damage(tmp_path)
    with pytest.raises(InputError, match=named) as refused:
        open_model(tmp_path, config)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path, LLAMA, random_params(LLAMA))

    def not_readable(*arguments):
        raise FileNotFoundError("No such file or directory")  # what safetensors says of it

    monkeypatch.setattr("galore_jax.interop.tensors.safe_open", not_readable)
    with pytest.raises(InputError, match=rf"/{FILE} cannot be read: check that it exists and may"):
        open_model(tmp_path, LLAMA)


def test_a_model_that_was_saved_without_its_head_is_read(tmp_path):
    config = dataclasses.replace(LLAMA, tie_embeddings=True)
    params = random_params(config)
    save(tmp_path, config, params)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(tmp_path, change)
    assert_equal_trees(load(tmp_path)[1], params)


def test_of_a_tensor_in_two_files_the_index_names_one(tmp_path):
    params = random_params(LLAMA)
    save(tmp_path, LLAMA, params)
    tensors = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    other = {UP: tensors[UP] + 1, "model.norm.weight": tensors.pop("model.norm.weight")}
    for name, content in (("b.safetensors", tensors), ("a.safetensors", other)):
        save_file(content, tmp_path / name)
    where = {"model.norm.weight": "a.safetensors"} | dict.fromkeys(tensors, "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    assert_equal_trees(load(tmp_path)[1], params)
    where[UP] = "a.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    found = load(tmp_path)[1]["layers"]["mlp"]["up_proj"]["kernel"][1]
    np.testing.assert_array_equal(found, other[UP].T)


def test_a_copy_of_a_tied_embedding_and_rotary_frequencies_are_accepted(tmp_path):
    config = dataclasses.replace(LLAMA, tie_embeddings=True)
    params = random_params(config)
    save(tmp_path, config, params)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)

    change_tensors(tmp_path, change)
    assert_equal_trees(load(tmp_path)[1], params)


def test_a_full_disk_is_the_error_of_other_files(tmp_path, monkeypatch):
    def on_a_full_disk(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("galore_jax.interop.tensors.save_file", on_a_full_disk)
    with pytest.raises(OSError, match=str(tmp_path / "a")) as raised:
        write_file(tmp_path / "a", {"x": np.zeros(2)})
    assert raised.value.errno == errno.ENOSPC


def test_float16_is_converted_without_loss(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(np.float16), random_params(LLAMA))
    save(tmp_path, LLAMA, params)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {np.dtype("float16")}
    assert_equal_trees(load(tmp_path)[1], jax.tree.map(lambda leaf: leaf.astype("f4"), params))
