"""A file of prompts becomes tasks, and tasks pictures, each once, whatever ends in between. Workers are played here."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handscroll.batch.devices import arranged, devices_of_workers, on_device
from handscroll.batch.journal import DONE, Journal, WorkFolder
from handscroll.batch.lines import Task, read_tasks
from handscroll.batch.places import open_place
from handscroll.batch.pool import At, Failed, Heard, Lost, Made, Pool, Ready, WorkerError
from handscroll.batch.queue import BUSY_PAUSE_S, MOST_BUSY_S, TRIES, Queue
from handscroll.batch.run import Summary, run_batch
from handscroll.batch.worker import Maker
from handscroll.errors import BusyError, FormatError, HandscrollError, OutputError, UsageError
from handscroll.events import Progress, ignore
from handscroll.files import move_whole
from handscroll.request import Request


def tasks_of(folder: Path, text: str | bytes, name: str = "p.txt", **options: Any) -> list[Task]:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_tasks(file, options)


def json_lines(*lines: Any) -> str:
    return "\n".join(json.dumps(line) for line in lines)


# Lines


def test_every_line_of_text_is_a_prompt(tmp_path: Path) -> None:
    found = tasks_of(tmp_path, b"\xef\xbb\xbfa lake\r\n\r\n  \n- a red sun\n# not a comment\n--size 12")
    assert [task.request.prompt for task in found] == ["a lake", "- a red sun", "# not a comment", "--size 12"]
    assert [task.line for task in found] == [1, 4, 5, 6]
    assert [task.output.rpartition("-")[0] for task in found] == ["a-lake", "a-red-sun", "not-a-comment", "size-12"]


def test_a_line_of_json_has_options_of_its_own(tmp_path: Path) -> None:
    lines = json_lines(
        {"prompt": "a lake", "size": "128x64", "steps": 3, "guidance": 2, "seed": 7, "output": "lakes/one.webp"},
        {"prompt": "a lake", "width": 96, "height": 96, "negative": None, "quality": 50},
        "a bay in fog",
    )
    first, second, third = tasks_of(tmp_path, lines, "p.jsonl", size="256", steps=5, negative="rain")
    assert (first.request.width, first.request.height, first.request.steps) == (128, 64, 3)
    assert (first.request.seed, first.request.negative, first.output) == (7, "rain", "lakes/one.webp")
    assert (second.request.width, second.request.steps, second.request.negative) == (96, 5, "rain")
    assert (second.quality, first.quality) == (50, None)
    assert (third.request.prompt, third.request.height) == ("a bay in fog", 256)


def test_seeds_are_made_of_lines_and_equal_lines_have_others(tmp_path: Path) -> None:
    found = tasks_of(tmp_path, "a lake\na bay\na lake\na lake")
    assert found == tasks_of(tmp_path, "a lake\na bay\na lake\na lake")
    assert len({task.request.seed for task in found}) == 4
    minus_one = tasks_of(tmp_path, json_lines({"prompt": "a lake", "seed": -1}), "p.jsonl")
    assert minus_one[0].request.seed == found[0].request.seed
    longer = tasks_of(tmp_path, "a fox\na lake\na bay\na lake\na lake")
    assert [dataclasses.replace(task, line=0) for task in longer[1:]] == [
        dataclasses.replace(task, line=0) for task in found
    ]
    other = tasks_of(tmp_path, "a lake\na bay\na lake\na lake", steps=3, size="64")
    assert [(task.request.seed, task.output) for task in other] == [(task.request.seed, task.output) for task in found]
    assert all(task.digest != one.digest for task, one in zip(other, found, strict=True))


def test_a_count_gives_consecutive_seeds_and_numbered_names(tmp_path: Path) -> None:
    lines = json_lines({"prompt": "a lake", "seed": 7, "count": 2, "output": "x.png"}, {"prompt": "a bay", "seed": 7})
    found = tasks_of(tmp_path, lines, "p.jsonl", count=3)
    assert [(task.output, task.request.seed) for task in found] == [
        ("x-1.png", 7),
        ("x-2.png", 8),
        ("a-bay-7.png", 7),
        ("a-bay-8.png", 8),
        ("a-bay-9.png", 9),
    ]
    assert all(task.request.count == 1 for task in found)
    assert len({task.request.seed for task in tasks_of(tmp_path, "a lake", count=3)}) == 3


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path) -> None:
    lines = json_lines({"prompt": "a", "seed": 1, "output": "A-Lake-7.PNG"}, {"prompt": "a lake", "seed": 7}, "a lake")
    first, second, third = [task.output for task in tasks_of(tmp_path, lines, "p.jsonl", seed=7)]
    assert first == "A-Lake-7.PNG"
    assert re.fullmatch(r"a-lake-7-[0-9a-f]{6}\.png", second)
    assert third == second.replace(".png", "-2.png")
    accents = json_lines({"prompt": "a", "output": "e\u0301.png"}, {"prompt": "a", "output": "\u00e9.png"})
    with pytest.raises(UsageError, match="as line 1 does"):
        tasks_of(tmp_path, accents, "p.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": ""}, "empty"),
        ({"text": "a lake"}, "no prompt"),
        (["a lake"], "no prompt"),
        (7, "no prompt"),
        ({"prompt": 7}, "not text"),
        ({"prompt": "a", "size": "x"}, "size"),
        ({"prompt": "a", "width": 64}, "go together"),
        ({"prompt": "a", "stesp": 3}, "did you mean steps"),
        ({"prompt": "a", "steps": True}, "steps"),
        ({"prompt": "a", "memory": "2GiB"}, "of the whole batch"),
        ({"prompt": "a", "strip-rows": 4}, "of the whole batch"),
        ({"prompt": "a", "device": "cpu"}, "of the whole batch"),
        ({"prompt": "a", "model": "sana-1.7b"}, "sana-1.6b"),
        ({"prompt": "a", "quality": 101}, "quality"),
        ({"prompt": "a", "output": "../x.png"}, "below the folder"),
        ({"prompt": "a", "output": "/x.png"}, "below the folder"),
        ({"prompt": "a", "output": "C:x.png"}, "below the folder"),
        ({"prompt": "a", "output": "x\u0007.png"}, "characters"),
        ({"prompt": "a", "output": "batch.jsonl"}, "own files"),
        ({"prompt": "a", "output": "Batch.run/x.png"}, "own files"),
        ({"prompt": "a", "output": "x/" * 600 + "x.png"}, "1000 bytes"),
        ({"prompt": "a", "format": "webp"}, "give this line an output"),
        ({"prompt": "a", "output": "x.gif"}, "not known"),
        ({"prompt": "a", "output": "x.dzi"}, "folder of many files"),
        ({"prompt": "a", "output": "x"}, "not known"),
        ({"prompt": "a", "output": f"{'x' * 220}.png"}, "200 bytes"),
        ({"prompt": "a", "output": 7}, "not a file name"),
        ({"prompt": "a", "output": "x.webp", "size": 20_000}, "WebP"),
    ],
)
def test_what_a_line_cannot_mean_is_refused_by_its_number(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(HandscrollError, match=said) as caught:
        tasks_of(tmp_path, json_lines("a bay", line), "p.jsonl")
    assert "p.jsonl, line 2: " in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", b'{"prompt": "a"', "line 1: not JSON"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' occurs twice"),
        ("p.jsonl", b'{"prompt": "a", "guidance": NaN}', "line 1: NaN"),
        ("p.jsonl", b'"a"\n\n"\xff"', "line 3: not text in UTF-8"),
        ("p.txt", b"a\n\xff", "line 2: not text in UTF-8"),
        ("p.txt", b"a lake\n" + b"x" * 30_000, "line 2: the prompt has 30,000 characters"),
        ("p.txt", b" \n\n", "no prompt in it"),
        ("p.csv", b"a", "neither .txt"),
        ("p", b"a", "neither .txt"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(tmp_path: Path, name: str, text: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tasks_of(tmp_path, text, name)


def test_a_file_that_is_not_there_and_two_lines_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_tasks(tmp_path / "none.txt", {})
    below = json_lines({"prompt": "a", "output": "x.png"}, {"prompt": "b", "output": "X.png/b.png"})
    with pytest.raises(UsageError, match=r"line 2: .* lies in what another line writes"):
        tasks_of(tmp_path, below, "p.jsonl")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match="directory"):
        read_tasks(tmp_path / "folder.txt", {})
    twice = json_lines({"prompt": "a", "output": "x.png"}, "b", {"prompt": "c", "output": "X.png"})
    with pytest.raises(UsageError, match=r"line 3: writes to 'X\.png' as line 1 does"):
        tasks_of(tmp_path, twice, "p.jsonl")
    with pytest.raises(UsageError, match=r"line 1: .*; and 2 more lines that cannot be used"):
        tasks_of(tmp_path, json_lines({}, "a", {}, {}), "p.jsonl")
    with pytest.raises(UsageError, match="steps"):
        tasks_of(tmp_path, "a", steps=0)
    with pytest.raises(FormatError, match="gif"):
        read_tasks(tmp_path / "p.txt", {}, suffix=".gif")


@given(st.lists(st.tuples(st.sampled_from(["a lake", "A Lake", "-", "山", "a lake?"]), st.sampled_from([None, 7, -1]))))
@settings(max_examples=50, deadline=None)
def test_no_two_tasks_share_a_file_or_a_digest(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int | None]]
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    text = json_lines(*({"prompt": prompt, "seed": seed} for prompt, seed in lines), "one more")
    found = tasks_of(folder, text, "p.jsonl")
    assert len({task.output.casefold() for task in found}) == len({task.digest for task in found}) == len(lines) + 1
    assert found == tasks_of(folder, text, "p.jsonl")


def test_what_a_machine_decides_is_no_part_of_a_digest(tmp_path: Path) -> None:
    (plain,) = tasks_of(tmp_path, "a lake")
    (other,) = tasks_of(tmp_path, "a lake", memory="2GiB", device="cpu", strip_rows=4)
    assert (plain.digest, plain.output) == (other.digest, other.output)
    (steps,) = tasks_of(tmp_path, "a lake", steps=3)
    assert steps.digest != plain.digest


def test_a_request_as_the_command_line_takes_it() -> None:
    assert Request("a").as_arguments() == [
        "--model=tiny-landscape",
        "--count=1",
        "--precision=auto",
        "--device=auto",
        "--decode=rows",
        "--text-precision=auto",
    ]
    request = Request.of("a", size="96x64", memory="2GiB", compose="off", negative="-x", guidance=2, devices="cpu:2")
    options = dict(each.removeprefix("--").split("=", 1) for each in request.as_arguments())
    assert options["size"] == "96x64"
    assert Request.of("a", **{name.replace("-", "_"): value for name, value in options.items()}) == request


# What workers run on


@pytest.mark.parametrize(
    ("workers", "devices", "device", "gpus", "found"),
    [
        (None, None, "auto", 0, ["cpu"]),
        (None, None, "auto", 2, ["cuda:0", "cuda:1"]),
        ("3", None, "auto", 0, ["cpu"] * 3),
        ("1", None, "auto", 2, ["cuda:0"]),
        ("cpu:2", None, "auto", 2, ["cpu"] * 2),
        ("cuda:0,cuda:3", None, "auto", 4, ["cuda:0", "cuda:3"]),
        (None, "2", "auto", 5, ["cuda:0,cuda:1", "cuda:2,cuda:3"]),
        (None, "2", "auto", 0, ["cpu:2"]),
        ("2", "cpu:3", "auto", 2, ["cpu:3"] * 2),
        ("cuda:1,cuda:2,cuda:3", "3", "auto", 4, ["cuda:1,cuda:2,cuda:3"]),
        (None, None, "cpu", 2, ["cpu"]),
        ("2", None, "cuda:1", 2, ["cuda:1"] * 2),
        (None, None, "cuda", 2, ["cuda:0", "cuda:1"]),
        ("1", None, "cuda", 2, ["cuda:0"]),
    ],
)
def test_devices_of_workers(workers: str | None, devices: str | None, device: str, gpus: int, found: list[str]) -> None:
    assert devices_of_workers(workers, devices, device, gpus) == found


@pytest.mark.parametrize(
    ("workers", "devices", "device", "gpus", "said"),
    [
        ("3", None, "auto", 2, "more than"),
        ("2", "2", "auto", 3, "more than"),
        (None, "4", "auto", 2, "fewer than"),
        ("cuda:0,cuda:1", "cpu:2", "auto", 2, "are not"),
        (None, "cuda:0,cuda:1", "auto", 2, "--workers cuda:0,cuda:1"),
        ("cuda:0", None, "cpu", 2, "leave one of them out"),
        ("cuda:0,cuda:2", None, "auto", 2, "cuda:2 is not here"),
        (None, None, "cuda:0", 0, "cuda:0 is not here"),
        (None, None, "cuda", 0, "no GPU is here"),
        ("cuda:0,cuda:1,cuda:2", "2", "auto", 3, "leave 1 of them out"),
    ],
)
def test_devices_that_workers_cannot_have(
    workers: str | None, devices: str | None, device: str, gpus: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        devices_of_workers(workers, devices, device, gpus)


@pytest.mark.parametrize(
    ("machines", "workers", "device", "devices", "most", "found"),
    [
        ([(8, 0), (8, 0)], None, "auto", None, None, (2, 1, 0, "cpu", 8, 1)),
        ([(8, 0), (8, 0)], 4, "auto", None, None, (4, 1, 0, "cpu", 4, 2)),
        ([(8, 0), (8, 0)], 4, "auto", None, 1, (1, 1, 0, "cpu", 16, 1)),
        ([(8, 0), (2, 0)], None, "auto", "cpu:4", None, (1, 4, 0, "cpu:4", 0, 1)),
        ([(8, 4), (8, 2)], None, "auto", None, None, (6, 1, 1, "cuda", 0, 3)),
        ([(8, 4), (8, 3)], None, "cuda", "2", None, (3, 1, 2, "2", 0, 2)),
        ([(8, 4), (8, 3)], None, "cpu", None, None, (2, 1, 0, "cpu", 8, 1)),
        ([(0, 0), (4, 0)], None, "auto", None, None, (1, 1, 0, "cpu", 4, 1)),
    ],
)
def test_workers_of_a_cluster(
    machines: list[tuple[int, int]], workers: int | None, device: str, devices: str | None, most: int | None, found: Any
) -> None:
    there = [{"CPU": float(cores), "GPU": float(gpus)} for cores, gpus in machines]
    made = arranged(there, workers, device, devices, most)
    assert (made.workers, made.cpus, made.gpus, made.device, made.threads, made.on_a_machine) == found


@pytest.mark.parametrize(
    ("workers", "device", "devices", "said"),
    [
        (3, "auto", None, "2 cores and 0 GPUs on 2 machines; use --workers 2 or fewer"),
        (None, "auto", "cpu:2", "no machine enough of them for --devices cpu:2"),
        (None, "cuda", None, "no GPU"),
        (None, "cuda:0", None, "names a GPU of this machine"),
    ],
)
def test_workers_that_a_cluster_cannot_have(workers: int | None, device: str, devices: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        arranged([{"CPU": 1.0}, {"CPU": 1.0}], workers, device, devices, None)


def test_a_request_is_told_what_its_worker_runs_on() -> None:
    asked = dataclasses.asdict(Request("a", memory_bytes=2**30))
    for device, fields in [("cpu", ("cpu", None)), ("cuda:1", ("cuda:1", None)), ("cpu:2", ("auto", "cpu:2"))]:
        request = Request(**on_device(asked, device))
        assert (request.device, request.devices) == fields
    assert Request(**on_device(asked, "cuda:0,cuda:1")).devices == "cuda:0,cuda:1"


# The queue


def some_tasks(count: int) -> list[Task]:
    return [Task(n + 1, Request("a", seed=n), f"a-{n}.png", None, f"{n:016x}") for n in range(count)]


def test_a_lost_task_comes_first_and_not_for_ever() -> None:
    first, second = some_tasks(2)
    queue = Queue([first, second])
    assert queue.next(0.0) == first
    for _ in range(TRIES - 1):
        assert queue.lost(first, 1.0)
        assert queue.next(1.0) == first
    assert queue.tries(first) == TRIES
    assert not queue.lost(first, 1.0)
    assert queue.next(1.0) == second
    assert queue.next(1.0) is None
    assert not len(queue)


def test_a_busy_task_waits_and_lets_others_go_first() -> None:
    first, second = some_tasks(2)
    queue = Queue([first, second])
    assert queue.next(0.0) == first
    assert queue.busy(first, 0.0)
    assert queue.next(0.0) == second
    assert queue.next(0.0) is None
    assert len(queue) == 1
    assert queue.next(BUSY_PAUSE_S) == first
    assert queue.tries(first) == 1
    assert not queue.busy(first, MOST_BUSY_S + 1)


# The batch, with workers that are played


class Played(Pool):
    """Workers that make, fail, end or find others at work, as `plays` says for each try of a task."""

    def __init__(self, folder: Path, size: int, plays: Mapping[str, Sequence[str]], *, shared: bool = True) -> None:
        self.folder, self.count, self.plays, self.shared = folder, size, plays, shared
        self.begun: Counter[str] = Counter()
        self.told: list[Heard] = []
        self.numbers = 0
        self.at_work: set[int] = set()
        self.replaced: list[int] = []

    def replace(self, worker: int) -> None:
        assert worker not in self.at_work
        self.replaced.append(worker)
        self._ready()

    def start(self, worker: int, task: Mapping[str, Any]) -> None:
        assert worker not in [*self.at_work, *self.replaced]
        self.at_work.add(worker)
        path = Path(task["path"])
        digest = path.stem
        tries = self.plays.get(digest, ())
        play = tries[self.begun[digest]] if self.begun[digest] < len(tries) else "made"
        self.begun[digest] += 1
        if play in ("made", "lost after"):
            content = f"{digest} {task['request']['seed']}".encode()
            if self.shared:
                path.write_bytes(content)
            if play == "made":
                self.told += [At(worker, "denoise", 1, 2), Made(worker, {"steps": 2}, None if self.shared else content)]
        if play in ("worn", "sick", "rank"):
            if play == "worn":
                path.write_bytes(b"made")
            code = {"sick": "unexpected", "rank": "rank_failed"}.get(play, "")
            worn = Made(worker, {}, is_worn=True)
            self.told.append(worn if play == "worn" else Failed(worker, {"code": code, "message": "CUDA error"}))
        if play == "failed":
            self.told.append(Failed(worker, {"code": "not_finite", "message": "NaN"}))
        if play == "full":
            self.told.append(Failed(worker, {"code": OutputError.code, "message": "disk full"}))
        if play == "busy":
            self.told.append(Failed(worker, {"code": BusyError.code, "message": "busy"}))
        if play.startswith("lost"):
            self.told.append(Lost(worker, f"worker {worker} was ended by SIGKILL"))

    def heard(self, seconds: float) -> Sequence[Heard]:
        random.Random(len(self.told)).shuffle(self.told)
        told, self.told = sorted(self.told, key=lambda each: not isinstance(each, At)), []
        for each in told:
            if not isinstance(each, At):
                self.at_work.discard(each.worker)
            if isinstance(each, Lost):
                self._ready()
        return told

    def _ready(self) -> None:
        self.numbers += 1
        self.told.append(Ready(self.numbers))

    def __enter__(self) -> Self:
        for _ in range(self.count):
            self._ready()
        return self

    def __exit__(self, *_: object) -> None:
        pass


def play(
    tasks: Sequence[Task], address: str, plays: Mapping[str, Sequence[str]] | None = None, **options: Any
) -> tuple[Summary, list[str], Counter[str]]:
    """The summary, the pictures as they were told of, and how often a worker began each."""
    pools: list[Played] = []
    size, shared = options.pop("size", 2), options.pop("shared", True)

    def make_pool(folder: Path, to_do: Sequence[Task]) -> Pool:
        pools.append(Played(folder, size, plays or {}, shared=shared))
        return pools[0]

    told: list[str] = []
    summary = run_batch(
        tasks, open_place(address), make_pool, options.pop("on_event", ignore), on_picture=told.append, **options
    )
    return summary, told, pools[0].begun if pools else Counter()


@given(
    st.lists(st.lists(st.sampled_from(["made", "failed", "lost", "lost after"]), max_size=4), min_size=1, max_size=12),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_picture_is_put_in_its_place_once(
    tmp_path_factory: pytest.TempPathFactory, plays: list[list[str]], size: int, shared: bool
) -> None:
    folder = tmp_path_factory.mktemp("batch") / "out"
    tasks = some_tasks(len(plays))
    by_digest = {task.digest: each for task, each in zip(tasks, plays, strict=True)}
    summary, told, begun = play(tasks, str(folder), by_digest, size=size, shared=shared)

    def ends(each: list[str]) -> str:
        tries = [*each, "made", "made", "made"]
        for number, what in enumerate(tries[:TRIES]):
            if what in ("made", "failed"):
                return what
            assert number < TRIES
        return "lost"

    made = {task.output for task, each in zip(tasks, plays, strict=True) if ends(each) == "made"}
    assert sorted(told) == sorted(str(folder / output) for output in made)
    assert {path.name for path in folder.glob("*.png")} == made
    assert (summary.made, summary.kept, len(summary.failed)) == (len(made), 0, len(tasks) - len(made))
    lines = [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]
    assert Counter(line["output"] for line in lines if line["status"] == DONE) == Counter(made)
    assert all(count <= TRIES for count in begun.values())
    assert not (folder / "batch.run").exists() or len(made) < len(tasks)
    # The second time makes what was not made, and nothing else.
    again, told_again, begun_again = play(tasks, str(folder))
    assert (again.kept, again.made) == (len(made), len(tasks) - len(made))
    assert set(begun_again) == {task.digest for task in tasks if task.output not in made}
    assert not (folder / "batch.run").exists()
    assert len(told_again) == len(tasks)


def test_a_picture_that_others_hold_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handscroll.batch.queue.BUSY_PAUSE_S", 0.0)
    tasks = some_tasks(2)
    summary, _, begun = play(tasks, str(tmp_path), {tasks[0].digest: ["busy", "busy"]})
    assert (summary.made, summary.failed, begun[tasks[0].digest]) == (2, [], 3)


def test_an_end_between_any_two_steps_loses_and_repeats_nothing(tmp_path: Path) -> None:
    first, second, third, fourth = tasks = some_tasks(4)
    work = WorkFolder(tmp_path / "batch.run")
    work.finished(first.digest, ".png").write_text("finished, and nobody was told")
    work.finished(second.digest, ".png").write_text("told of, and not in its place")
    journal = Journal(tmp_path / "batch.jsonl")
    journal.add({"output": second.output, "task": second.digest, "status": DONE})
    journal.add({"output": third.output, "task": third.digest, "status": DONE})  # and removed by its user
    with (tmp_path / "batch.jsonl").open("ab") as file:
        file.write(b'{"output": "a-3.png", "task": "0000')  # torn
    work.close()
    summary, told, begun = play(tasks, str(tmp_path))
    assert (summary.kept, summary.made) == (1, 3)
    assert told[0] == str(tmp_path / second.output)
    assert (tmp_path / second.output).read_text() == "told of, and not in its place"
    assert set(begun) == {first.digest, third.digest, fourth.digest}
    assert Journal(tmp_path / "batch.jsonl").has_made(fourth.output, fourth.digest)


def test_other_settings_make_the_picture_anew_and_back(tmp_path: Path) -> None:
    (task,) = some_tasks(1)
    other = dataclasses.replace(task, digest="f" * 16)
    for each, made in [(task, 1), (other, 1), (other, 0), (task, 1)]:
        summary, _, _ = play([each], str(tmp_path))
        assert summary.made == made


def test_files_of_others_are_not_replaced_unasked(tmp_path: Path) -> None:
    tasks = some_tasks(2)
    mine = tmp_path / tasks[0].output
    mine.write_text("mine")
    with pytest.raises(OutputError, match=r"a-0\.png: there already, and not made by this batch"):
        play(tasks, str(tmp_path))
    assert not (tmp_path / tasks[1].output).exists()
    summary, _, _ = play(tasks, str(tmp_path), existing="keep")
    assert (summary.kept, summary.made, mine.read_text()) == (1, 1, "mine")
    summary, _, _ = play(tasks, str(tmp_path), existing="replace")
    assert (summary.kept, summary.made) == (1, 1)
    assert mine.read_text() != "mine"
    summary, _, _ = play(tasks, str(tmp_path))
    assert summary.kept == 2


def test_a_failed_try_leaves_the_picture_known_as_the_batchs(tmp_path: Path) -> None:
    (task,) = some_tasks(1)
    play([task], str(tmp_path))
    other = dataclasses.replace(task, digest="f" * 16)
    summary, _, _ = play([other], str(tmp_path), {other.digest: ["failed"]})
    assert len(summary.failed) == 1
    summary, _, _ = play([other], str(tmp_path))
    assert summary.made == 1


def test_one_batch_works_in_a_folder(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "batch.run")
    with pytest.raises(BusyError, match="another batch"):
        play(some_tasks(1), str(tmp_path))
    work.close()
    assert not (tmp_path / "batch.run").exists()
    (tmp_path / "batch.run").write_text("in the way")
    with pytest.raises(HandscrollError, match="in the way"):
        play(some_tasks(1), str(tmp_path))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        open_place(str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot make"):
        open_place(str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="nosuch"):
        open_place("nosuch://bucket")
    for address in ("", "s3:/bucket"):
        with pytest.raises(UsageError, match="is no folder and no address"):
            open_place(address)
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    with pytest.raises(OutputError, match="link to nowhere"):
        open_place(str(tmp_path / "nowhere"))


def test_an_address_of_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    tasks = some_tasks(3)
    tasks[0] = dataclasses.replace(tasks[0], output="below/it/a.png")
    plays = {tasks[1].digest: ["failed"]}
    summary, told, _ = play(tasks, "memory://bucket/lakes/", plays)
    assert (summary.made, len(summary.failed)) == (2, 1)
    assert sorted(told) == ["memory://bucket/lakes/a-2.png", "memory://bucket/lakes/below/it/a.png"]
    assert memory.cat("/bucket/lakes/below/it/a.png") == f"{tasks[0].digest} 0".encode()
    # From another machine, whose cache is empty, it goes on: the journal lies beside the pictures.
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "other"))
    summary, _, begun = play(tasks, "memory://bucket/lakes")
    assert (summary.kept, summary.made, set(begun)) == (2, 1, {tasks[1].digest})
    assert not list((tmp_path / "other").rglob("*.png"))
    memory.pipe("/bucket/lakes/a-9.png", b"mine")
    nine = [dataclasses.replace(tasks[0], output="a-9.png", digest="9" * 16)]
    with pytest.raises(OutputError, match=r"memory://bucket/lakes/a-9\.png: there already"):
        play(nine, "memory://bucket/lakes")


def test_an_address_that_fails_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("handscroll.batch.places.PAUSE_S", 0.0)
    place = open_place("memory://shaky")
    failures = [OSError("connection reset"), OSError("connection reset")]
    upload = place._upload  # type: ignore[attr-defined]

    def shaky(file: Path, name: str) -> None:
        if failures:
            raise failures.pop()
        upload(file, name)

    monkeypatch.setattr(place, "_upload", shaky)
    (tmp_path / "x").write_bytes(b"x")
    place.put(tmp_path / "x", "x.png")
    assert not failures
    assert place.present(["x.png", "y.png"]) == {"x.png"}
    failures += [OSError("connection reset")] * 3
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot write memory://shaky/y\.png: connection reset"):
        place.put(tmp_path / "x", "y.png")


def test_progress_is_over_the_whole(tmp_path: Path) -> None:
    tasks = some_tasks(3)
    heard: list[Progress] = []
    play(tasks, str(tmp_path), {tasks[1].digest: ["lost"], tasks[2].digest: ["failed"]}, on_event=heard.append)
    counts = [event.done for event in heard if event.stage == "batch"]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 3)
    assert "1 failed" in [event.detail for event in heard if event.stage == "batch"][-1]
    notices = [event.detail for event in heard if event.stage == "notice"]
    assert any("line 2: worker" in line and "it is tried again" in line for line in notices)
    assert "line 3: NaN" in notices


def test_a_sick_or_worn_worker_makes_no_other_picture(tmp_path: Path) -> None:
    tasks = some_tasks(3)
    plays = {tasks[0].digest: ["sick"], tasks[1].digest: ["worn"], tasks[2].digest: ["rank", "rank", "rank"]}
    pools: list[Played] = []

    def make_pool(folder: Path, to_do: Sequence[Task]) -> Pool:
        pools.append(Played(folder, 1, plays))
        return pools[0]

    summary = run_batch(tasks, open_place(str(tmp_path)), make_pool, ignore)
    assert (summary.made, len(summary.failed), len(pools[0].replaced)) == (2, 1, 2)
    assert [each["line"] for each in summary.retried] == [1, 3, 3]
    assert summary.failed[0]["error"] == {"code": "rank_failed", "message": "CUDA error"}


def test_under_a_budget_a_process_makes_pictures_of_one_kind(tmp_path: Path) -> None:
    sizes = [(64, 1), (64, 2), (96, 3), (96, 4), (64, 5)]
    requests = [Request(f"a {n}", width=side, height=side, seed=n, memory_bytes=2**30) for side, n in sizes]
    tasks = [dataclasses.replace(task, request=each) for task, each in zip(some_tasks(5), requests, strict=True)]
    pools: list[Played] = []

    def make_pool(folder: Path, to_do: Sequence[Task]) -> Pool:
        pools.append(Played(folder, 1, {}))
        return pools[0]

    summary = run_batch(tasks, open_place(str(tmp_path)), make_pool, ignore)
    assert (summary.made, pools[0].replaced) == (5, [1])  # those of a kind follow each other


def test_what_is_all_there_need_not_be_writable(tmp_path: Path) -> None:
    tasks = some_tasks(2)
    play(tasks, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
    summary, told, _ = play(tasks, str(tmp_path))
    assert (summary.kept, len(told)) == (2, 2)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_another_file_left_unfinished_stays(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "batch.run")
    (work.folder / "ffff.png.run").mkdir()
    work.close()
    tasks = some_tasks(2)
    play(tasks, str(tmp_path), {tasks[0].digest: ["failed"]})
    (tmp_path / "batch.run" / f"{tasks[0].digest}.png.run").mkdir()
    play(tasks, str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "batch.run").iterdir()) == ["ffff.png.run", "lock"]


def test_a_file_in_the_place_of_the_journal_is_left_alone(tmp_path: Path) -> None:
    journal = tmp_path / "batch.jsonl"
    journal.write_text('{"prompt": "a lake", "output": "a.png"}\n')
    with pytest.raises(OutputError, match="no journal of a batch"):
        play(some_tasks(1), str(tmp_path))
    journal.unlink()
    journal.symlink_to(tmp_path / "other")
    with pytest.raises(OutputError, match="no plain file"):
        play(some_tasks(1), str(tmp_path))
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(OutputError, match="no plain file"):
        play(some_tasks(1), str(tmp_path))


def test_folders_and_files_in_the_way_are_refused_before_any_work(tmp_path: Path) -> None:
    first, second = some_tasks(2)
    (tmp_path / first.output).mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        play([first, second], str(tmp_path), existing="replace")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        play([dataclasses.replace(second, output="file/x.png")], str(tmp_path))
    assert not (tmp_path / "batch.run").exists()


def test_machines_that_share_an_address_share_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, address = some_tasks(4), f"file://{tmp_path}/out"
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "one"))
    play(tasks[:2], address)
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "two"))
    assert play(tasks[:3], address)[0].kept == 2
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "one"))
    summary, _, begun = play(tasks, address)
    assert (summary.kept, summary.made, set(begun)) == (3, 1, {tasks[3].digest})

    class Killed(BaseException):
        pass

    def kill(path: str) -> None:
        raise Killed

    more = [dataclasses.replace(task, digest=f"9{task.digest[1:]}", output=f"b-{task.output}") for task in tasks]
    with pytest.raises(Killed):
        run_batch(more, open_place(address), lambda folder, to_do: Played(folder, 1, {}), ignore, on_picture=kill)
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "three"))
    summary, _, _ = play([*tasks, *more], address)
    assert (summary.kept, summary.made) == (5, 3)
    assert len((tmp_path / "out" / "batch.jsonl").read_text().splitlines()) == 8


def test_silence_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handscroll.batch.run.SILENT_S", -1.0)
    heard: list[Progress] = []
    play(some_tasks(1), str(tmp_path), on_event=heard.append, size=1)
    assert not [event for event in heard if "nothing was heard" in event.detail]

    class Slow(Played):
        waits = 3

        def heard(self, seconds: float) -> Sequence[Heard]:
            if self.at_work and self.waits:
                self.waits -= 1
                return []
            return super().heard(seconds)

    tasks = [dataclasses.replace(task, output=f"b-{task.output}") for task in some_tasks(1)]
    run_batch(tasks, open_place(str(tmp_path)), lambda folder, to_do: Slow(folder, 1, {}), heard.append)
    assert [event for event in heard if "nothing was heard of its worker" in event.detail]


def test_a_full_disk_ends_the_batch(tmp_path: Path) -> None:
    tasks = some_tasks(3)
    with pytest.raises(OutputError, match="line 2: disk full"):
        play(tasks, str(tmp_path), {tasks[1].digest: ["full"]}, size=1)
    summary, _, _ = play(tasks, str(tmp_path))
    assert (summary.kept, summary.made) == (1, 2)


def test_a_file_moves_whole_to_another_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    replace = os.replace

    def across(one: Path, other: Path) -> None:
        if one == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(one, other)

    monkeypatch.setattr(os, "replace", across)
    source.write_text("new")
    target.write_text("old")
    move_whole(source, target)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
    source.write_text("new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        move_whole(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "source", "target"]


def test_nobody_to_work_ends_the_batch_and_keeps_what_is_made(tmp_path: Path) -> None:
    class Dying(Played):
        def heard(self, seconds: float) -> Sequence[Heard]:
            if self.begun.total() >= 2 and not self.told:
                raise WorkerError("no worker can start")
            return super().heard(seconds)

        def start(self, worker: int, task: Mapping[str, Any]) -> None:
            if self.begun.total() >= 2:
                return
            super().start(worker, task)

    tasks = some_tasks(4)
    with pytest.raises(WorkerError) as caught:
        run_batch(tasks, open_place(str(tmp_path)), lambda folder, to_do: Dying(folder, 1, {}), ignore)
    assert caught.value.__notes__ == ["2 of 4 pictures are there; the same command goes on"]
    assert play(tasks, str(tmp_path))[0].kept == 2


# What a worker does


def test_a_worker_says_why_it_cannot(tmp_path: Path) -> None:
    def task(**request: Any) -> dict[str, Any]:
        fields = dataclasses.asdict(Request("a", seed=1, **request))
        return {"request": fields, "path": str(tmp_path / "x.png"), "quality": None, "processes": 1}

    make_picture = Maker().make
    told = make_picture(task(model=str(tmp_path)), ignore)
    assert told["failed"]["code"] == "bad_checkpoint"
    told = make_picture(task(width=64, height=64, steps=1, memory_bytes=1), ignore)
    assert told["failed"]["code"] == "budget_too_small"
    (tmp_path / "x.png").write_text("finished by one that was lost")
    assert make_picture(task(), ignore) == {"made": {}}
