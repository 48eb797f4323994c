"""What a file of prompts asks for: a task for every picture, each with its seed and the name of its file.

    prompts.txt      a prompt on every line
    prompts.jsonl    a JSON object on every line: {"prompt": "a lake", "size": "1024x512", "output": "lake.webp"}

The same file gives the same tasks. Whatever cannot be meant is refused here, by its line, before any work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, count
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from handscroll.batch.journal import JOURNAL, WORK
from handscroll.errors import FormatError, HandscrollError, UsageError, printable
from handscroll.files import why_not_on_windows
from handscroll.jobs.job import resolved_name
from handscroll.options import fields_of
from handscroll.pictures.formats import DZI, FORMATS, check_quality
from handscroll.pictures.naming import words_of
from handscroll.pictures.targets import IS_WINDOWS, check_format
from handscroll.request import Request, indexed
from handscroll.units import gibibytes, one_line, shown
from handscroll.weights.json_text import parse_json

MAX_FILE_BYTES, MAX_LINE_BYTES = 2**28, 2**20
MAX_NAME_BYTES, MAX_OUTPUT_BYTES = 200, 1000  # of a file's name, so that its parts have room beside it; with folders
# What the machine decides, and no line of a file: they change no picture.
OF_MACHINE = ("device", "devices", "memory", "memory_bytes", "strip_rows")
_OWN = ("output", "quality")


@dataclass(frozen=True)
class Task:
    """One picture of a batch. `output` is its name below the folder, with `/`. `line` counts from 1.

    `digest`: of all that decides the picture and its file. Two tasks of one file never share it.
    """

    line: int
    request: Request
    output: str
    quality: int | None
    digest: str

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.output).suffix


def read_tasks(
    file: Path, options: Mapping[str, Any], *, suffix: str = ".png", quality: int | None = None
) -> list[Task]:
    """The tasks of a file, in its order. options: those of `handscroll batch`, for lines that do not set them.

    suffix: of pictures that a line gives no name. Raises UsageError, which names the first line that cannot be meant.
    """
    _check_suffix(suffix)
    check_quality(quality)
    common = fields_of(Request, options)
    Request("any", **common)  # what is wrong with these is no line's fault
    drafts: list[tuple[int, Request, str | None, int | None]] = []
    wrong: list[str] = []
    for number, found in _lines(file):
        try:
            drafts += [(number, *each) for each in _pictures(found, common, suffix, quality)]
        except HandscrollError as error:
            wrong.append(f"{file}, line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - 1} more lines that cannot be used" if len(wrong) > 1 else ""
        raise UsageError(wrong[0] + more)
    if not drafts:
        raise UsageError(f"{file}: there is no prompt in it")
    return _named(file, drafts, suffix)


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Every line that is not empty: its number, and its text or what its JSON says. Raises UsageError."""
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".txt"):
        raise UsageError(
            f"{file}: its name says neither .txt (a prompt on every line) nor .jsonl (a JSON object on every line)"
        )
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or one_line(error)}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{file}: is larger than {gibibytes(MAX_FILE_BYTES)}; cut it into several")
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield number, _read_line(file, number, line.strip(), is_json=kind == ".jsonl")


def _read_line(file: Path, number: int, line: bytes, *, is_json: bool) -> Any:
    try:
        return parse_json(line, MAX_LINE_BYTES, strict=True) if is_json else line.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{file}, line {number}: not text in UTF-8") from None
    except ValueError as error:
        raise UsageError(f"{file}, line {number}: {one_line(error)}") from None


def _pictures(
    found: Any, common: Mapping[str, Any], suffix: str, quality: int | None
) -> Iterator[tuple[Request, str | None, int | None]]:
    """The pictures of a line: what is asked for, the name of its file where the line gives one, and its quality.

    common: the fields of a request that the line need not say.
    """
    if isinstance(found, str):
        found = {"prompt": found}
    if not isinstance(found, dict) or "prompt" not in found:
        raise UsageError('no prompt in it; write {"prompt": "..."} and more options, or the prompt alone in quotes')
    own = {name: value for name, value in found.items() if value is not None and name not in ("prompt", *_OWN)}
    if "format" in own:
        raise UsageError('format is of the whole batch; give this line an output, such as "output": "lake.webp"')
    for name in own:
        if name.replace("-", "_") in OF_MACHINE:
            raise UsageError(f"{name} is of the whole batch; give it as --{name.replace('_', '-')} and not in a line")
    fields = fields_of(Request, own)
    if ("width" in fields) != ("height" in fields):
        raise UsageError("width and height go together; give both, or size")
    request = Request(found["prompt"], **{**common, **fields})
    _check_model(request.model)
    output = None if found.get("output") is None else _checked_output(found["output"])
    quality = check_quality(found.get("quality", quality))
    check_format(Path(output or f"any{suffix}"), request.width or 1, request.height or 1)
    for index in range(request.count):
        seed = None if request.seed is None else request.seed + index
        name = None if output is None else indexed(Path(output), index, request.count)
        yield dataclasses.replace(request, seed=seed, count=1), None if name is None else name.as_posix(), quality


@cache
def _check_model(model: str) -> str:
    return resolved_name(model)


def _checked_output(output: Any) -> str:
    """A name below the folder, by `/`. Raises UsageError."""
    if not isinstance(output, str) or not output:
        raise UsageError(f"output {shown(output)} is not a file name")
    path = PurePosixPath(output.replace("\\", "/") if IS_WINDOWS else output)
    if path.is_absolute() or PureWindowsPath(output).drive or ".." in path.parts or not path.name:
        raise UsageError(f"output {shown(output)} is not a name below the folder of the batch")
    if path.parts[0].casefold() in (WORK, JOURNAL):
        raise UsageError(f"output {shown(output)} is where the batch keeps its own files; choose another name")
    if printable(output) != output:
        raise UsageError(f"output {shown(output)} holds characters that no name should have")
    if len(output.encode()) > MAX_OUTPUT_BYTES:
        raise UsageError(f"output {shown(output)} has more than {MAX_OUTPUT_BYTES} bytes")
    for part in path.parts:
        if len(part.encode()) > MAX_NAME_BYTES:
            raise UsageError(f"output {shown(output)} has a name of more than {MAX_NAME_BYTES} bytes")
        if IS_WINDOWS and (reason := why_not_on_windows(part)):
            raise UsageError(f"output {shown(output)}: Windows takes no such file name, {reason}")
    _check_suffix(path.suffix)
    return str(path)


def _check_suffix(suffix: str) -> None:
    known = FORMATS.get(suffix.lower())
    if known is None or known is DZI:
        takes = " ".join(name for name, each in FORMATS.items() if each is not DZI)
        why = "is a folder of many files" if known is DZI else "is not known"
        raise FormatError(f"format {shown(suffix)} {why}; a batch writes {takes}")


def _named(file: Path, drafts: list[tuple[int, Request, str | None, int | None]], suffix: str) -> list[Task]:
    """Tasks with a seed, a name and a digest each: no two share a file, in systems too that see no difference of case
    or of how accents are written.

    Raises UsageError where two lines name the same file, or one a file in a folder that is another's file.
    """
    lines_of: dict[str, int] = {}
    for number, _, output, _ in drafts:
        if output is not None and (other := lines_of.setdefault(_as_seen(output), number)) != number:
            raise UsageError(f"{file}, line {number}: writes to {shown(output)} as line {other} does")
    times: Counter[tuple[str, str]] = Counter()
    tasks = []
    taken = set(lines_of)
    for number, request, output, quality in drafts:
        if request.seed is None:
            asked = request.prompt, request.negative
            times[asked] += 1
            request = dataclasses.replace(request, seed=_seed_of(request, times[asked]))
        if output is None:
            output = _free_name(request, suffix, taken, _digest(request, quality, suffix))
            taken.add(_as_seen(output))
        tasks.append(Task(number, request, output, quality, _digest(request, quality, output)))
    for task in tasks:
        for folder in PurePosixPath(_as_seen(task.output)).parents:
            if str(folder) in taken:
                raise UsageError(f"{file}, line {task.line}: {shown(task.output)} lies in what another line writes")
    return tasks


def _as_seen(output: str) -> str:
    """A name as file systems see it that tell the fewest names apart."""
    return unicodedata.normalize("NFC", output).casefold()


def _free_name(request: Request, suffix: str, taken: set[str], digest: str) -> str:
    """By prompt and seed; what has the same with other options gets some digits of its digest behind them."""
    name = f"{words_of(request.prompt) or 'picture'}-{request.seed}"
    names = chain([name, f"{name}-{digest[:6]}"], (f"{name}-{digest[:6]}-{number}" for number in count(2)))
    return next(found for each in names if _as_seen(found := f"{each}{suffix}") not in taken)


def _digest(request: Request, quality: int | None, output: str) -> str:
    """16 hexadecimal digits of what decides a picture and its file; what the machine decides is no part of it."""
    facts = {name: value for name, value in dataclasses.asdict(request).items() if name not in OF_MACHINE}
    facts |= {"model": _check_model(request.model), "quality": quality, "output": output}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _seed_of(request: Request, times: int) -> int:
    """A seed for those who gave none, as short as a random one: made of the prompt, the negative prompt, and how often
    both came before. Other options leave it as it is.
    """
    asked = json.dumps([request.prompt, request.negative, times])
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:4], "big")
