"""JSON of files that others made, read within a bound on memory. No torch.

Python's own reader takes what JSON is not (NaN, two values of one key, other encodings), and makes twenty bytes and
more of one: a file of a few megabytes would fill the memory.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError
from handscroll.units import gibibytes, one_line
from handscroll.weights.foreign import FIRST_BYTES, unreadable, what_it_is

MAX_FILE_BYTES = 8 * 2**20
MAX_MADE_BYTES = 40 * 2**20  # of what is made of a file, as `_made_bytes` counts it
MAX_DEPTH, TOO_DEEP = 100, "its lists and tables lie in each other too deeply"
MAX_MESSAGE = 200  # characters of what is said of one file

# What CPython makes of a character that begins something: a table or a list, half a string, the next value.
_MADE_BYTES = {b"{": 240, b"[": 88, b'"': 30, b",": 40}


def read_json(file: Path, most_bytes: int = MAX_FILE_BYTES) -> Any:
    """The value of a JSON file of a checkpoint, of at most so many bytes. Raises CheckpointError naming the file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file}: not a file")
        with file.open("rb") as stream:
            data = stream.read(most_bytes + 1)
    except OSError as error:
        raise CheckpointError(unreadable(file, error)) from error
    if said := what_it_is(data[:FIRST_BYTES]):
        raise CheckpointError(f"{file}: {said}")
    try:
        return parse_json(data, most_bytes)
    except ValueError as error:
        raise CheckpointError(f"{file}: broken JSON: {one_line(error, MAX_MESSAGE)}") from error


def parse_json(data: bytes, most_bytes: int = MAX_FILE_BYTES, *, strict: bool = False) -> Any:
    """The value of a JSON text in UTF-8.

    strict: as the safetensors library reads: no byte order mark, no key twice, no NaN, no Infinity, no half of a
    character. Without it these are taken as Python takes them, which diffusers and transformers read configs with; of a
    key that occurs twice, the last one. Raises ValueError, which says in one line what is wrong.
    """
    if len(data) > most_bytes:
        raise ValueError(f"it is longer than what is read, which is {gibibytes(most_bytes)}")
    if (made_bytes := _made_bytes(data)) > MAX_MADE_BYTES:
        raise ValueError(f"it has too many parts: they would take about {gibibytes(made_bytes)} of memory")
    try:
        text = data.decode("utf-8" if strict else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8") from None
    try:
        if strict:
            hooks: Any = {"object_pairs_hook": _table, "parse_constant": _no_number}
            value = json.loads(text, **hooks, parse_int=_integer, parse_float=_finite)
        else:
            value = json.loads(text, parse_int=_any_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if _is_nested_deeply(value):
        raise ValueError(TOO_DEEP)
    if strict and "\\u" in text:
        _check_characters(value)
    return value


def _is_nested_deeply(value: Any) -> bool:
    """Whether lists and tables lie in each other more than MAX_DEPTH times. (The safetensors library takes 127.)"""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for each in level:
            if isinstance(each, list):
                inner.extend(each)
            elif isinstance(each, dict):
                inner.extend(each.values())
        level, depth = [each for each in inner if isinstance(each, list | dict)], depth + 1
        if depth > MAX_DEPTH:
            return True
    return False


def _made_bytes(data: bytes) -> int:
    """About how much memory a JSON text takes once it is read, its own characters included."""
    width = 1 if data.isascii() else 4
    return width * len(data) + sum(count * data.count(mark) for mark, count in _MADE_BYTES.items())


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _integer(digits: str) -> int | float:
    """As 64 bits hold it: -0, and what is larger, is a number with a point there."""
    return int(digits) if len(digits) <= 20 and digits != "-0" else _finite(digits)


def _any_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 400 else float(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def _check_characters(value: Any) -> None:
    """Raises ValueError for half a character, which an escape such as `\\ud800` can write."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and not each.isprintable():
            try:
                each.encode()
            except UnicodeEncodeError:
                raise ValueError("half of a character stands in a text") from None
        elif isinstance(each, list):
            waiting.extend(each)
        elif isinstance(each, dict):
            waiting.extend(each)
            waiting.extend(each.values())
