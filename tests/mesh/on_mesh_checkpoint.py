"""Checkpoints of Hugging Face on a mesh of 8 devices: each device reads its part."""

import collections
import dataclasses
import math

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the files are safetensors")

from model_folder import random_params, save
from trainer_on_mesh import CONFIG, MESHES, changed

from galore_jax.interop.huggingface import ModelFolder
from galore_jax.training.layout import training_mesh
from galore_jax.training.state import place_state

PARAMS = jax.tree.map(lambda leaf: leaf / 20, random_params(CONFIG.model))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder, CONFIG.model, PARAMS, shard_bytes=50_000)
    model = dataclasses.replace(CONFIG.model, checkpoint=str(folder))
    return dataclasses.replace(CONFIG, model=model)


@pytest.fixture
def read_sizes(monkeypatch):
    """The numbers of elements that are read of each leaf, one for each time."""
    sizes, read = collections.defaultdict(list), ModelFolder.read

    def recorded(self, path, index):
        part = read(self, path, index)
        sizes[path].append(part.size)
        return part

    monkeypatch.setattr(ModelFolder, "read", recorded)
    return sizes


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_each_device_reads_its_part_and_no_more(config, read_sizes, name):
    config = changed(config, mesh=MESHES[name])
    state = place_state(config, training_mesh(config))
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert set(read_sizes[key]) == {size}
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2]
    parts = {"fsdp": 8, "all": 4}[name]
    assert all(math.prod(k.sharding.shard_shape(k.shape)) == k.size // parts for k in kernels)
