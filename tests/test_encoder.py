"""RoBERTa and BERT: the layers, their heads, and what GaLore projects of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from encoders import BERT, CONFIGS, TINY, initial, outputs, random_tokens, random_types
from projected import compared

from galore_jax import chain, describe, galore
from galore_jax.errors import InputError
from galore_jax.models.encoder import Classifier, Encoder, position_ids

KERNELS = {
    *(f"encoder/layers/attention/{name}_proj/kernel" for name in "qkvo"),
    *(f"encoder/layers/mlp/{name}_proj/kernel" for name in ("up", "down")),
}


@CONFIGS
def test_padding_changes_no_hidden_state_of_a_token(config):
    model, tokens = Encoder(config), random_tokens(2, 7)
    params = initial(model)
    padded = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=config.pad_id)
    expected = outputs(model, params, tokens)
    np.testing.assert_allclose(outputs(model, params, padded)[:, :7], expected, atol=1e-5)
    assert jnp.isfinite(outputs(model, params, jnp.full((1, 7), config.pad_id))).all()


def test_roberta_counts_positions_over_tokens_from_the_row_after_padding():
    tokens = jnp.array([[1, 5, 1, 6, 7, 1]])
    np.testing.assert_array_equal(position_ids(tokens, TINY), [[1, 2, 1, 3, 4, 1]])
    np.testing.assert_array_equal(position_ids(tokens, BERT), [[0, 1, 2, 3, 4, 5]])
    rows = initial(Encoder(TINY))["position_embedding"]["embedding"].shape[0]
    full = position_ids(random_tokens(1, TINY.max_length), TINY)
    assert full.max() == rows - 1  # the longest row has the last position


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "classifier_dropout"])
def test_each_rate_of_dropout_makes_outputs_random(rate):
    none = dataclasses.replace(BERT, dropout=0, attention_dropout=0, classifier_dropout=0)
    tokens, keys = random_tokens(1, 7), (jax.random.key(1), jax.random.key(2))
    params = initial(Classifier(none, 3))
    exact = outputs(Classifier(none, 3), params, tokens)
    np.testing.assert_array_equal(
        exact, outputs(Classifier(none, 3), params, tokens, None, keys[0])
    )
    model = Classifier(dataclasses.replace(none, **{rate: 0.5}), 3)
    np.testing.assert_array_equal(exact, outputs(model, params, tokens))
    first, again, second = (
        outputs(model, params, tokens, None, key) for key in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    assert not np.allclose(first, exact)


@CONFIGS
def test_galore_projects_the_kernels_of_the_blocks_and_no_others(config):
    shapes = jax.eval_shape(lambda: initial(Classifier(config, 3)))
    table = describe(shapes, chain(galore(4), optax.adam(1e-3))).table
    rows = [line.split() for line in table.splitlines()[1:-1]]
    assert {row[0] for row in rows if row[1] != "-"} == KERNELS
    assert all(row[1] == "3" for row in rows if row[0] in KERNELS)  # a matrix for each layer


@CONFIGS
def test_projected_gradients_equal_full_gradients_projected(config):
    tokens, types, labels = random_tokens(4, 7), random_types(4, 7), jnp.array([0, 1, 2, 1])
    padded = jnp.pad(tokens, ((0, 0), (0, 2)), constant_values=config.pad_id)
    types = jnp.pad(types, ((0, 0), (0, 2)))
    model = Classifier(config, 3)
    params = initial(model)
    # A bias of the keys shifts all scores of a query, so that its gradient is rounding alone.
    constant = params["encoder"]["layers"]["attention"]["k_proj"].pop("bias")

    def loss(params, tokens, types, labels):
        params = jax.tree.map(lambda leaf: leaf, params)
        params["encoder"]["layers"]["attention"]["k_proj"]["bias"] = constant
        logits = outputs(model, params, tokens, types, jax.random.key(3))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    assert compared(loss, params, padded, types, labels) == KERNELS


def test_bfloat16_keeps_parameters_in_bfloat16_and_stays_near_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", initializer_range=0.05)
    tokens, params = random_tokens(4, 9), initial(Classifier(config, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    rounded = outputs(Classifier(config, 3), params, tokens)
    assert rounded.dtype == jnp.float32
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    precise = outputs(Classifier(TINY, 3), params, tokens)
    assert jnp.linalg.norm(rounded - precise) < 0.05 * jnp.linalg.norm(precise)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "robert"}, "model.architecture must be 'roberta' or 'bert'"),
        ({"num_heads": 5}, "model.num_heads 5 does not divide"),
        ({"hidden_size": 0}, "model.hidden_size must be greater than 0, not 0"),
        ({"classifier_dropout": -0.1}, "model.classifier_dropout must be greater than or equal"),
        ({"pad_id": 61}, "model.pad_id must be a row of the word embedding, not 61"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(TINY, **change)


def test_a_row_longer_than_the_model_is_refused():
    with pytest.raises(InputError, match=r"17 tokens .* model.max_length 16"):
        Encoder(TINY).init(jax.random.key(0), random_tokens(1, 17))
