"""Configuration: TOML files and `key.sub=value` overrides into frozen dataclasses.

A file has the sections `[model]`, `[data]`, `[optimizer]` and `[training]`; what it leaves out has
the default written here, in `LlamaConfig` or in `DataConfig`. Nothing is guessed: an unknown key, a
value of the wrong type or out of range is an `InputError` that says what would be valid.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galore_jax.data.batches import DataConfig
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.projection import MOMENTS, PROJ_TYPES
from galore_jax.subspace import REFRESH

OPTIMIZERS = ("adamw", "galore_adamw", "galore_adafactor", "galore_lion")


@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: which one, in full or in a low-rank subspace, and its learning rate over time.

    From `rank` to `max_gap` they are arguments of `galore_jax.galore`, of no use to plain AdamW.

    Attributes:
      name: `"adamw"`, `"galore_adamw"`, `"galore_adafactor"` or `"galore_lion"`.
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
    rank: int | float = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    refresh: str = "subspace_iteration"
    moments: str = "keep"
    stagger: bool = False
    lazy_overlap: float | None = None
    max_gap: int | None = None
    stochastic_rounding: bool = True

    def __post_init__(self):
        _require_choice("optimizer.name", self.name, OPTIMIZERS)
        _require_choice("optimizer.proj_type", self.proj_type, PROJ_TYPES)
        _require_choice("optimizer.refresh", self.refresh, tuple(REFRESH))
        _require_choice("optimizer.moments", self.moments, MOMENTS)
        _require_choice("optimizer.gradients", self.gradients, ("projected", "full"))
        _require_choice("optimizer.clip_norm_of", self.clip_norm_of, ("coordinates", "gradients"))
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
        _require(gap >= 1, "optimizer.update_proj_gap", gap, "at least 1")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            holds = value is None or 0 <= value < 1
            _require(holds, f"optimizer.{name}", value, "at least 0 and below 1")
        _require(0 <= self.floor <= 1, "optimizer.floor", self.floor, "between 0 and 1")
        _require(
            self.lazy_overlap is None or 0 < self.lazy_overlap <= 1,
            "optimizer.lazy_overlap",
            self.lazy_overlap,
            "above 0 and at most 1",
        )
        _require(
            self.max_gap is None or self.max_gap >= gap,
            "optimizer.max_gap",
            self.max_gap,
            f"at least optimizer.update_proj_gap, {gap}",
        )

    @property
    def are_projected(self) -> bool:
        """Whether gradients are born projected."""
        return self.name != "adamw" and self.gradients == "projected"


@dataclass(frozen=True)
class TrainingConfig:
    """`[training]`: how long, how often to look and to save, and where.

    Attributes:
      steps: updates in all.
      seed: of the initial parameters and of stochastic rounding.
      accumulation: micro-batches a step; memory for activations shrinks by this factor.
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
        for name in ("evaluate_every", "evaluation_tokens", "checkpoint_every"):
            value = getattr(self, name)
            _require(value >= 0, f"training.{name}", value, "0 or more")
        _require(0 <= self.seed < 2**32, "training.seed", self.seed, "between 0 and 4294967295")
        _require(bool(self.folder), "training.folder", repr(self.folder), "the name of a folder")


@dataclass(frozen=True)
class Config:
    """A whole run: the sections of a configuration file.

    Raises:
      InputError: sections that do not fit together: a sequence longer than the model takes,
        micro-batches that do not divide the batch, a warm-up longer than the training.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        if self.data.sequence_length > self.model.max_length:
            raise InputError(
                f"data.sequence_length is {self.data.sequence_length}, but model.max_length is "
                f"only {self.model.max_length}: shorten the one or raise the other."
            )
        if self.data.batch_size % self.training.accumulation:
            raise InputError(
                f"training.accumulation is {self.training.accumulation}, which does not divide "
                f"data.batch_size, {self.data.batch_size}: choose a divisor."
            )
        if self.optimizer.warmup_steps > self.training.steps:
            raise InputError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but training.steps is "
                f"only {self.training.steps}: shorten the warm-up too."
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, then the overrides, each `section.key=value` with the value as in TOML.

    A value that is no TOML is taken as the text it is, so `optimizer.name=adamw` needs no quotes.
    Without `training.folder`, the run goes to `runs/<the file's name>`.

    Raises:
      InputError: a missing or broken file, an unknown section or key, a value of the wrong type or
        out of range.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [other.name for other in path.parent.glob("*.toml")]
        raise InputError(f"there is no file {path}{_nearest(path.name, others)}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the TOML file of a configuration.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from None
    for section in table:
        _check_section(section, table[section])
    for override in overrides:
        section, key, value = _parse_override(override)
        table.setdefault(section, {})[key] = value
    table.setdefault("training", {}).setdefault("folder", f"runs/{path.stem}")
    return from_dict(table)


def from_dict(table: Mapping[str, Any]) -> Config:
    """Builds a `Config` from `{section: {key: value}}`, as TOML and JSON give it.

    Raises:
      InputError: as `load_config`.
    """
    kinds = typing.get_type_hints(Config)
    sections = {}
    for section, values in table.items():
        _check_section(section, values)
        sections[section] = _build(section, kinds[section], values)
    return Config(**sections)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The inverse of `from_dict`."""
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The resolved configuration as a TOML file; keys that are None are left out: TOML has none."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"section.key": (old, new)}` for every key in which two results of `to_dict` differ."""
    found = {}
    for section in dict.fromkeys([*old, *new]):
        before, after = old.get(section, {}), new.get(section, {})
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                found[f"{section}.{key}"] = (before.get(key), after.get(key))
    return found


def _check_section(section: str, values: Any) -> None:
    sections = [field.name for field in dataclasses.fields(Config)]
    if section not in sections:
        raise InputError(f"there is no section [{section}]{_nearest(section, sections)}")
    if not isinstance(values, Mapping):
        raise InputError(f"{section} is a section: write [{section}], then a line for each key.")


def _nearest(name: str, valid: Sequence[str]) -> str:
    """Ends a sentence about an unknown name with the valid ones near it, or with all of them."""
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(valid)}." if valid else "."


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise InputError(
            f"{override!r} is no override: write section.key=value, as in training.steps=100."
        )
    _check_section(section, {})
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return section, key, value


def _build(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    checked = {}
    for key, value in values.items():
        if key not in names:
            raise InputError(f"{section}.{key} is unknown{_nearest(key, names)}")
        checked[key] = _checked(f"{section}.{key}", value, hints[key])
    return kind(**checked)


def _checked(name: str, value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in choices or (value is None and types.NoneType in choices):
        number = value
    elif float in choices and type(value) is int:
        number = float(value)
    else:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        if float in choices:
            del words[int]
        wanted = " or ".join(words[choice] for choice in choices if choice in words)
        raise InputError(f"{name} must be {wanted}, not {value!r}.")
    if isinstance(number, float) and not math.isfinite(number):
        raise InputError(f"{name} must be finite, not {number}.")
    return number


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted) + '"'
    return repr(value)


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {wanted}, not {value}.")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r} is unknown{_nearest(value, choices)}")
