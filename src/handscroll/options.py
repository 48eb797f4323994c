"""Options as the fields of a frozen dataclass: declared once, for the command line, for Python and for JSON.

    steps: int | None = option(None, "Denoising steps. Left out, the model's.", metavar="N", check=within(1, 1000))

is `--steps N` of every command that takes it, the keyword `steps`, a checked number, and a value in the run's JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from handscroll.errors import UsageError
from handscroll.units import check_range, shown

Check = Callable[[str, Any], None]  # of an option's name and its value; raises UsageError

# What takes an option that names no command. `scroll` is a call of the class, which has its model already.
MAKING = ("generate", "batch", "plan", "scroll", "compare")

_KEY = "option"
_KINDS = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}


@dataclass(frozen=True)
class Option:
    """An option as users meet it.

    `fields` are those of the table that it sets: more than one for `--size`. `kind` is what a value is, `choices` the
    words that it may be. `parse` makes the value of a text, a tuple where there are several fields. `default` is shown
    by the command line. `commands` take it as it is; those of `left_to` find a value elsewhere where it is left out,
    which its own help says. `understood` makes a number of what another library has for one; `hint` of a value of
    another kind adds to what is said of it.
    """

    name: str
    help: str
    default: Any
    metavar: str
    check: Check | None
    parse: Callable[[str], Any] | None
    commands: tuple[str, ...]
    left_to: Mapping[str, str]
    fields: tuple[str, ...] = ()
    kind: type = str
    optional: bool = True
    choices: tuple[str, ...] = ()
    understood: Callable[[Any], Any] | None = None
    hint: Callable[[Any], str] | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def is_for(self, command: str) -> bool:
        return command in self.commands or command in self.left_to

    def values(self, given: Any) -> dict[str, Any]:
        """The fields' values, from a text or a Python value. Raises UsageError."""
        if isinstance(given, os.PathLike):
            given = os.fspath(given)
        is_one_of_several = len(self.fields) > 1 and not isinstance(given, tuple | list)
        if self.parse is not None and (isinstance(given, str) or is_one_of_several):
            given = self.parse(given if isinstance(given, str) else shown(given))
        values = [given] if len(self.fields) == 1 else list(given)
        if len(values) != len(self.fields):
            raise UsageError(f"{self.name} {shown(given)} should have {len(self.fields)} values")
        return dict(zip(self.fields, values, strict=True))


def option(
    default: Any,
    help: str = "",
    *,
    name: str = "",
    metavar: str = "",
    check: Check | None = None,
    parse: Callable[[str], Any] | None = None,
    shown: Any = None,
    commands: Iterable[str] = MAKING,
    left_to: Mapping[str, str] | None = None,
    understood: Callable[[Any], Any] | None = None,
    hint: Callable[[Any], str] | None = None,
) -> Any:
    """A field of a table of options. Fields of the same `name` are set by one option, which the first of them declares.

    The field's type says what a value is: bool, int, float, str or a Literal of words, and None where it may be left
    out. name: the option's, where it is not the field's. shown: the default as the command line says it, where that is
    not the field's. The rest is as in `Option`.
    """
    declared = Option(
        name,
        help,
        default if shown is None else shown,
        metavar,
        check,
        parse,
        tuple(commands),
        left_to or {},
        understood=understood,
        hint=hint,
    )
    return dataclasses.field(default=default, metadata={_KEY: declared})


@cache
def options_of(table: type) -> tuple[Option, ...]:
    """Every option of a table, in the table's order."""
    found: dict[str, Option] = {}
    for field, declared in _declared(table).items():
        known = found.get(declared.name, declared)
        found[declared.name] = dataclasses.replace(known, fields=(*known.fields, field))
    return tuple(found.values())


def fields_of(table: type, options: Mapping[str, Any], command: str | None = None) -> dict[str, Any]:
    """The fields of a table that options set, each one checked.

    Options go by the command line's names (memory, size, compose, ...) with texts or values, or by the fields' own
    (memory_bytes, width, ...). None leaves one out. Raises UsageError for a name that is not known, or that `command`
    does not take, for two names of one thing, and for what a check refuses.
    """
    taken = [each for each in options_of(table) if command is None or each.is_for(command)]
    by_name = {each.name: each for each in taken}
    fields = _declared(table)
    named = {field: each for each in taken for field in each.fields}
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for given, value in options.items():
        name = given.replace("-", "_")
        if name not in by_name and name not in named:
            raise UsageError(_unknown(table, name, [*by_name, *named], command))
        if value is None:
            continue
        values = by_name[name].values(value) if name in by_name else {name: value}
        for field, one in values.items():
            if field in found:
                raise UsageError(f"{given} and {given_as[field]} say the same; give one of them")
            given_as[field] = given
            label = _label(table, field)
            found[field] = _converted(label, fields[field], one)
            _check(label, fields[field], found[field])
    return found


def check_fields(filled: Any) -> None:
    """Checks every option's field of a filled table, and puts Python's own numbers in place of another library's.

    Raises UsageError for the first that cannot be.
    """
    table: type = type(filled)
    for field, declared in _declared(table).items():
        label, value = _label(table, field), getattr(filled, field)
        own = value if isinstance(value, str) else _converted(label, declared, value)
        if own is not value:
            object.__setattr__(filled, field, own)  # a table is frozen once it is filled
        _check(label, declared, own)


def within(least: float, most: float) -> Check:
    """A check that a number is in a range, both ends included."""
    return lambda name, value: check_range(name, value, least, most)


@cache
def _declared(table: type) -> dict[str, Option]:
    """By field: what was declared there, with what its type says."""
    hints = get_type_hints(table)
    found = {}
    for field in dataclasses.fields(table):
        if _KEY in field.metadata:
            declared = field.metadata[_KEY]
            kind, optional, choices = _kind_of(hints[field.name])
            found[field.name] = dataclasses.replace(
                declared,
                name=declared.name or field.name,
                metavar=declared.metavar or "|".join(choices),
                kind=kind,
                optional=optional,
                choices=choices,
            )
    return found


def _kind_of(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    (value,) = [part for part in parts if part is not NoneType]
    choices = get_args(value) if get_origin(value) is Literal else ()
    kind = str if choices else value
    if kind not in _KINDS:
        raise TypeError(f"an option cannot be {hint}: use bool, int, float, str or a Literal of words")
    return kind, NoneType in parts, choices


def _label(table: type, field: str) -> str:
    """What messages call a field: by its option, where that sets no other."""
    each = next(each for each in options_of(table) if field in each.fields)
    return (each.name if len(each.fields) == 1 else field).replace("_", " ")


def _converted(label: str, declared: Option, value: Any) -> Any:
    """A number in place of its text, and Python's own in place of another library's."""
    wanted, what = _KINDS[declared.kind]
    if declared.understood is not None:
        value = declared.understood(value)
    if declared.kind is bool or declared.kind is str or isinstance(value, bool):
        return value
    if isinstance(value, (str, wanted)):
        try:
            return declared.kind(value)
        except (ValueError, OverflowError):
            raise UsageError(f"{label} {shown(value)} is not {what}") from None
    return value


def _check(label: str, declared: Option, value: Any) -> None:
    if value is None and declared.optional:
        return
    wanted, what = _KINDS[declared.kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and declared.kind is not bool):
        hint = declared.hint(value) if declared.hint is not None else ""
        raise UsageError(f"{label} {shown(value)} is not {what}{hint}")
    if declared.choices and value not in declared.choices:
        raise UsageError(f"{label} {shown(value)} is not known; use one of {', '.join(declared.choices)}")
    if declared.check is not None:
        declared.check(label, value)


def _unknown(table: type, name: str, known: list[str], command: str | None) -> str:
    elsewhere = next((each for each in options_of(table) if name == each.name or name in each.fields), None)
    if elsewhere is not None:
        return f"{name} is no option of {command}; it is one of {', '.join([*elsewhere.commands, *elsewhere.left_to])}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"no option {name!r}; " + (
        f"did you mean {near[0]}?" if near else f"the options are {', '.join(dict.fromkeys(known))}"
    )
