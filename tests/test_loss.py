"""The loss computed in chunks of the vocabulary equals the loss from all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from next_tokens import next_tokens

from galore_jax.models import loss
from galore_jax.models.loss import chunked_next_token_loss, next_token_loss


@pytest.mark.parametrize("vocabulary", [20, 32, 33, 64, 97])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunked_values_and_gradients_equal_those_from_all_logits(monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(loss, "VOCAB_CHUNK", 32)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 10, 16), dtype)
    head = jax.random.normal(keys[1], (16, vocabulary), dtype)
    tokens = jax.random.randint(keys[2], (3, 10), 0, vocabulary)
    segments = jnp.ones((3, 10), jnp.int32).at[:, 6:].set(2).at[-1, 8:].set(0)
    targets = next_tokens(tokens, segments)

    def chunked(x, head):
        return chunked_next_token_loss(x, head, targets)

    def unchunked(x, head):
        logits = jnp.einsum("bth,hv->btv", x, head, preferred_element_type=jnp.float32)
        return next_token_loss(logits, targets)

    actual, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, head) for f in (chunked, unchunked)
    )
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.dtype == dtype
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        # In bfloat16 the gradient of the logits is rounded once more, by half of 1/128 at most.
        slack = 1e-5 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(one, other, rtol=0, atol=slack * np.abs(other).max())
