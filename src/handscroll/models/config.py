"""From a component's JSON to a frozen dataclass: fields, types, defaults. No torch.

Fields that a config lacks take the dataclass's default; what it has besides the fields (`_diffusers_version`, ...) says
nothing about the shape of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from handscroll.errors import CheckpointError
from handscroll.units import one_line, shown
from handscroll.weights.json_text import MAX_MESSAGE, read_json

Spec = TypeVar("Spec")

MAX_CONFIG_BYTES = 2**20  # some hundred times what any has

# Of a network: far above every known one (60 layers, 2304 and 9216 channels), and little enough to be counted through.
MAX_LAYERS, MAX_CHANNELS, MAX_HEADS = 512, 2**18, 2**12


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file if there is none."""
    value = read_json(file, MAX_CONFIG_BYTES)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def build_spec(cls: type[Spec], file: Path, config: dict[str, Any]) -> Spec:
    try:
        return getattr(cls, "from_config", functools.partial(spec_from_config, cls))(config)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error, MAX_MESSAGE)}") from error


# From JSON values to typed fields. Fields that a config lacks take the dataclass's default; what it has besides the
# fields (`_diffusers_version`, ...) says nothing about the shape of the model.
def spec_from_config(cls: type[Spec], config: dict[str, Any]) -> Spec:
    hints = typing.get_type_hints(cls)
    return cls(**{name: _typed(name, config[name], hint) for name, hint in hints.items() if name in config})


def default_of(cls: type, field: str) -> Any:
    return next(each.default for each in dataclasses.fields(cls) if each.name == field)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type: int, float, bool, str, a tuple of one of them, or None where allowed."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} should be a list, found {shown(value)}")
        return tuple(_typed(name, element, typing.get_args(hint)[0]) for element in value)
    if hint is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{name} should be {hint.__name__}, found {shown(value)}")
    return value


def require_positive(spec: Any, *fields: str) -> None:
    for field in fields:
        if not getattr(spec, field) > 0:
            raise ValueError(f"{field} should be above 0, found {shown(getattr(spec, field))}")


def require_within(spec: Any, **ranges: tuple[float, float]) -> None:
    """Bounds on what makes loops and memory: far above every known model, and small enough to be refused at once.

    A field may hold one number, None, or lists of numbers. Raises ValueError naming the field.
    """
    for field, (least, most) in ranges.items():
        for value in _numbers_in(getattr(spec, field)):
            if not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise ValueError(f"{field} should be {bound}, found {shown(value)}")


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for each in value:
            yield from _numbers_in(each)
    elif value is not None:
        yield value


def require_a_stage(field: str, values: tuple[Any, ...], stages: int) -> None:
    if len(values) != stages:
        raise ValueError(f"{field} has {len(values)} entries for {stages} stages")


def require_known(field: str, values: tuple[str, ...], known: frozenset[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{field} {shown(value)} is not one of {', '.join(sorted(known))}")


def freeze(value: Any) -> Any:
    return tuple(freeze(element) for element in value) if isinstance(value, list) else value


def thaw(value: Any) -> Any:
    return [thaw(element) for element in value] if isinstance(value, tuple) else value
