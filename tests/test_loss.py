"""The loss of a part of the vocabulary at a time is that of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.models import loss
from galore_jax.models.loss import next_token_loss, next_token_loss_of


@pytest.mark.parametrize("vocabulary", [20, 32, 33, 64, 97])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_by_parts_are_those_of_all_logits(monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(loss, "VOCAB_CHUNK", 32)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 10, 16), dtype)
    head = jax.random.normal(keys[1], (16, vocabulary), dtype)
    tokens = jax.random.randint(keys[2], (3, 10), 0, vocabulary)
    segments = jnp.ones((3, 10), jnp.int32).at[:, 6:].set(2).at[-1, 8:].set(0)

    def by_parts(x, head):
        return next_token_loss_of(x, head, tokens, segments)

    def whole(x, head):
        logits = jnp.einsum("bth,hv->btv", x, head, preferred_element_type=jnp.float32)
        return next_token_loss(logits, tokens, segments)

    found, wanted = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, head) for f in (by_parts, whole)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one.dtype == dtype
        one, other = (np.asarray(leaf, np.float32) for leaf in (one, other))
        # In bfloat16 the gradient of the logits is rounded once more, by half of 1/128 at most.
        slack = 1e-5 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(one, other, rtol=0, atol=slack * np.abs(other).max())
