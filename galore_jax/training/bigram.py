"""A bigram model of the training tokens: a baseline for the validation loss."""

from collections.abc import Iterable

import numpy as np

from galore_jax.errors import InputError
from galore_jax.training.evaluate import take_targets, target_pairs
from galore_jax.training.state import Batch

MAX_VOCABULARY = 8192


def check_bigram_vocabulary(vocabulary: int) -> None:
    """Raises an `InputError` if the table of a bigram model's counts would be too large."""
    if vocabulary > MAX_VOCABULARY:
        raise InputError(
            f"training.bigram counts pairs of at most {MAX_VOCABULARY} tokens, but the tokenizer "
            f"has {vocabulary}: set training.bigram=false."
        )


def bigram_loss(
    training: Iterable[Batch], validation: Iterable[Batch], vocabulary: int, limit: int = 0
) -> float:
    """The loss per validation target, in nats, of a bigram model of the training tokens.

    Counts of pairs within a document are smoothed by Witten and Bell's interpolation (IEEE
    Transactions on Information Theory 37, 1991), which has nothing to tune: with c(a) the number of
    pairs that start with a, and d(a) the number of distinct tokens that follow it,
    `p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a))`. p(b) is smoothed with the uniform
    distribution in the same way.

    Args:
      training: batches of (B, T) arrays.
      validation: batches of (B, T) arrays.
      vocabulary: number of tokens, at most 8,192.
      limit: number of validation targets, as `training.evaluation_tokens`; 0 takes all.

    Raises:
      InputError: the vocabulary is larger.
    """
    check_bigram_vocabulary(vocabulary)
    # Counts of pairs, and the smoothed unigram distribution.
    pairs = np.zeros((vocabulary, vocabulary), np.uint32)
    for batch in training:
        np.add.at(pairs, target_pairs(batch), 1)
    firsts = pairs.sum(1, dtype=np.float64)
    followers = np.count_nonzero(pairs, axis=1)
    seconds = pairs.sum(0, dtype=np.float64)
    seen = np.count_nonzero(seconds)
    unigram = (seconds + seen / vocabulary) / (seconds.sum() + seen)
    # The loss on the validation targets.
    losses, targets = 0.0, 0
    for batch in take_targets(validation, limit):
        first, second = target_pairs(batch)
        weight = firsts[first] + followers[first]
        joint = pairs[first, second] + followers[first] * unigram[second]
        known = weight > 0
        probability = np.where(known, joint / np.where(known, weight, 1), unigram[second])
        losses -= np.log(probability).sum()
        targets += first.size
    return losses / targets
