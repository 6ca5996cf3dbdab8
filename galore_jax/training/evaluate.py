"""Losses on the held-out split: the model's, as the reference would count it, and a bigram's."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_jax.errors import InputError
from galore_jax.grads.micro_batches import split
from galore_jax.training.config import Config
from galore_jax.training.state import Batch
from galore_jax.training.step import batch_loss

BIGRAM_VOCABULARY = 8192


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      loss: the sum of the losses over the number of targets, in nats.
      reference_loss: the sum of the batches' mean losses over the number of batches *plus one*. The
        reference repository's evaluator counts so, and published tables hold exp of it; it is
        too low by a factor of N / (N + 1), and batches weigh the same however many targets
        they hold.
      targets: how many tokens were predicted.
    """

    loss: float
    reference_loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def reference_perplexity(self) -> float:
        """exp(reference_loss): compare this one with published tables, and no other."""
        return perplexity(self.reference_loss)


def make_evaluate(config: Config) -> Callable[[Any, Iterable[Batch]], Evaluation]:
    """A function of the parameters and batches that returns their `Evaluation`.

    Batches go through the model in the training's micro-batches. It stops after the batch that
    completes `training.evaluation_tokens`, where that is not 0.

    Raises (the function returned):
      InputError: there is not one target among the batches.
    """
    loss = functools.partial(batch_loss, config.model)

    @jax.jit
    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        parts = split(batch, config.training.accumulation)
        losses, targets = lax.map(functools.partial(loss, params), parts)
        return jnp.sum(losses), jnp.sum(targets)

    def evaluate(params: Any, batches: Iterable[Batch]) -> Evaluation:
        limited = _until(batches, config.training.evaluation_tokens)
        results = np.array(jax.device_get([sums(params, batch) for batch in limited]), np.float64)
        losses, targets = results.reshape(-1, 2).T
        if not targets.sum():
            raise InputError(
                "there is nothing to evaluate on: the validation split of "
                f"data.source = {config.data.source!r} holds no two tokens in one row."
            )
        means = losses[targets > 0] / targets[targets > 0]
        return Evaluation(
            loss=losses.sum() / targets.sum(),
            reference_loss=means.sum() / (means.size + 1),
            targets=int(targets.sum()),
        )

    return evaluate


def check_bigram_vocabulary(vocabulary: int) -> None:
    """Raises an `InputError` where a bigram's table of counts would not fit."""
    if vocabulary > BIGRAM_VOCABULARY:
        raise InputError(
            f"training.bigram counts pairs of at most {BIGRAM_VOCABULARY} tokens and the tokenizer "
            f"has {vocabulary}: set training.bigram=false."
        )


def bigram_loss(
    training: Iterable[Batch], validation: Iterable[Batch], vocabulary: int, limit: int = 0
) -> float:
    """The loss of a bigram model of the training tokens on the validation targets, in nats.

    Counts of pairs inside a document are smoothed by Witten and Bell's interpolation (IEEE
    Transactions on Information Theory 37, 1991), which has nothing to tune: with c(a) the number of
    pairs that begin with a, and d(a) that of the different tokens that follow it,
    `p(b | a) = (c(a, b) + d(a) p(b)) / (c(a) + d(a))`. p(b) is smoothed with the uniform
    distribution in the same way.

    Args:
      training: batches of (B, T) arrays.
      validation: batches of (B, T) arrays.
      vocabulary: tokens are below it; at most 8,192.
      limit: stop after as many validation targets, as `training.evaluation_tokens`; 0: take all.

    Raises:
      InputError: a larger vocabulary: the table of counts would not fit.
    """
    check_bigram_vocabulary(vocabulary)
    pairs = np.zeros((vocabulary, vocabulary), np.uint32)
    for batch in training:
        np.add.at(pairs, _pairs(batch), 1)
    firsts = pairs.sum(1, dtype=np.float64)
    followers = np.count_nonzero(pairs, axis=1)
    seconds = pairs.sum(0, dtype=np.float64)
    seen = np.count_nonzero(seconds)
    unigram = (seconds + seen / vocabulary) / (seconds.sum() + seen)
    losses, targets = 0.0, 0
    for batch in _until(validation, limit):
        first, second = _pairs(batch)
        weight = firsts[first] + followers[first]
        joint = pairs[first, second] + followers[first] * unigram[second]
        known = weight > 0
        probability = np.where(known, joint / np.where(known, weight, 1), unigram[second])
        losses -= np.log(probability).sum()
        targets += first.size
    return losses / targets


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _pairs(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that have a target, and their targets."""
    tokens, segments = batch["tokens"], batch["segments"]
    counted = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    return tokens[:, :-1][counted], tokens[:, 1:][counted]


def _until(batches: Iterable[Batch], targets: int) -> Iterator[Batch]:
    """Batches up to the one that completes the number of targets; all of them for 0."""
    seen = 0
    for batch in batches:
        yield batch
        seen += _pairs(batch)[0].size
        if targets and seen >= targets:
            return
