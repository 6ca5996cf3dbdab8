"""The language-modelling loss, of logits or without ever holding all of them."""

import jax
import jax.numpy as jnp
from jax import lax

# Columns of the head whose logits `next_token_loss_of` computes at a time.
VOCAB_CHUNK = 4096


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
    targets, counted = _targets(tokens, segments)
    # Comparing with every token of the vocabulary fuses into the sum and, backwards, into the
    # gradient of logsumexp; gathering would scatter into an array as large as the logits.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jnp.sum(losses * counted), jnp.sum(counted, dtype=jnp.float32)


def next_token_loss_of(
    x: jax.Array, head: jax.Array, tokens: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` of the logits `x @ head`, a part of the vocabulary at a time.

    No array of (tokens, vocabulary) exists. The backward pass computes the logits again, a third
    more work than to keep them.

    Args:
      x: activations (batch, length, hidden).
      head: (hidden, vocab).
      tokens: int32 (batch, length).
      segments: int32 (batch, length).

    Returns:
      As `next_token_loss`.
    """
    targets, counted = _targets(tokens, segments)
    losses = _losses(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1))
    return jnp.sum(losses * counted.reshape(-1)), jnp.sum(counted, dtype=jnp.float32)


def _targets(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each position the next token, and whether it is a target."""
    following = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    return jnp.roll(tokens, -1, axis=1), (segments == following) & (segments != 0)


@jax.custom_vjp
def _losses(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Of tokens (n, hidden) and their targets (n,), float32 (n,)."""
    return _losses_forward(x, head, targets)[0]


def _losses_forward(x, head, targets):
    def add(carry, n):
        largest, total, chosen = carry
        logits, columns, is_new, _ = _logits(x, head, n)
        logits = jnp.where(is_new, logits, -jnp.inf)
        larger = jnp.maximum(largest, logits.max(axis=1))
        total = total * jnp.exp(largest - larger) + jnp.exp(logits - larger[:, None]).sum(axis=1)
        is_target = is_new & (columns == targets[:, None])
        return (larger, total, chosen + jnp.where(is_target, logits, 0).sum(axis=1)), None

    zeros = jnp.zeros(len(x), jnp.float32)
    start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    (largest, total, chosen), _ = lax.scan(add, start, _parts(head))
    log_sum = largest + jnp.log(total)
    return log_sum - chosen, (x, head, targets, log_sum)


def _losses_backward(saved, upstream):
    x, head, targets, log_sum = saved

    def add(carry, n):
        x_gradient, head_gradient = carry
        logits, columns, is_new, start = _logits(x, head, n)
        share = jnp.exp(logits - log_sum[:, None]) - (columns == targets[:, None])
        share = (share * upstream[:, None]).astype(head.dtype)
        own = _dot(x, share, 0, 0).astype(head.dtype)
        head_gradient = lax.dynamic_update_slice_in_dim(head_gradient, own, start, axis=1)
        part = lax.dynamic_slice_in_dim(head, start, share.shape[1], axis=1)
        return (x_gradient + _dot(jnp.where(is_new, share, 0), part, 1, 1), head_gradient), None

    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(head)
    (x_gradient, head_gradient), _ = lax.scan(add, start, _parts(head))
    return x_gradient.astype(x.dtype), head_gradient, None


_losses.defvjp(_losses_forward, _losses_backward)


def _parts(head: jax.Array) -> jax.Array:
    return jnp.arange(-(-head.shape[1] // VOCAB_CHUNK))


def _logits(x: jax.Array, head: jax.Array, part: jax.Array) -> tuple[jax.Array, ...]:
    """Logits of a part of the vocabulary, its columns, which are in no part before, its first.

    The last part overlaps with the one before it where the vocabulary is no multiple.
    """
    size = min(VOCAB_CHUNK, head.shape[1])
    start = jnp.minimum(part * size, head.shape[1] - size)
    columns = start + jnp.arange(size)
    logits = _dot(x, lax.dynamic_slice_in_dim(head, start, size, axis=1), 1, 0)
    return logits, columns, columns >= part * size, start


def _dot(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
