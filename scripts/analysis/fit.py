"""Settings with which a training fits a device: a ladder of them, tried one after another."""

import re
from typing import NamedTuple

from analysis.compile_targets import TARGETS
from analysis.gpus import GPUS, MAX_FRACTION
from galore_jax.errors import InputError
from galore_jax.training.config import OPTIMIZERS, Config

SHORTEST = 128  # The ladder does not go below rows of this many tokens.
NARROWER = {"float32": "bfloat16", "bfloat16": "int8", "int8": "int4"}
# Errors of updates, relative to their norm: docs/low-memory.md.
COSTS = {"bfloat16": "", "int8": "", "int4": "an error of 14% in updates"}


class Rung(NamedTuple):
    """A change of the configuration: `section.key=value`, and what it costs besides memory.

    Several settings are divided by spaces.
    """

    setting: str
    cost: str


def next_rung(config: Config) -> Rung | None:
    """The next change that saves memory, the one that costs least first; None: there is none."""
    optimizer, galore, data = config.optimizer, config.optimizer.galore, config.data
    if config.training.accumulation < data.batch_size:
        return Rung(f"training.accumulation={data.batch_size}", "time, if rows are short")
    if f"{optimizer.name}8bit" in OPTIMIZERS:
        return Rung(f"optimizer.name={optimizer.name}8bit", "about 0.1% of the loss")
    if optimizer.has_galore and galore.basis_dtype in NARROWER:
        narrower = NARROWER[galore.basis_dtype]
        return Rung(f"optimizer.galore.basis_dtype={narrower}", COSTS[narrower])
    if not config.training.layerwise and optimizer.adapter is None:
        return Rung("training.layerwise=true", "the time of a forward pass, unless model.remat")
    if config.model.weights == "plain" and optimizer.adapter is None:
        return Rung("model.weights=int8", "about 0.1% of the loss")
    if config.training.layerwise and data.batch_size > 1:
        # Sums of the coordinates of all layers are larger than what micro-batches save.
        settings = "data.batch_size=1 training.accumulation=1"
        if optimizer.clip_norm and optimizer.clip_by == "this_step":
            settings += " optimizer.clip_by=previous_step"
        return Rung(settings, "rows per step")
    if data.sequence_length >= 2 * SHORTEST:
        return Rung(f"data.sequence_length={data.sequence_length // 2}", "context")
    return None


def larger_batches(config: Config, configured: Config) -> list[str]:
    """Settings of ever larger batches, or micro-batches, up to those of a configuration."""
    rows, all_rows = config.data.batch_size, configured.data.batch_size
    if rows < all_rows:
        return [f"data.batch_size={n}" for n in range(rows + 1, all_rows + 1) if all_rows % n == 0]
    numbers = range(config.training.accumulation - 1, configured.training.accumulation - 1, -1)
    return [f"training.accumulation={number}" for number in numbers if rows % number == 0]


def usable_bytes(size: str) -> tuple[str, float]:
    """The target to compile for, and the bytes that JAX can take of it.

    Args:
      size: a key of `TARGETS`, or a size such as 12GB, as the memory of cards is given.

    Raises:
      InputError: it is neither, or no card has so much memory.
    """
    if size in TARGETS:
        return size, TARGETS[size].usable
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?Gi?B", size)
    if not found:
        raise InputError(
            f"--fit is {size!r}: give a size such as 12GB, or one of {', '.join(TARGETS)}."
        )
    memory = float(found[1]) * 2**30
    larger = [name for name, card in GPUS.items() if card.memory >= memory]
    if not larger:
        raise InputError(f"--fit is {size!r}: no card that is known here has so much memory.")
    return min(larger, key=lambda name: GPUS[name].memory), MAX_FRACTION * memory
