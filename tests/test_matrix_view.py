"""Matrix views, and the names of leaves that are not projected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers

from galore_jax.subspace.matrix_view import (
    MatrixView,
    is_bias_or_scale,
    is_unprojected_by_name,
    matrix_views,
    named_leaves,
    path_names,
)


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


def views_of(params, numbers=None):
    """The views of the leaves that have one, by name."""
    views = jax.tree_util.tree_leaves_with_path(matrix_views(params, numbers))
    return {"/".join(path_names(path)): view for path, view in views}


def test_matrices_are_the_last_two_axes_of_floating_leaves():
    params = {
        "wide": {"kernel": jnp.zeros((9, 64))},
        "stacked": {"kernel": jnp.zeros((3, 64, 16))},
        "half": jnp.zeros((16, 64), jnp.bfloat16),
        "counts": jnp.zeros((64, 64), jnp.int32),
        "vector": jnp.zeros(64),
        "scalar": 1.0,
    }
    views = views_of(params)
    assert set(views) == {"wide/kernel", "stacked/kernel", "half"}
    assert views["wide/kernel"] == MatrixView((9, 64), (0,), (1,))
    assert views["stacked/kernel"] == MatrixView((3, 64, 16), (1,), (2,))


def is_unprojected(names):
    return is_bias_or_scale(tuple(names)) or is_unprojected_by_name(tuple(names))


UNPROJECTED = """
    layers/mlp/bias layers/norm_1/scale ln_1/offset ln_1/gamma ln_1/beta blocks/ln_g unembed wpe
    embed_tokens/table wte/embedding lm_head/kernel Embed_0/x input_layernorm/weight
    token_and_position/embeddings LayerNorm_3/w head/kernel input_norm/kernel RMSNorm_0/kernel emb
    tok_emb/weight transformer/wte/embedding classifier/dense/kernel params/classifier/kernel
    output/kernel model/output/weight output decoder/logits_dense/kernel
"""
# Only complete words count, and those of norms only in the last two names.
PROJECTED = """
    q_proj/kernel heads/kernel overhead/kernel normal/kernel bias/kernel scaled
    PreNorm_0/FeedForward_0/Dense_0/kernel AdaLayerNorm_0/Dense_0/kernel
    MultiHeadDotProductAttention_0/query/kernel encoder/layer/0/output/dense/kernel
    layer_0/mlp/output/kernel output/dense/kernel attention_output/kernel attention/out/kernel
    self_attn/o_proj/kernel member/kernel classifiers/kernel output_proj/kernel
"""


def test_embeddings_heads_norms_biases_and_scales_are_known_by_their_names():
    assert [path for path in UNPROJECTED.split() if not is_unprojected(path.split("/"))] == []
    assert [path for path in PROJECTED.split() if is_unprojected(path.split("/"))] == []


@pytest.mark.parametrize(
    "names",
    ["query key value out", "query key value attention_output", "q_proj k_proj v_proj o_proj"],
)
def test_attention_is_recognised_by_the_names_of_flax_keras_and_tunix(names):
    *inputs, output = (f"attention/{name}/kernel" for name in names.split())
    params = {name: jnp.zeros((32, 4, 6)) for name in inputs} | {output: jnp.zeros((4, 6, 32))}
    views = views_of(params)
    for name in inputs:
        assert views[name] == MatrixView((32, 4, 6), (0,), (1, 2))
    assert views[output] == MatrixView((4, 6, 32), (0, 1), (2,))


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_attention_kernels_are_read_across_their_heads(linen, stacked):
    attention = linen.MultiHeadDotProductAttention(num_heads=4)
    x = jnp.zeros((1, 5, 32))
    params = attention.init(jax.random.key(0), x)["params"]
    if stacked:
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), params)
    views = views_of(params)
    for name in ("query", "key", "value", "out"):
        view = views[f"{name}/kernel"]
        assert (view.batch, view.rows, view.columns) == ((6,) if stacked else (), 32, 32)
    assert len(views["query/kernel"].out_axes) == 2
    assert len(views["out/kernel"].in_axes) == 2


def test_stacked_dense_layers_named_like_attention_are_plain_matrices():
    params = {name: {"kernel": jnp.zeros((6, 32, 48))} for name in ("query", "key", "value")}
    params["out"] = {"kernel": jnp.zeros((6, 48, 32))}
    assert {view.batch for view in views_of(params).values()} == {(6,)}


def test_the_path_of_a_leaf_is_its_names_with_or_without_the_wrapping_of_nnx(nnx):
    params = {"layers": [{"kernel": 0.0}, {"kernel": 0.0}], "value": 0.0}
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    names = [names for names, _ in named_leaves(params)]
    assert names == [("layers", "0", "kernel"), ("layers", "1", "kernel"), ("value",)]
    assert [names for names, _ in named_leaves(state)] == [("bias",), ("kernel",)]


def test_a_key_that_is_a_path_has_the_names_of_the_path():
    [(names, _)] = named_leaves({"attention/query": {"bias": 0.0}})
    assert names == ("attention", "query", "bias")


@pytest.mark.parametrize(("weight", "bias"), [("w", "b"), ("kernel", "b"), ("w1", "b1")])
@pytest.mark.parametrize("kernel", [(32,), (3, 3, 32)], ids=["linear", "convolution"])
def test_the_stacked_b_of_a_layer_is_a_bias(weight, bias, kernel):
    layers = {"layer": {weight: jnp.zeros((6, *kernel, 48)), bias: jnp.zeros((6, 48))}}
    assert set(views_of(layers)) == {f"layer/{weight}"}


def test_a_matrix_called_b_next_to_matrices_is_a_matrix():
    assert set(views_of({"a": jnp.zeros((32, 8)), "b": jnp.zeros((8, 48))})) == {"a", "b"}
    assert set(views_of({"a": jnp.zeros((3, 8, 48)), "b": jnp.zeros((8, 48))})) == {"a", "b"}
    assert set(views_of({"b": jnp.zeros((8, 48))})) == {"b"}


DENSE = GaLoreDimensionNumbers(reduction_axis=-2, output_axis=-1)
CONVOLUTION = GaLoreDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
LEAVES = {
    "convolution": {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)},
    "dense": {"first": jnp.zeros((5, 6, 7)), "second": jnp.zeros((6, 7))},
}
AS_CONVOLUTION = MatrixView((3, 3, 4, 8), (0, 1, 2), (3,))
AS_DENSE = MatrixView((5, 6, 7), (1,), (2,))


TREE = {
    "convolution": {"kernel": CONVOLUTION, "bias": None},
    "dense": {"first": DENSE, "second": None},
}
LAST_AXES = {
    "convolution/kernel": MatrixView((3, 3, 4, 8), (2,), (3,)),
    "dense/first": AS_DENSE,
    "dense/second": MatrixView((6, 7), (0,), (1,)),
}
ONE = {"convolution/kernel": AS_CONVOLUTION}


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (TREE, ONE | {"dense/first": AS_DENSE}),
        ({"convolution": CONVOLUTION, "dense": None}, ONE),
        (DENSE, LAST_AXES),
        ({"convolution": MuonDimensionNumbers((0, 1, 2), 3), "dense": None}, ONE),
        (lambda tree: jax.tree.map(lambda p: CONVOLUTION if p.ndim == 4 else None, tree), ONE),
        (lambda tree: dict.fromkeys(tree) | {"convolution": CONVOLUTION}, ONE),
    ],
    ids=["tree", "prefix", "single", "another class", "function", "function to a prefix"],
)
def test_dimension_numbers_are_a_tree_a_prefix_of_one_or_a_function_to_these(numbers, expected):
    assert views_of(LEAVES, numbers) == expected
    shapes = jax.eval_shape(lambda: LEAVES)
    assert views_of(shapes, numbers) == expected


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"dense": DENSE}, "does not match the parameters"),
        ({"convolution": CONVOLUTION, "dense": (0, 1)}, "does not match the parameters"),
        ({"convolution": None, "dense": CONVOLUTION}, "dense/first has 3 axes, shape .5, 6, 7."),
        (
            {"convolution": GaLoreDimensionNumbers(0, -4), "dense": None},
            "name each axis at most once",
        ),
        ({"convolution": GaLoreDimensionNumbers((), 1), "dense": None}, "and at least one for in"),
        ({"convolution": None, "dense": "std"}, "the dimension numbers of dense/first are 'std'"),
    ],
)
def test_wrong_dimension_numbers_are_refused_and_name_the_leaf(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        matrix_views(LEAVES, numbers)
