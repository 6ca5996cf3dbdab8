"""The language-modelling loss."""

import jax
import jax.numpy as jnp


def next_token_loss(
    logits: jax.Array, tokens: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each next token, summed.

    The target of position t is token t + 1 when both lie in the same segment and that is not 0
    (padding); other positions have no target. A mean over several batches is the sum of the losses
    over the sum of the targets.

    Args:
      logits: float32 (batch, length, vocab).
      tokens: int32 (batch, length).
      segments: int32 (batch, length).

    Returns:
      The sum of the losses in nats and the number of targets, float32 scalars.
    """
    targets = jnp.roll(tokens, -1, axis=1)
    following = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    counted = (segments == following) & (segments != 0)
    # Comparing with every token of the vocabulary fuses into the sum and, backwards, into the
    # gradient of logsumexp; gathering would scatter into an array as large as the logits.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jnp.sum(losses * counted), jnp.sum(counted, dtype=jnp.float32)
