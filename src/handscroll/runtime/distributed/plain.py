"""Frozen dataclasses as JSON and back, for what ranks tell each other: no pickles between processes."""

from __future__ import annotations

import dataclasses
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")


def as_plain(value: Any) -> Any:
    """A dataclass of numbers, texts, tuples and dataclasses as JSON values."""
    return dataclasses.asdict(value)


def of_plain(kind: type[Kind], facts: Any) -> Kind:
    """The dataclass that became such values. Raises TypeError, ValueError or KeyError for other values."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    return kind(**{name: _value(hints[name], facts[name]) for name in names})


def _value(kind: Any, value: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        (kind,) = [each for each in get_args(kind) if each is not NoneType]
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], each) for each in value)
    return of_plain(kind, value) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else value
