"""Configuration files: TOML and `section.key=value` overrides to a `Config`, and back.

A file has the sections `[model]`, `[data]`, `[optimizer]`, `[training]` and `[mesh]`; a missing key
has the default of the section's dataclass. An unknown key, or a value of the wrong type or out of
range, is an `InputError` that says what would be valid.

For comparisons a file may also have tables `[compare.LABEL]`. Each is an optimizer under that
label: the settings in which it differs from `[optimizer]`. Its `name` is the label if it gives
none, so the first line of this example is complete:

    [compare.adamw]

    [compare.rank8]
    name = "galore_adamw"
    rank = 8
    matrix_rate = 0.5
"""

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galore_jax.errors import InputError, suggestion
from galore_jax.models.llama import LlamaConfig
from galore_jax.training.config import OPTIMIZERS, Config

# The dataclass of a configuration: that of pre-training, unless another is given.
AnyConfig = typing.TypeVar("AnyConfig")
# The table of the optimizers to compare, and those that are compared if it is missing.
COMPARE = "compare"
COMPARED = ("adamw", "muon", "galore_adamw")
# What the label of an optimizer consists of: it is part of a folder's name and of Markdown tables.
_LABEL = re.compile(r"\w[\w .+=-]*")
# The settings of a model that `to_toml` writes whatever their values.
_ALWAYS_WRITTEN = {
    field.name for field in dataclasses.fields(LlamaConfig) if field.default is not None
}

# The range of normal float32 numbers: devices flush smaller ones to 0.
_SMALLEST, _LARGEST = (
    float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max)
)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[AnyConfig] = Config
) -> AnyConfig:
    """Reads a TOML file and applies overrides, each `section.key=value` with a TOML value.

    A value that is not TOML is taken as text, so `optimizer.name=adamw` needs no quotes, and
    neither does text that would be another value, as in `training.folder=2026`.
    `training.folder` defaults to `runs/<name of the file>`. The configuration is of the dataclass
    `kind`, whose attributes are the sections. For a `Config`, `model.checkpoint` stands for all
    that the folder determines, the settings of the model and the tokenizer. As an override it takes
    precedence over the file, and other overrides over it; in a file it determines what the file
    leaves out.

    Raises:
      InputError: the file or the checkpoint is missing or damaged, a section or key is unknown, or
        a value has the wrong type or is out of range.
    """
    table = _read(path)
    table.pop(COMPARE, None)
    return _config(path, table, overrides, kind)


def load_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    names: Sequence[str] = (),
    kind: type[AnyConfig] = Config,
) -> dict[str, AnyConfig]:
    """Reads the optimizers to compare from a TOML file.

    Args:
      path: the file.
      overrides: as for `load_config`; the tables of the optimizers take precedence over them.
      names: which ones, by the label of their table or, without a table, by `optimizer.name`.
        Empty: all tables of the file; if there is none, `COMPARED`.
      kind: as for `load_config`.

    Returns:
      By label, the configurations, which differ in `[optimizer]` alone.

    Raises:
      InputError: as for `load_config`; an unknown or unusable label, an unusable table, or an
        override of a setting that every table has.
    """
    table = _read(path)
    tables = table.pop(COMPARE, {})
    base = to_dict(_config(path, table, overrides, kind))
    configs, own = {}, []
    for label in names or tables or COMPARED:
        if label not in tables and label not in OPTIMIZERS:
            raise InputError(
                f"there is no optimizer {label!r} to compare"
                f"{suggestion(label, dict.fromkeys([*tables, *OPTIMIZERS]))}"
            )
        settings = tables.get(label, {})
        if not _LABEL.fullmatch(label) or not isinstance(settings, Mapping):
            raise InputError(
                f"[{COMPARE}.{label}] is not an optimizer to compare: write [{COMPARE}.LABEL] with "
                "letters, digits, spaces and . + = - in the label, then settings of [optimizer]."
            )
        optimizer = {"name": label, **settings}
        own.append(set(optimizer))
        try:
            configs[label] = from_dict(base | {"optimizer": base["optimizer"] | optimizer}, kind)
        except InputError as error:
            raise InputError(f"[{COMPARE}.{label}]: {error}") from None
    for override in overrides:
        section, key, _ = _parse_override(override, kind)
        if section == "optimizer" and key in set.intersection(*own):
            raise InputError(
                f"{override} has no effect: each optimizer that is compared has its own {key}, by "
                f"its table [{COMPARE}.LABEL] in {path}."
            )
    return configs


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        others = [other.name for other in path.parent.glob("*.toml")]
        raise InputError(f"there is no file {path}{suggestion(path.name, others)}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the TOML file of a configuration.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # bad TOML or UTF-8, or a number of 5,000 digits
        raise InputError(f"{path} is not a TOML file: {error}.") from None
    if not isinstance(table.get(COMPARE, {}), Mapping):
        raise InputError(f"{COMPARE} is a table: write [{COMPARE}.LABEL] for each optimizer.")
    return table


def _config(
    path: str | Path, table: dict[str, Any], overrides: Sequence[str], kind: type[AnyConfig]
) -> AnyConfig:
    for section in table:
        _check_section(section, table[section], kind)
    parsed = [_parse_override(override, kind) for override in overrides]
    if kind is Config:
        _add_checkpoint(table, parsed)
    for section, key, value in parsed:
        table.setdefault(section, {})[key] = value
    table.setdefault("training", {}).setdefault("folder", f"runs/{Path(path).stem}")
    return from_dict(table, kind)


def _add_checkpoint(table: dict[str, Any], overrides: Sequence[tuple[str, str, Any]]) -> None:
    """Adds what the folder of `model.checkpoint` determines to the settings of a file."""
    given = [value for *name, value in overrides if name == ["model", "checkpoint"]]
    in_file = table.get("model", {})
    folder = given[-1] if given else in_file.get("checkpoint")
    # The file of a run leaves out nothing, and the folder may be gone.
    is_complete = not given and set(in_file) >= _ALWAYS_WRITTEN
    if not isinstance(folder, str) or not folder or is_complete:
        return
    settings = _settings_of_checkpoint(folder)
    named = [settings["data"], dict(name[1:] for name in overrides if name[0] == "data")]
    if not given:  # Otherwise the file's is that of another model.
        named.append(table.get("data", {}))
    if not any("tokenizer" in keys for keys in named):
        raise InputError(
            f"{folder} has no tokenizer.json or tokenizer.model: give the tokenizer of this model "
            "as data.tokenizer, or have transformers write it, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    for section, values in settings.items():
        written = table.get(section, {})
        table[section] = {**written, **values} if given else {**values, **written}


def _settings_of_checkpoint(folder: str) -> dict[str, dict[str, Any]]:
    """By section, the settings that a model of Hugging Face's transformers determines."""
    from galore_jax.interop.config_json import read_config  # needs an extra of its own
    from galore_jax.interop.tokenizer_files import find_tokenizer

    model = dataclasses.asdict(read_config(Path(folder)))
    for key in ("remat", "checkpoint"):
        del model[key]
    tokenizer = find_tokenizer(Path(folder))
    return {"model": model, "data": {} if tokenizer is None else {"tokenizer": str(tokenizer)}}


def from_dict(table: Mapping[str, Any], kind: type[AnyConfig] = Config) -> AnyConfig:
    """Builds a configuration from `{section: {key: value}}`, as read from TOML or JSON.

    Raises:
      InputError: a section or key is unknown, or a value has the wrong type or is out of range.
    """
    kinds = typing.get_type_hints(kind)
    sections = {}
    for section, values in table.items():
        _check_section(section, values, kind)
        sections[section] = _build(section, kinds[section], values)
    return kind(**sections)


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The inverse of `from_dict`."""
    return dataclasses.asdict(config)


def to_toml(config: Any) -> str:
    """The configuration as the text of a TOML file, without the keys that are None."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"section.key": (old, new)}` for each key in which two results of `to_dict` differ."""
    changed = {}
    for section in dict.fromkeys([*old, *new]):
        before, after = old.get(section, {}), new.get(section, {})
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                changed[f"{section}.{key}"] = (before.get(key), after.get(key))
    return changed


def _check_section(section: str, values: Any, kind: Any) -> None:
    sections = [field.name for field in dataclasses.fields(kind)]
    if section not in sections:
        raise InputError(f"there is no section [{section}]{suggestion(section, sections)}")
    if not isinstance(values, Mapping):
        raise InputError(f"{section} is a section: write [{section}], then a line for each key.")


def _parse_override(override: str, kind: type) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise InputError(
            f"{override!r} is not an override: write section.key=value, as in training.steps=100."
        )
    _check_section(section, {}, kind)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    is_text = typing.get_type_hints(typing.get_type_hints(kind)[section]).get(key) is str
    return section, key, text if is_text and not isinstance(value, str) else value


def _build(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    checked = {}
    for key, value in values.items():
        if key not in names:
            raise InputError(f"{section}.{key} is unknown{suggestion(key, names)}")
        checked[key] = _checked(f"{section}.{key}", value, hints[key])
    return kind(**checked)


def _checked(name: str, value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in choices or (value is None and types.NoneType in choices):
        number = value
    elif float in choices and type(value) is int:
        number = float(value) if abs(value) <= _LARGEST else math.inf
    else:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        if float in choices:
            del words[int]
        wanted = " or ".join(words[choice] for choice in choices if choice in words)
        raise InputError(f"{name} must be {wanted}, not {value!r}.")
    if isinstance(number, float) and not math.isfinite(number):
        raise InputError(f"{name} must be finite, not {number}.")
    if isinstance(number, float) and number and not _SMALLEST <= abs(number) <= _LARGEST:
        raise InputError(
            f"{name} is {number}: it must be 0 or between {_SMALLEST:.2g} and {_LARGEST:.2g} in "
            "size, as the training computes in float32."
        )
    if isinstance(number, str) and not _is_writable(number):
        raise InputError(f"{name} must be text in UTF-8 without a null character, not {number!a}.")
    return number


def _is_writable(text: str) -> bool:
    """Whether a file can contain the text, and have it as its name.

    Arguments of the command line may hold bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted) + '"'
    return repr(value)
