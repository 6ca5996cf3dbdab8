"""Dataclasses whose fields are the settings of a section of a configuration file.

pydantic checks each value against the type of its field, `Annotated` with a range or a `Literal`
with the choices. An error is one sentence.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar

import pydantic.dataclasses
from pydantic import ConfigDict, ValidationError

from galore_jax.errors import InputError, suggestion

AnyClass = TypeVar("AnyClass", bound=type)
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def checked(section: str) -> Callable[[AnyClass], AnyClass]:
    """A decorator of a frozen dataclass whose values are checked when an instance is made.

    A whole number is accepted as a float, but no number as text or a boolean. An unknown name
    raises an `InputError` with the nearest ones, and so does a value of another type, out of range
    or not finite. A field that is another such dataclass also accepts a mapping of its values.

    Args:
      section: its name in front of the settings in messages, as in `optimizer.learning_rate`.
    """

    def decorate(kind: AnyClass) -> AnyClass:
        result: Any = pydantic.dataclasses.dataclass(kind, frozen=True, config=_STRICT)
        result.__doc__ = kind.__doc__
        unchecked = result.__init__
        tables: dict[str, Any] = {f.name: f.type for f in fields(result) if is_dataclass(f.type)}

        @wraps(unchecked)
        def init(self: Any, /, *args: Any, **values: Any) -> None:
            for name, table in tables.items():
                if isinstance(values.get(name), Mapping):
                    values[name] = table(**values[name])
            try:
                unchecked(self, *args, **values)
            except ValidationError as error:
                raise InputError(_sentence(error, section, result)) from None

        result.__init__ = init
        return result

    return decorate


def _sentence(error: ValidationError, section: str, kind: Any) -> str:
    """The first of the errors that pydantic found."""
    kinds = {f.name: f.type for f in fields(kind) if is_dataclass(f.type)}
    tables = [(table, inner.name) for table, own in kinds.items() for inner in fields(own)]
    inside = lambda key: [f"{table}.{name}" for table, name in tables if name == key]
    is_unknown = lambda found: found["type"] == "unexpected_keyword_argument"
    # A setting that is now in a table, such as optimizer.rank of earlier versions, comes first.
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda found: not (is_unknown(found) and inside(found["loc"][0])))
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, InputError):
        return str(raised)
    names = [field.name for field in fields(kind)]
    key = first["loc"][0]
    name = f"{section}.{names[key] if isinstance(key, int) else key}".lstrip(".")
    if is_unknown(first):
        inner = inside(key)
        nearest = f"; did you mean {' or '.join(inner)}?" if inner else suggestion(str(key), names)
        return f"{name} is unknown{nearest}"
    if first["type"] == "dataclass_exact_type":
        return f"{name} is a table: write [{name}], then a line for each key."
    # Each type of a union has an error, the most general one last.
    last = [found for found in errors if found["loc"][:1] == (key,)][-1]
    wanted = re.sub(r"^\w+ should", "must", last["msg"])
    return f"{name} {wanted}, not {last['input']!r}."
