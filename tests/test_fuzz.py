"""Files that others made, changed at random: one line for each, in little memory and time, and no traceback.

The default suite tries some; `-m thorough` tries as many as a release is held to. `python tests/fuzz.py` tries more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz
from handscroll.errors import CheckpointError
from handscroll.weights.header import read_all

Miniature = Callable[..., Path]
FEW = {"headers": 300, "configs": 40, "indexes": 20}
MANY = {"headers": 2000, "configs": 250, "indexes": 150}


def original_of(kind: str, miniature: Miniature, tmp_path: Path) -> Path | None:
    if kind == "headers":
        return None
    shards = {"max_shard_size": "50KB"} if kind == "indexes" else {}
    original = shutil.copytree(miniature("1.6b", **shards), tmp_path / "original")
    (Path(original) / "handscroll.json").write_text('{"name": "small", "native_px": 128, "licence": "none"}')
    return Path(original)


@pytest.mark.parametrize("kind", FEW)
def test_some_mutants_are_answered_in_one_line(kind: str, miniature: Miniature, tmp_path: Path) -> None:
    seen, faults = fuzz.try_kind(kind, FEW[kind], 1, original_of(kind, miniature, tmp_path))
    assert not faults
    assert seen["refused"] > FEW[kind] // 4
    assert seen["accepted"] > FEW[kind] // 50


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MANY)
def test_many_mutants_are_answered_in_one_line(kind: str, miniature: Miniature, tmp_path: Path) -> None:
    _, faults = fuzz.try_kind(kind, MANY[kind], 2, original_of(kind, miniature, tmp_path))
    assert not faults


def header(text: str | bytes, data: int = 0, length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def tensor(start: int, end: int, shape: str = "[1]", dtype: str = "F32", more: str = "") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]{more}}}'


DEEP = "[" * 200 + "]" * 200
REFUSED: dict[str, tuple[bytes, str]] = {
    "an overlap": (header(f'{{"a":{tensor(0, 4)},"b":{tensor(2, 6)}}}', 6), "b begins before the one before it ends"),
    "two of one place": (header(f'{{"a":{tensor(0, 4)},"b":{tensor(0, 4)}}}', 4), "begins before"),
    "a gap": (header(f'{{"a":{tensor(0, 4)},"b":{tensor(8, 12)}}}', 12), "b leaves a gap before it"),
    "a gap at the beginning": (header(f'{{"a":{tensor(4, 8)}}}', 8), "a leaves a gap"),
    "bytes at the end": (header(f'{{"a":{tensor(0, 4)}}}', 7), "3 bytes follow the last tensor"),
    "bytes and no tensor": (header("{}", 1), "1 bytes follow"),
    "a name twice": (header(f'{{"a":{tensor(0, 4)},"a":{tensor(4, 8)}}}', 8), "the key 'a' occurs twice"),
    "a field twice": (header(f'{{"a":{tensor(0, 4, more=chr(44) + chr(34) + "dtype" + chr(34) + ":1")}}}', 4), "twice"),
    "metadata twice": (header('{"__metadata__":{"a":"b"},"__metadata__":{}}'), "occurs twice"),
    "UTF-16": (header(f'{{"a":{tensor(0, 4)}}}'.encode("utf-16-le"), 4), "not JSON"),
    "UTF-16 with a mark": (header(f'{{"a":{tensor(0, 4)}}}'.encode("utf-16"), 4), "does not begin with {"),
    "a byte order mark": (header(b"\xef\xbb\xbf{}"), "does not begin with {"),
    "Latin 1": (header(b'{"\xe9":{}}'), "not text in UTF-8"),
    "a space first": (header(" {}"), "does not begin with {"),
    "zeros after it": (header("{}\0\0\0\0\0\0"), "not JSON"),
    "an overflow": (header(f'{{"a":{tensor(0, 0, "[4294967296,4294967296,0]")}}}'), "cannot be the tensor a"),
    "too many dimensions": (
        header(f'{{"a":{tensor(0, 4, "[" + "1," * 64 + "1]")}}}', 4),
        "the tensor a has 65 dimensions; at most 64",
    ),
    "NaN": (header(f'{{"a":{tensor(0, 4, "[NaN]")}}}', 4), "NaN is no number"),
    "Infinity": (header(f'{{"a":{tensor(0, 4, more=",")[:-1]}"x":-Infinity}}}}', 4), "-Infinity is no number"),
    "1e0": (header(f'{{"a":{tensor(0, 4, "[1e0]")}}}', 4), "cannot be the tensor"),
    "1.0": (header(f'{{"a":{tensor(0, 4, "[1.0]")}}}', 4), "cannot be the tensor"),
    "-0": (header(f'{{"a":{tensor(0, 0, "[-0]")}}}'), "cannot be the tensor"),
    "true": (header(f'{{"a":{tensor(0, 4, "[true]")}}}', 4), "cannot be the tensor"),
    "a text": (header(f'{{"a":{tensor(0, 4, chr(34) + "1" + chr(34))}}}', 4), "cannot be the tensor"),
    "a huge number": (header(f'{{"a":{tensor(0, 4, "[" + "9" * 5000 + "]")}}}', 4), "too large"),
    "half of a character": (header('{"__metadata__":{"a":"\\ud800"}}'), "half of a character"),
    "deep lists": (header(f'{{"a":{tensor(0, 4, more=f",{chr(34)}x{chr(34)}:{DEEP}")}}}', 4), "too deeply"),
    "very deep lists": (header("{" + '"a":[' * 1 + "[" * 300_000, 0), "too deeply"),
    "metadata that is no text": (header('{"__metadata__":{"a":1}}'), "should give a text for each name"),
    "metadata in a list": (header('{"__metadata__":["a"]}'), "should give a text"),
    "another dtype": (header(f'{{"a":{tensor(0, 4, dtype="F99")}}}', 4), "cannot be the tensor a"),
    "half a byte": (header(f'{{"a":{tensor(0, 1, dtype="F4")}}}', 1), "cannot be the tensor a"),
    "a terminal's orders": (header('{"\\u001b[2J\\u202e":{}}'), r"the tensor \x1b[2J\u202e"),
    "a long name": (header(f'{{"{"n" * 10_000}":{{}}}}'), "..."),
    "a header too long": (header("{}" + " " * (9 * 2**20)), "its header takes 9.0 MiB"[:15]),
    "too many parts": (header('{"a":[' + "[]," * 2**20 + "[]]}"), "too many parts"),
    "a length that cannot be": (header("{}", 0, 2**64 - 1), "not a safetensors file"),
    "a length beyond the end": (header("{}", 0, 3), "truncated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_that_the_library_refuses_is_refused(case: str, tmp_path: Path) -> None:
    data, says = REFUSED[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    outcome = fuzz.judged(lambda: read_all(file))
    assert outcome.said is not None
    assert not outcome.faults
    assert says in outcome.said
    assert str(file) in outcome.said
    ours_alone = ("twice", "too many dimensions", "a header too long", "too many parts", "a space first", "two of one")
    assert not fuzz.library_takes(file) or any(name in case for name in ours_alone)


def test_a_header_of_a_hundred_megabytes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((100_000_000).to_bytes(8, "little"))
        stream.write(b"{}")
        stream.truncate(100_000_008)
    outcome = fuzz.judged(lambda: read_all(file))
    assert outcome.said is not None
    assert "headers of at most 8.0 MiB are read" in outcome.said
    assert not outcome.faults


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{}   \n\t ",
        '{"__metadata__":null}',
        '{"__metadata__":{}}',
        '{"__metadata__":{"a":"\\ud83d\\ude00 \\u001b"}}',
        f'{{"a":{tensor(0, 0, "[0,18446744073709551615]")}}}',
        f'{{"a":{tensor(0, 0, "[0]")},"b":{tensor(0, 0, "[0]")}}}',
        f'{{"a":{tensor(0, 0, "[0]", more=", " + json.dumps("extra") + ": [1, {}, null, 1.5e3]")}}}',
    ],
)
def test_a_header_that_the_library_takes_is_taken(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(header(text))
    assert fuzz.library_takes(file)
    read_all(file)


def test_every_dtype_of_the_library_is_known(tmp_path: Path) -> None:
    from handscroll.weights.header import DTYPES

    file = tmp_path / "model.safetensors"
    for dtype, (_, bits) in DTYPES.items():
        text = f'{{"a":{tensor(0, bits, "[8]", dtype)}}}'
        file.write_bytes(header(text, bits))
        assert fuzz.library_takes(file), dtype
        ((entry,), _) = read_all(file)
        assert entry.n_bytes == bits
    file.write_bytes(header(f'{{"a":{tensor(0, 8, "[8]", "C128")}}}', 8))
    with pytest.raises(CheckpointError, match="C128"):
        read_all(file)


def test_many_tensors_are_read_within_the_bounds(tmp_path: Path) -> None:
    entries = {
        f"transformer_blocks.{number}.attn.to_q.weight": {
            "dtype": "BF16",
            "shape": [2, 2],
            "data_offsets": [8 * number, 8 * number + 8],
        }
        for number in range(30_000)
    }
    file = tmp_path / "model.safetensors"
    file.write_bytes(header(json.dumps(entries), 8 * len(entries)))
    outcome = fuzz.judged(lambda: read_all(file))
    assert outcome.said is None
    assert not outcome.faults
