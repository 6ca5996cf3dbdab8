"""Small models as trees of arrays, read from and written to folders of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.interop.config_json import read_config
from galore_jax.interop.decoders import open_model, write_model
from galore_jax.models.llama import Llama


def shapes_of(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)["params"]


def random_params(config):
    """Parameters of which no two numbers are likely to be equal."""
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype)
    return jax.tree.map(draw, shapes_of(config))


def load(folder):
    """The configuration, and the parameters."""
    config = read_config(folder)
    read_part = open_model(folder, config)

    def read(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return read_part(name, tuple(slice(None) for _ in leaf.shape))

    return config, jax.tree_util.tree_map_with_path(read, shapes_of(config))


def save(folder, config, params, **options):
    def read(path, index):
        return np.asarray(functools.reduce(dict.__getitem__, path.split("/"), params)[index])

    write_model(folder, config, read, **options)
