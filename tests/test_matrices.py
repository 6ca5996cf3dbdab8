"""Matrix views and the default rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from galore_jax.matrices import MatrixView, matrix_views, path_name


@pytest.mark.parametrize(
    ("view", "sizes"),
    [
        (MatrixView((6, 8), (0,), (1,)), ((), 6, 8)),
        (MatrixView((3, 6, 8), (1,), (2,)), ((3,), 6, 8)),
        (MatrixView((3, 6, 2, 4), (1,), (2, 3)), ((3,), 6, 8)),
        (MatrixView((2, 4, 6), (0, 1), (2,)), ((), 8, 6)),
        (MatrixView((5, 6, 7), (2,), (0,)), ((6,), 7, 5)),
    ],
)
def test_a_view_reads_an_array_as_matrices_and_back(view, sizes):
    assert (view.batch, view.rows, view.columns) == sizes
    array = jnp.arange(np.prod(view.shape)).reshape(view.shape)
    matrices = view.to_matrices(array)
    assert matrices.shape == (*sizes[0], *sizes[1:])
    np.testing.assert_array_equal(view.from_matrices(matrices), array)


def projected(params, rank):
    views = jax.tree_util.tree_leaves_with_path(
        matrix_views(params, rank), is_leaf=lambda node: node is None
    )
    return {path_name(path): view for path, view in views if view is not None}


def test_matrices_are_the_last_two_axes_of_leaves_larger_than_the_rank():
    params = {
        "wide": {"kernel": jnp.zeros((9, 64))},
        "stacked": {"kernel": jnp.zeros((3, 64, 16))},
        "narrow": {"kernel": jnp.zeros((8, 64))},
        "value": jnp.zeros((16, 64)),
        "counts": jnp.zeros((64, 64), jnp.int32),
        "vector": jnp.zeros(64),
        "scalar": 1.0,
    }
    views = projected(params, rank=8)
    assert set(views) == {"wide/kernel", "stacked/kernel", "value"}
    assert views["stacked/kernel"].batch == (3,)


@pytest.mark.parametrize(
    "path",
    [
        "layers/mlp/bias",
        "layers/norm_1/scale",
        "embed_tokens/table",
        "wte/embedding",
        "lm_head/kernel",
        "Embed_0/x",
        "LayerNorm_3/w",
        "head/kernel",
        "input_norm/kernel",
        "RMSNorm_0/kernel",
    ],
)
def test_names_of_embeddings_heads_norms_biases_and_scales_stay_whole(path):
    params = jnp.zeros((2, 64, 64))
    for name in reversed(path.split("/")):
        params = {name: params}
    assert projected(params, rank=8) == {}


@pytest.mark.parametrize(
    "path",
    ["layers/q_proj/kernel", "heads/kernel", "overhead/kernel", "normal/kernel", "Dense_0/kernel"],
)
def test_only_whole_words_count(path):
    params = jnp.zeros((64, 64))
    for name in reversed(path.split("/")):
        params = {name: params}
    assert list(projected(params, rank=8)) == [path]


def test_flax_attention_is_recognised_under_the_name_that_flax_gives_it():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, name="lm_head")(nn.MultiHeadDotProductAttention(num_heads=4)(x))

    params = Model().init(jax.random.key(0), jnp.zeros((1, 5, 32)))["params"]
    names = {"query", "key", "value", "out"}
    assert {path.split("/")[1] for path in projected(params, rank=8)} == names


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_attention_kernels_are_read_across_their_heads(stacked):
    attention = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jnp.zeros((1, 5, 32))
    params = attention.init(jax.random.key(0), x)["params"]
    if stacked:
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), params)
    views = projected(params, rank=8)
    assert set(views) == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    for view in views.values():
        assert (view.batch, view.rows, view.columns) == ((6,) if stacked else (), 32, 32)
    assert len(views["query/kernel"].out_axes) == 2
    assert len(views["out/kernel"].in_axes) == 2


def test_stacked_dense_layers_named_like_attention_are_plain_matrices():
    params = {name: {"kernel": jnp.zeros((6, 32, 48))} for name in ("query", "key", "value")}
    params["out"] = {"kernel": jnp.zeros((6, 48, 32))}
    assert {view.batch for view in projected(params, rank=8).values()} == {(6,)}
