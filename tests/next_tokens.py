"""Rows that tests make themselves, and their targets."""

import jax.numpy as jnp
import numpy as np


def next_tokens(tokens, segments):
    """The next token of the same segment, -1 where there is none or it is padding."""
    following = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    has_target = (segments == following) & (segments != 0)
    return jnp.where(has_target, jnp.roll(tokens, -1, axis=1), -1)


def random_rows():
    """A batch of 8 rows of 16 tokens below 97, without padding."""
    tokens = np.random.default_rng(0).integers(1, 97, (8, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    return {
        "tokens": tokens,
        "segments": ones,
        "positions": np.arange(16, dtype=np.int32) * ones,
        "targets": next_tokens(tokens, ones),
    }
