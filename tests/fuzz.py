"""Mutations of files that others made: safetensors headers, configs and indexes, and how a mutated one is judged.

Each kind is a `Kind`: how a mutant is written to a folder, how it is read, and which errors are an answer. Others
(run folders, latents) are added to KINDS. `tests/test_fuzz.py` tries some; `python tests/fuzz.py` tries as many as are
asked for and prints what came of them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handscroll.errors import HandscrollError

MOST_BYTES, MOST_SECONDS = 64 * 2**20, 1.0
NASTY_TEXTS = (
    "",
    "\x1b[2J\x1b]0;title\x07",
    "a\nb\r\nc",
    "\u202egnp.exe",
    "\x00",
    "name" * 50_000,
    "\ud800",
    "../../etc/passwd",
    "__metadata__",
    "é" * 1000,
    "\U0001f600",
)
NASTY_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    -0.0,
    1,
    3,
    2**31,
    2**63,
    2**64 - 1,
    2**64,
    10**9,
    10**30,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    None,
)


@dataclass(frozen=True)
class Outcome:
    """What came of one mutant. `said` is the message, None where it was accepted."""

    said: str | None
    seconds: float
    taken_bytes: int

    @property
    def faults(self) -> list[str]:
        found = []
        if self.seconds > MOST_SECONDS:
            found.append(f"{self.seconds:.1f} s")
        if self.taken_bytes > MOST_BYTES:
            found.append(f"{self.taken_bytes / 2**20:.0f} MiB")
        if self.said is not None and (not self.said or any(not part.isprintable() for part in self.said.split(" "))):
            found.append(f"not one line to read: {self.said!r}")
        if self.said is not None and len(self.said) > 2000:
            found.append(f"{len(self.said)} characters")
        return found


def judged(read: Callable[[], object]) -> Outcome:
    """Reads a mutant twice, once for the time and once for the memory. An error of another kind passes through."""
    start = time.process_time()  # of this process: others may be at work on the machine
    said = _said(read)
    seconds = time.process_time() - start
    tracemalloc.start()
    try:
        _said(read)
        taken_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Outcome(said, seconds, taken_bytes)


def _said(read: Callable[[], object]) -> str | None:
    try:
        read()
    except HandscrollError as error:
        return str(error)
    return None


# JSON that Python's own writer does not write: names twice, numbers in other forms.


class Raw(str):
    """A piece of JSON that is written as it is."""


def to_json(value: Any) -> str:
    """JSON of a value; lists of pairs are tables whose keys may occur twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{to_json(key)}:{to_json(each)}" for key, each in value) + "}"
    if isinstance(value, dict):
        return to_json(Pairs(value.items()))
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


class Pairs(list[tuple[Any, Any]]):
    """A table as a list of names and values."""


NASTY_JSON = (
    Raw("1e3"),
    Raw("-0"),
    Raw("01"),
    Raw("1.0"),
    Raw("0x10"),
    Raw("NaN"),
    Raw("-Infinity"),
    Raw("true"),
    Raw("9" * 5000),
    Raw("1e400"),
    Raw("[" * 200 + "]" * 200),
    Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 150 + "1" + "}" * 150),
    Raw('"\\ud800"'),
    Raw("'single'"),
    Raw("[1,]"),
    Raw("{}"),
    Raw("[]"),
    Raw('"text"'),
    Raw("[" + "[]," * 500_000 + "[]]"),
)


def nasty_value(dice: random.Random) -> Any:
    kind = dice.randrange(4)
    if kind == 0:
        return dice.choice(NASTY_NUMBERS)
    if kind == 1:
        return dice.choice(NASTY_TEXTS)
    if kind == 2:
        return dice.choice(NASTY_JSON)
    return [nasty_value(dice) for _ in range(dice.randrange(4))]


# Headers


def header_file(dice: random.Random) -> bytes:
    """A safetensors file of some tensors with one to three things wrong with it (or, now and then, nothing)."""
    tensors, offset = Pairs(), 0
    for number in range(dice.randrange(5)):
        dtype, element_bytes = dice.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("F8_E4M3", 1)))
        shape = [dice.randrange(4) for _ in range(dice.randrange(4))]
        n_bytes = element_bytes
        for size in shape:
            n_bytes *= size
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + n_bytes]}
        tensors.append((f"layer.{number}.weight", entry))
        offset += n_bytes
    if dice.random() < 0.5:
        tensors.insert(dice.randrange(len(tensors) + 1), ("__metadata__", {"format": "pt"}))
    file: dict[str, Any] = {
        "header": tensors,
        "data": offset,
        "encoding": "utf-8",
        "length": 0,
        "before": "",
        "after": "",
    }
    for _ in range(dice.choice((0, 1, 1, 1, 1, 2, 3))):
        dice.choice(HEADER_MUTATIONS)(dice, file)
    text = f"{file['before']}{to_json(file['header'])}{file['after']}"
    header = bytearray(text.encode(file["encoding"], "surrogatepass"))
    for _ in range(file.get("bytes", 0)):
        if header:
            header[dice.randrange(len(header))] = dice.randrange(256)
    length = max(0, len(header) + file["length"]) % 2**64
    whole = struct.pack("<Q", length) + bytes(header) + bytes(file["data"])
    return whole[: file.get("cut", len(whole))]


def _entry(dice: random.Random, file: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(file["header"], Pairs):
        return None  # another mutation put something else in its place
    entries = [entry for _, entry in file["header"] if isinstance(entry, dict) and "dtype" in entry]
    return dice.choice(entries) if entries else None


def _change_field(dice: random.Random, file: dict[str, Any]) -> None:
    if entry := _entry(dice, file):
        entry[dice.choice(("dtype", "shape", "data_offsets"))] = nasty_value(dice)


def _change_number(dice: random.Random, file: dict[str, Any]) -> None:
    if (entry := _entry(dice, file)) and isinstance(entry.get("data_offsets"), list):
        numbers = entry[dice.choice(("shape", "data_offsets"))]
        if isinstance(numbers, list) and numbers:
            numbers[dice.randrange(len(numbers))] = dice.choice((*NASTY_NUMBERS, *NASTY_JSON[:10]))


def _shift(dice: random.Random, file: dict[str, Any]) -> None:
    """An overlap or a gap."""
    if (entry := _entry(dice, file)) and isinstance(entry.get("data_offsets"), list):
        by = dice.choice((-8, -4, -1, 1, 4, 8, 4096))
        entry["data_offsets"] = [each + by if isinstance(each, int) else each for each in entry["data_offsets"]]


def _many_sizes(dice: random.Random, file: dict[str, Any]) -> None:
    if entry := _entry(dice, file):
        ones = [1] * dice.choice((10, 65, 1000, 100_000))
        entry["shape"] = dice.choice((ones, [2**32, 2**32, 0], [2**40, 2**40], [0, 2**64 - 1], [2**63, 2]))


def _twice(dice: random.Random, file: dict[str, Any]) -> None:
    if isinstance(file["header"], Pairs) and file["header"]:
        file["header"].append(dice.choice(file["header"]))


def _rename(dice: random.Random, file: dict[str, Any]) -> None:
    if isinstance(file["header"], Pairs) and file["header"]:
        index = dice.randrange(len(file["header"]))
        file["header"][index] = (dice.choice(NASTY_TEXTS), file["header"][index][1])


def _metadata(dice: random.Random, file: dict[str, Any]) -> None:
    texts = {dice.choice(NASTY_TEXTS): dice.choice(NASTY_TEXTS)}
    said: Any = dice.choice(
        (None, [], "text", {"a": 1}, {"a": None}, {"a": ["b"]}, texts, Pairs([("a", "b"), ("a", "c")]))
    )
    if isinstance(file["header"], Pairs):
        file["header"].append(("__metadata__", said))


def _more_fields(dice: random.Random, file: dict[str, Any]) -> None:
    if entry := _entry(dice, file):
        entry["extra"] = nasty_value(dice)


def _whole_header(dice: random.Random, file: dict[str, Any]) -> None:
    file["header"] = dice.choice((Raw("[]"), Raw("3"), Raw('"a"'), Raw("null"), Raw(""), Raw("{}"), *NASTY_JSON))


def _encoding(dice: random.Random, file: dict[str, Any]) -> None:
    file["encoding"] = dice.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig"))


def _around(dice: random.Random, file: dict[str, Any]) -> None:
    filling = dice.choice((" ", "\n", "\t ", "\x00", "\ufeff", "{}", "//", "  " * 100, " " * 2**20))
    file[dice.choice(("before", "after"))] = filling


def _length(dice: random.Random, file: dict[str, Any]) -> None:
    file["length"] = dice.choice((-8, -1, 1, 8, 10**6, 10**8, 2**40, 2**63 - 1, -(10**9)))


def _data(dice: random.Random, file: dict[str, Any]) -> None:
    file["data"] = max(0, file["data"] + dice.choice((-8, -1, 1, 8, 4096)))


def _cut(dice: random.Random, file: dict[str, Any]) -> None:
    file["cut"] = dice.randrange(40)


def _bytes(dice: random.Random, file: dict[str, Any]) -> None:
    file["bytes"] = dice.choice((1, 2, 10))


HEADER_MUTATIONS: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _change_field,
    _change_number,
    _change_number,
    _shift,
    _shift,
    _many_sizes,
    _twice,
    _rename,
    _metadata,
    _more_fields,
    _whole_header,
    _encoding,
    _around,
    _length,
    _data,
    _cut,
    _bytes,
)


def library_takes(file: Path) -> bool:
    """Whether the safetensors library itself opens a file."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt"):
            return True
    except Exception:  # its errors are of many types
        return False


# JSON files of a checkpoint

CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "handscroll.json",
)


def mutated_json(dice: random.Random, whole: bytes) -> bytes:
    """A JSON file with one to three values, keys or bytes of it changed."""
    value = json.loads(whole)
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = value
        while dice.random() < 0.5 and isinstance(place, dict | list) and place:
            key = dice.choice(sorted(place)) if isinstance(place, dict) else dice.randrange(len(place))
            if not isinstance(place[key], dict | list):
                break
            place = place[key]
        if isinstance(place, dict) and place:
            key = dice.choice(sorted(place))
            if dice.random() < 0.15:
                place[dice.choice(NASTY_TEXTS)] = place.pop(key)
            else:
                place[key] = nasty_value(dice)
        elif isinstance(place, list):
            place.insert(dice.randrange(len(place) + 1), nasty_value(dice))
    text = to_json(value).encode(dice.choice(("utf-8",) * 9 + ("utf-16",)), "surrogatepass")
    chance = dice.random()
    if chance < 0.05:
        return text[: dice.randrange(len(text))]
    if chance < 0.1:
        changed = bytearray(text)
        changed[dice.randrange(len(changed))] = dice.randrange(256)
        return bytes(changed)
    return text


@dataclass(frozen=True)
class Kind:
    """`write` makes a mutant of what lies in a folder, and gives what is to be read; `read` reads it.

    `may_take` says whether an accepted mutant is one that another reader takes too.
    """

    write: Callable[[random.Random, Path], Path]
    read: Callable[[Path], object]
    may_take: Callable[[Path], bool] = lambda path: True


def _write_header(dice: random.Random, folder: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(header_file(dice))
    return file


def _write_config(dice: random.Random, folder: Path) -> Path:
    file = folder / dice.choice([name for name in CONFIGS if (folder / name).is_file()])
    file.write_bytes(mutated_json(dice, file.read_bytes()))
    return folder


def _write_index(dice: random.Random, folder: Path) -> Path:
    file = dice.choice(sorted(folder.glob("*/*.index.json")))
    file.write_bytes(mutated_json(dice, file.read_bytes()))
    return folder


def _read_header(file: Path) -> object:
    from handscroll.weights.header import read_all

    return read_all(file)


def _read_checkpoint(folder: Path) -> object:
    """All that is read of a checkpoint before its weights: the spec, the modules' shapes, tokenizer and scheduler."""
    import torch

    from handscroll.models.checkpoint import CheckpointSpec
    from handscroll.runtime.modules import load_scheduler, load_tokenizer, open_module

    spec = CheckpointSpec.from_folder(folder)
    for component, leave in (("transformer", {"patch_embed.pos_embed"}), ("vae", set()), ("text_encoder", set())):
        open_module(spec, component, dtype=torch.float32, device="cpu", leave=leave)  # type: ignore[arg-type]
    load_scheduler(spec)
    load_tokenizer(spec)
    return spec


KINDS: dict[str, Kind] = {
    "headers": Kind(_write_header, _read_header, library_takes),
    "configs": Kind(_write_config, _read_checkpoint),
    "indexes": Kind(_write_index, _read_checkpoint),
}


def try_kind(name: str, count: int, seed: int, original: Path | None) -> tuple[Mapping[str, int], list[str]]:
    """Tries `count` mutants; what came of them in numbers, and everything that should not have come.

    original: the folder that is copied before each mutation, None for an empty one.
    """
    kind, faults = KINDS[name], []
    seen: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            folder = Path(scratch) / "it"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder) if original is not None else folder.mkdir()
            path = kind.write(random.Random(f"{name} {seed} {number}"), folder)
            try:
                outcome = judged(lambda path=path: kind.read(path))  # type: ignore[misc]
            except Exception as error:  # what must not be
                faults.append(f"{name} {seed} {number}: {type(error).__name__}: {str(error)[:300]}")
                seen["traceback"] += 1
                continue
            slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.taken_bytes)
            faults += [f"{name} {seed} {number}: {fault}" for fault in outcome.faults]
            seen["accepted" if outcome.said is None else "refused"] += 1
            if outcome.said is None and not kind.may_take(path):
                faults.append(f"{name} {seed} {number}: accepted, and the library does not")
            if outcome.said is not None and kind.may_take is library_takes and library_takes(path):
                seen["refused, and the library takes it"] += 1
    return {**seen, "slowest, ms": round(1000 * slowest), "largest, KiB": largest // 1024}, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--original", type=Path, help="a checkpoint folder to change; left out, a miniature is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        original = options.original
        if original is None and options.kind != "headers":
            from miniatures import make_checkpoint

            shards: dict[str, Any] = {"max_shard_size": "50KB"} if options.kind == "indexes" else {}
            original = make_checkpoint(Path(made) / "miniature", **shards)
            (original / "handscroll.json").write_text('{"name": "small", "native_px": 128, "licence": "none"}')
        seen, faults = try_kind(options.kind, options.count, options.seed, original)
    print("\n".join(faults))
    print(json.dumps(seen))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
