"""Broken files by the hundred: bytes, JSON and safetensors files that are changed at random, from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    0.5,
    "",
    "0",
    "9" * 5000,
    "../../../outside",
    "/etc/passwd",
    "nul\0byte",
    "\x1b[2J\x9b31m\u202e",
    "\ud800",
    "x" * 100_000,
    "somebody/else",
    [],
    {},
    [[]],
    {"": None},
)


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes flipped, cut, doubled, zeroed or put in."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        if not result:
            break
        at = draw.randrange(len(result))
        match draw.randrange(6):
            case 0:
                result[at] ^= 1 << draw.randrange(8)
            case 1:
                del result[at:]
            case 2:
                result[at:at] = result[at : at + draw.randrange(1, 200)]
            case 3:
                result[at : at + 16] = bytes(len(result[at : at + 16]))
            case 4:
                result[at:at] = draw.randbytes(draw.randrange(1, 40))
            case 5:
                del result[at : at + draw.randrange(1, 200)]
    return bytes(result)


def changed_json(value: Any, draw: random.Random) -> Any:
    """One thing in it replaced, removed, doubled or put in."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        changed = dict(value)
        if draw.random() < 0.15:
            del changed[name]
        elif draw.random() < 0.1:
            changed[draw.choice(("", "extra", "\x1b[31m", "__metadata__"))] = draw.choice(ODD)
        else:
            changed[name] = changed_json(value[name], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], changed_json(value[at], draw), *value[at + draw.randrange(2) :]]
    if type(value) is int and abs(value) < 2**64 and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, -value, value * 1000, str(value), float(value)))
    return draw.choice(ODD)


def changed_json_file(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return changed_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        value = changed_json(value, draw)
    return _written(value)


def changed_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Its header or its tensors changed; the header mostly with the length that it then has."""
    header_bytes = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + header_bytes], data[8 + header_bytes :]
    change = draw.random()
    if change < 0.2:
        return changed_bytes(data, draw)
    if change < 0.3:
        return data[: 8 + header_bytes] + changed_bytes(tensors, draw)
    value = json.loads(header)
    for _ in range(draw.choice((1, 1, 2))):
        value = changed_json(value, draw)
    if draw.random() < 0.3:
        value = _reshaped(value, draw)
    written = _written(value)
    length = len(written) if draw.random() < 0.95 else draw.choice((0, len(written) - 1, 2**40, 2**63))
    return length.to_bytes(8, "little") + written + tensors


def _reshaped(header: Any, draw: random.Random) -> Any:
    """A tensor of as many numbers and another shape."""
    if not isinstance(header, dict):
        return header
    entries = [each for each in header.values() if isinstance(each, dict) and isinstance(each.get("shape"), list)]
    if entries:
        draw.choice(entries)["shape"].append(1)
    return header


def _written(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # a number of thousands of digits
        return b"{}"


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": changed_json_file,
    ".safetensors": changed_safetensors,
}
