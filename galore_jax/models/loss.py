"""The language-modelling loss, from logits or by chunks of the vocabulary."""

import jax
import jax.numpy as jnp
from jax import lax

# Columns of the head, and so tokens of the vocabulary, that `chunked_next_token_loss` processes
# at a time.
VOCAB_CHUNK = 4096


def next_token_loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each target, summed.

    The mean over several batches is the sum of the losses divided by the sum of the targets.

    Args:
      logits: float32 (batch, length, vocab).
      targets: int32 (batch, length), the token to predict at each position, -1 where there is none.

    Returns:
      The sum of the losses in nats and the number of targets, float32 scalars.
    """
    is_target = targets >= 0
    # A comparison with every token of the vocabulary is fused with the sum and with the gradient of
    # logsumexp; a gather would scatter its gradient into an array as large as the logits.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jnp.sum(losses * is_target), jnp.sum(is_target, dtype=jnp.float32)


def chunked_next_token_loss(
    x: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` of the logits `x @ head`, one chunk of the vocabulary at a time.

    No array of shape (tokens, vocabulary) is formed. The backward pass recomputes the logits, for a
    third more work.

    Args:
      x: activations (batch, length, hidden).
      head: (hidden, vocab).
      targets: as for `next_token_loss`.

    Returns:
      As `next_token_loss`.
    """
    targets = targets.reshape(-1)
    is_target = targets >= 0
    losses = _losses(x.reshape(-1, x.shape[-1]), head, targets)
    return jnp.sum(losses * is_target), jnp.sum(is_target, dtype=jnp.float32)


@jax.custom_vjp
def _losses(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Per-token losses: x (n, hidden), targets (n,) -> float32 (n,)."""
    return _losses_forward(x, head, targets)[0]


def _losses_forward(x, head, targets):
    # A running log-sum-exp over the chunks, and the logits of the targets.
    def add_chunk(carry, index):
        largest, total, chosen = carry
        logits, columns, is_new, _ = _chunk_logits(x, head, index)
        logits = jnp.where(is_new, logits, -jnp.inf)
        larger = jnp.maximum(largest, logits.max(axis=1))
        total = total * jnp.exp(largest - larger) + jnp.exp(logits - larger[:, None]).sum(axis=1)
        is_target = is_new & (columns == targets[:, None])
        return (larger, total, chosen + jnp.where(is_target, logits, 0).sum(axis=1)), None

    zeros = jnp.zeros(len(x), jnp.float32)
    start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    (largest, total, chosen), _ = lax.scan(add_chunk, start, _chunk_indices(head))
    log_sum = largest + jnp.log(total)
    return log_sum - chosen, (x, head, targets, log_sum)


def _losses_backward(residuals, cotangent):
    x, head, targets, log_sum = residuals

    def add_chunk(carry, index):
        x_gradient, head_gradient = carry
        logits, columns, is_new, start = _chunk_logits(x, head, index)
        # The gradient of the logits: softmax minus one-hot targets.
        gradient = jnp.exp(logits - log_sum[:, None]) - (columns == targets[:, None])
        gradient = (gradient * cotangent[:, None]).astype(head.dtype)
        chunk_gradient = _dot(x, gradient, 0, 0).astype(head.dtype)
        head_gradient = lax.dynamic_update_slice_in_dim(
            head_gradient, chunk_gradient, start, axis=1
        )
        chunk = lax.dynamic_slice_in_dim(head, start, gradient.shape[1], axis=1)
        x_gradient += _dot(jnp.where(is_new, gradient, 0), chunk, 1, 1)
        return (x_gradient, head_gradient), None

    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(head)
    (x_gradient, head_gradient), _ = lax.scan(add_chunk, start, _chunk_indices(head))
    return x_gradient.astype(x.dtype), head_gradient, None


_losses.defvjp(_losses_forward, _losses_backward)


def _chunk_indices(head: jax.Array) -> jax.Array:
    return jnp.arange(-(-head.shape[1] // VOCAB_CHUNK))


def _chunk_logits(x: jax.Array, head: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
    """The logits of one chunk of the vocabulary.

    The last chunk overlaps the one before it if the vocabulary is not a multiple of the chunk size.

    Returns:
      Logits (n, chunk), their columns (chunk,), which of these are in no earlier chunk, and the
      first column.
    """
    size = min(VOCAB_CHUNK, head.shape[1])
    start = jnp.minimum(index * size, head.shape[1] - size)
    columns = start + jnp.arange(size)
    logits = _dot(x, lax.dynamic_slice_in_dim(head, start, size, axis=1), 1, 0)
    return logits, columns, columns >= index * size, start


def _dot(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
