"""Configuration files: TOML and `section.key=value` overrides to a `Config`, and back.

A missing key has the default of its section's dataclass, which refuses what is not valid.

For comparisons a file may also have tables `[compare.LABEL]`. Each is an optimizer under that
label: the settings in which it differs from `[optimizer]`. Its `name` is the label if it gives
none, so the first line of this example is complete:

    [compare.adamw]

    [compare.rank8]
    name = "galore_adamw"
    galore.rank = 8
    matrix_rate = 0.5
"""

import contextlib
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galore_jax.errors import InputError, suggestion
from galore_jax.training.config import OPTIMIZERS, Config

# The dataclass of a configuration: that of pre-training, unless another is given.
AnyConfig = typing.TypeVar("AnyConfig")
# The table of the optimizers to compare, and those that are compared if it is missing.
COMPARE = "compare"
COMPARED = ("adamw", "muon", "galore_adamw")
# What the label of an optimizer consists of: it is part of a folder's name and of Markdown tables.
_LABEL = re.compile(r"\w[\w .+=-]*")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[AnyConfig] = Config
) -> AnyConfig:
    """Reads a TOML file and applies overrides, each `section.key=value` with a TOML value.

    A value that is not TOML is taken as text, so `optimizer.name=adamw` needs no quotes.
    `training.folder` defaults to `runs/<name of the file>`. For a `Config` the override
    `model.checkpoint` also replaces the file's model and tokenizer by those of the folder.

    Raises:
      InputError: the file or the checkpoint is missing or damaged, a section or key is unknown, or
        a value has the wrong type or is out of range.
    """
    table = _read(path)
    table.pop(COMPARE, None)
    return kind(**_complete(path, table, overrides, kind))


def load_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    names: Sequence[str] = (),
    kind: type[AnyConfig] = Config,
) -> dict[str, AnyConfig]:
    """Reads the optimizers to compare from a TOML file.

    Args:
      path, overrides, kind: as for `load_config`; the tables take precedence over overrides.
      names: which ones, by the label of their table or, without a table, by `optimizer.name`.
        Empty: all tables of the file; if there is none, `COMPARED`.

    Returns:
      By label, the configurations, which differ in `[optimizer]` alone.

    Raises:
      InputError: as for `load_config`; an unknown or unusable label, an unusable table, or an
        override of a setting that every table has.
    """
    table = _read(path)
    tables = table.pop(COMPARE, {})
    if not isinstance(tables, Mapping):
        raise InputError(f"{COMPARE} is a table: write [{COMPARE}.LABEL] for each optimizer.")
    base = _complete(path, table, overrides, kind)
    kind(**base)  # what is wrong with it is not due to a table
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
        optimizer = {"optimizer": {"name": label, **settings}}
        own.append(set(_flat(optimizer)))
        try:
            configs[label] = kind(**_merged(base, optimizer))
        except InputError as error:
            raise InputError(f"[{COMPARE}.{label}]: {error}") from None
    for override in overrides:
        for key in set.intersection(*own) & set(_flat(_parsed(override))):
            raise InputError(
                f"{override} has no effect: each optimizer that is compared has its own {key}, by "
                f"its table [{COMPARE}.LABEL] in {path}."
            )
    return configs


def changed(config: AnyConfig, **sections: Mapping[str, Any]) -> AnyConfig:
    """The configuration with `section={key: value}` in place of its own values."""
    return type(config)(**_merged(asdict(typing.cast(Any, config)), sections))


def to_toml(config: Any) -> str:
    """The configuration as the text of a TOML file, without the keys that are None."""
    return "\n".join(_lines(asdict(config)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"section.key": (old, new)}` for each key in which two nested tables differ."""
    before, after = _flat(old), _flat(new)
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: (one, other) for key, (one, other) in pairs.items() if one != other}


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        others = [other.name for other in path.parent.glob("*.toml")]
        raise InputError(f"there is no file {path}{suggestion(path.name, others)}") from None
    except (ValueError, RecursionError) as error:  # bad TOML or UTF-8, or a number of 5,000 digits
        raise InputError(f"{path} is not a TOML file: {error}.") from None


def _complete(
    path: str | Path, table: dict[str, Any], overrides: Sequence[str], kind: type
) -> dict[str, Any]:
    """The file with its overrides, the settings of a checkpoint that one names, and its folder."""
    given: dict[str, Any] = {}
    for override in overrides:
        given = _merged(given, _parsed(override))
    base = _merged({"training": {"folder": f"runs/{Path(path).stem}"}}, table)
    flat = _flat(given)
    folder = flat.get("model.checkpoint")
    if kind is Config and isinstance(folder, str) and folder:
        base = _merged(base, _settings_of_checkpoint(folder, flat))
    return _merged(base, given)


def _settings_of_checkpoint(folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """By section, the settings that a model of Hugging Face's transformers determines."""
    from galore_jax.interop.config_json import read_config  # needs an extra of its own
    from galore_jax.interop.tokenizer_files import find_tokenizer

    model = asdict(read_config(Path(folder)))
    for key in ("attention", "remat", "weights", "checkpoint"):
        del model[key]
    tokenizer = find_tokenizer(Path(folder))
    if tokenizer is not None:
        return {"model": model, "data": {"tokenizer": str(tokenizer)}}
    if "data.tokenizer" in given:  # A tokenizer in the file belongs to another model.
        return {"model": model}
    raise InputError(
        f"{folder} has no tokenizer.json or tokenizer.model: give the tokenizer of this model as "
        "data.tokenizer, or have transformers write it, "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def _parsed(override: str) -> dict[str, Any]:
    """The nested tables of `section.key=value`."""
    name, equals, text = override.partition("=")
    for value in (text, _toml(text)):
        with contextlib.suppress(ValueError, RecursionError):
            if equals:
                return tomllib.loads(f"{name} = {value}")
    raise InputError(
        f"{override!r} is not an override: write section.key=value, as in training.steps=100."
    )


def _merged(table: Any, other: Any) -> Any:
    """Nested tables with the values of another one in addition, or in place of their own."""
    if not isinstance(table, Mapping) or not isinstance(other, Mapping):
        return other
    return {**table, **{key: _merged(table.get(key), value) for key, value in other.items()}}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted names."""
    flat = {}
    for key, value in table.items():
        is_table = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return flat


def _toml(value: Any) -> str:
    """A value as TOML, which agrees with JSON except for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lines(table: Mapping[str, Any], name: str = "") -> Iterator[str]:
    """The lines of a table with its name, then those of its tables."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    if name:
        yield f"[{name}]"
    for key, value in table.items():
        if key not in tables and value is not None:
            yield f"{key} = {_toml(value)}"
    yield ""
    for key, value in tables.items():
        yield from _lines(value, f"{name}.{key}".lstrip("."))
