"""The sections `[optimizer]` and `[training]` of a configuration, and what their values may be."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from galore_jax.errors import InputError
from galore_jax.ops.implementation import IMPLEMENTATIONS
from galore_jax.subspace.basis import MAX_GAP
from galore_jax.subspace.methods import REFRESH
from galore_jax.subspace.projection import MOMENTS, PROJ_TYPES

OPTIMIZERS = (
    "adamw",
    "adamw8bit",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_adafactor",
    "galore_lion",
)
BASIS_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: which one, in full or in a low-rank subspace, and its learning rate over time.

    From `rank` to `max_gap` they are arguments of `galore_jax.galore`, of no use to plain AdamW.

    Attributes:
      name: `"adamw"`, `"galore_adamw"`, either of them with `8bit` behind it for moments in 8 bits,
        `"galore_adafactor"` or `"galore_lion"`.
      learning_rate: the peak, reached after the warm-up.
      warmup_steps: updates of linear warm-up.
      floor: the last update's learning rate, as a fraction of the peak.
      b1: decay of the first moment, which Adafactor does not keep at 0; Lion's weight of it.
      b2: decay of AdamW's second moment, None: 0.999; of Lion's only moment, None: 0.99.
      eps: added to the root of the second moment (AdamW).
      weight_decay: decoupled, in the full space, times the learning rate.
      gradients: with GaLore, `"projected"`: only coordinates are ever computed, and sketches
        refresh the bases; or `"full"`.
      clip_norm: the largest global norm; 0 does not clip. GaLore's clip leaves numbers that are not
        finite out of the norm.
      clip_norm_of: what GaLore clips: `"coordinates"`, with the unprojected gradients; or full
        `"gradients"`.
      clip_by: how `training.layerwise` knows the norm before it updates the first layer: by a
        `"first_pass"` over all layers, exact, for nearly twice the time; or from the
        `"previous_step"`, free of cost, so that the first step is not clipped and an outlier
        clips the step after it.
      rank: columns of each basis, or the fraction of a matrix's smaller side that they are.
      update_proj_gap: steps between two refreshes of the bases.
      scale: factor on the lifted update.
      proj_type: which side is projected: `"std"`, `"reverse_std"`, `"left"`, `"right"`, `"full"`.
      refresh: how a basis is found: `"subspace_iteration"`, `"eigh"`, `"svd"` or `"random"`.
      moments: what a refresh does with the moments: `"keep"`, `"reset"` or `"rotate"`.
      stagger: spread the refreshes over the gap.
      lazy_overlap: the overlap of a new subspace with the old one from which its gap doubles; None:
        no gap does.
      max_gap: the bound of a doubled gap; None: 8 times `update_proj_gap`.
      basis_dtype: in which the bases are stored: `"float32"`, `"bfloat16"` or, in block-wise codes,
        `"int8"`.
      implementation: of 8-bit moments and of the lift: `"xla"`, or on NVIDIA GPUs `"pallas"`.
      stochastic_rounding: round bfloat16 parameters up or down at random, so that their expectation
        is exact; rounding to the nearest loses every update below 1/512 of its weight.
    """

    name: str = "galore_adamw"
    learning_rate: float = 0.01
    warmup_steps: int = 1000
    floor: float = 0.1
    b1: float = 0.9
    b2: float | None = None
    eps: float = 1e-6
    weight_decay: float = 0.0
    gradients: str = "projected"
    clip_norm: float = 0.0
    clip_norm_of: str = "coordinates"
    clip_by: str = "first_pass"
    rank: int | float = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    refresh: str = "subspace_iteration"
    moments: str = "keep"
    stagger: bool = False
    lazy_overlap: float | None = None
    max_gap: int | None = None
    basis_dtype: str = "float32"
    implementation: str = "xla"
    stochastic_rounding: bool = True

    def __post_init__(self):
        _require_choice("optimizer.name", self.name, OPTIMIZERS)
        _require_choice("optimizer.proj_type", self.proj_type, PROJ_TYPES)
        _require_choice("optimizer.refresh", self.refresh, tuple(REFRESH))
        _require_choice("optimizer.moments", self.moments, MOMENTS)
        _require_choice("optimizer.gradients", self.gradients, ("projected", "full"))
        _require_choice("optimizer.clip_norm_of", self.clip_norm_of, ("coordinates", "gradients"))
        _require_choice("optimizer.clip_by", self.clip_by, ("first_pass", "previous_step"))
        _require_choice("optimizer.basis_dtype", self.basis_dtype, BASIS_DTYPES)
        _require_choice("optimizer.implementation", self.implementation, IMPLEMENTATIONS)
        if self.are_projected and self.refresh in ("eigh", "svd"):
            raise InputError(
                f'optimizer.refresh = "{self.refresh}" needs full gradients: set '
                'optimizer.gradients = "full", or optimizer.refresh = "subspace_iteration".'
            )
        if self.are_projected and self.clip_norm and self.clip_norm_of == "gradients":
            raise InputError(
                'optimizer.clip_norm_of = "gradients" needs full gradients: set '
                'optimizer.gradients = "full", or optimizer.clip_norm_of = "coordinates".'
            )
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "positive")
        _require(self.scale > 0, "optimizer.scale", self.scale, "positive")
        _require(self.eps > 0, "optimizer.eps", self.eps, "positive")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}", value, "0 or more")
        _require(
            self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank < 1,
            "optimizer.rank",
            self.rank,
            "a whole number from 1 on or a fraction between 0 and 1",
        )
        gap = self.update_proj_gap
        in_range = f"between 1 and {MAX_GAP}"
        _require(1 <= gap <= MAX_GAP, "optimizer.update_proj_gap", gap, in_range)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            # The nearest float32 counts: with a decay of 1, bias corrections divide by 0.
            holds = value is None or 0 <= float(np.float32(value)) < 1
            _require(holds, f"optimizer.{name}", value, "at least 0 and below 1 in float32")
        _require(0 <= self.floor <= 1, "optimizer.floor", self.floor, "between 0 and 1")
        _require(
            self.lazy_overlap is None or 0 < self.lazy_overlap <= 1,
            "optimizer.lazy_overlap",
            self.lazy_overlap,
            "above 0 and at most 1",
        )
        _require(
            self.max_gap is None or gap <= self.max_gap <= MAX_GAP,
            "optimizer.max_gap",
            self.max_gap,
            f"at least optimizer.update_proj_gap, {gap}, and at most {MAX_GAP}",
        )

    @property
    def has_galore(self) -> bool:
        """Whether it works in low-rank subspaces."""
        return self.name.startswith("galore_")

    @property
    def are_projected(self) -> bool:
        """Whether the backward pass projects gradients."""
        return self.has_galore and self.gradients == "projected"


@dataclass(frozen=True)
class TrainingConfig:
    """`[training]`: how long, how often to look and to save, and where.

    Attributes:
      steps: updates in all.
      seed: of the initial parameters and of stochastic rounding.
      accumulation: micro-batches a step; memory for activations shrinks by this factor.
      layerwise: update each layer as soon as the backward pass has its gradient, so that no more
        than one layer's gradient and update exist: see layerwise.py.
      evaluate_every: updates between two evaluations; 0 evaluates at the end only.
      evaluation_tokens: targets to evaluate on; 0 takes the whole validation split.
      checkpoint_every: updates between two checkpoints; 0 saves at the end only.
      keep_checkpoints: how many of the latest checkpoints stay on disk.
      log_every: updates between two looks at the device: each brings the losses of all its steps.
      folder: of the run: config.toml, metrics.jsonl, checkpoints/, curves.png, summary.json.
      diagnostics: with GaLore, measure `captured_energy` and `update_ratio` too at every step: see
        diagnostics.py.
      tensorboard: write TensorBoard events too, into the folder's tensorboard/.
      bigram: at the end, also fit a bigram model to the tokens the run saw, and print its loss.
    """

    steps: int = 10_000
    seed: int = 0
    accumulation: int = 1
    layerwise: bool = False
    evaluate_every: int = 1000
    evaluation_tokens: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    folder: str = "runs/run"
    diagnostics: bool = False
    tensorboard: bool = False
    bigram: bool = False

    def __post_init__(self):
        for name in ("steps", "accumulation", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"training.{name}", value, "at least 1")
        _require(self.steps < 2**31, "training.steps", self.steps, "below 2147483648")
        for name in ("evaluate_every", "evaluation_tokens", "checkpoint_every"):
            value = getattr(self, name)
            _require(value >= 0, f"training.{name}", value, "0 or more")
        _require(0 <= self.seed < 2**32, "training.seed", self.seed, "between 0 and 4294967295")
        if self.layerwise and self.diagnostics:
            raise InputError(
                "training.diagnostics compares whole gradients, which training.layerwise never "
                "has: turn one of them off."
            )
        if self.layerwise and self.accumulation > 1:
            raise InputError(
                "training.layerwise is done with a layer's gradient before the next micro-batch: "
                "set training.accumulation = 1, or training.layerwise = false, which accumulates "
                "coordinates."
            )
        _require(bool(self.folder), "training.folder", repr(self.folder), "the name of a folder")


def nearest(name: str, valid: Sequence[str]) -> str:
    """Ends a sentence about an unknown name with the valid ones near it, or with all of them."""
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(valid)}." if valid else "."


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {wanted}, not {value}.")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r} is unknown{nearest(value, choices)}")
