"""A job's listener: on which thread it runs, when, what it may raise, and what is left then."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from handscroll import Cancelled, Handscroll, Request, generate, resume
from handscroll.cli import log
from handscroll.errors import HandscrollError, OutputError
from handscroll.events import Progress, pulse
from handscroll.models.opening import open_checkpoint
from handscroll.pictures import encoding, writing
from handscroll.pictures.targets import check_target
from handscroll.pictures.writing import write_image
from handscroll.plan.search import make_plan
from handscroll.runtime.decode import DecodeProgress
from handscroll.runtime.probe import probe
from handscroll.threads import run_watched

Miniature = Callable[..., Path]


class Asked(Exception):
    """What a listener raises that wants a job to end."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def growing(miniature: Miniature) -> Request:
    """Of a picture that grows once: its small one is decoded and encoded on the way."""
    return Request("a lake", model=str(miniature("1.6b")), width=128, height=64, steps=2, seed=3, compose_px=64)


def slow_encoder(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.4) -> None:
    encode = encoding.encode_picture

    def slowed(*arguments: Any) -> None:
        time.sleep(seconds)
        encode(*arguments)

    monkeypatch.setattr(writing, "encode_picture", slowed)


@pytest.fixture(scope="module")
def expected(growing: Request, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The picture's file where nobody ends the job."""
    (whole,) = generate(growing, tmp_path_factory.mktemp("whole") / "p.png")
    return whole.path.read_bytes()


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("text", Cancelled()),
        ("denoise", MemoryError()),
        ("encode", KeyboardInterrupt()),
        ("decode", OSError(28, "no")),
        ("write", OSError(28, "no")),
        ("write", Cancelled()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_job_ends_between_two_blocks_of_any_stage(
    growing: Request, expected: bytes, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    slow_encoder(monkeypatch)
    events: list[Progress] = []

    def stop(event: Progress) -> None:
        events.append(event)
        if event.stage == "pulse" and event.detail == stage:
            raise error

    with pytest.raises(type(error)) as caught:
        generate(growing, Path("p.png"), on_event=stop)
    assert caught.value is error
    assert not [event for event in events if event.stage == "notice"], "nothing is tried again"
    assert not Path("p.png").exists()
    kept = [path.name for path in Path().iterdir()]
    assert kept == ([] if stage in ("text", "denoise") else ["p.png.run"])
    assert ("goes on" in "".join(getattr(error, "__notes__", ()))) == bool(kept)
    if kept:
        (again,) = resume(Path("p.png.run"))
        assert again.path.read_bytes() == expected
        assert [path.name for path in Path().iterdir()] == ["p.png"]


def test_every_event_comes_on_the_jobs_own_thread(growing: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_encoder(monkeypatch)
    told: list[tuple[Progress, int]] = []

    def work() -> int:
        generate(growing, Path("p.png"), on_event=lambda event: told.append((event, threading.get_ident())))
        return threading.get_ident()

    thread = run_watched(work, lambda: None, lambda: None)
    assert {ident for _, ident in told} == {thread}
    assert {event.stage for event, _ in told} == {"text", "denoise", "decode", "write", "pulse"}
    stages = {event.detail for event, _ in told if event.stage == "pulse"}
    assert stages == {"text", "denoise", "decode", "encode", "write"}


def test_the_class_ends_as_well(growing: Request) -> None:
    scroll = Handscroll.from_pretrained(growing.model)

    def stop(event: Progress) -> None:
        if event == pulse("denoise"):
            raise Cancelled

    with pytest.raises(Cancelled):
        scroll("a lake", width=64, height=64, steps=1, seed=1, on_event=stop)
    assert scroll("a lake", width=64, height=64, steps=1, seed=1).numpy().shape == (64, 64, 3)


def test_cancelling_is_nobodys_fault() -> None:
    assert issubclass(Cancelled, HandscrollError)
    assert (Cancelled.exit_code, Cancelled().as_dict()) == (130, {"code": "cancelled", "message": "cancelled"})


def test_what_a_listener_raises_at_a_notice_is_no_fault_of_the_file(miniature: Miniature, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "logvar.weight": torch.zeros(3)}, file)
    left = ConnectionResetError("the client has left")

    def stop(event: Progress) -> None:
        if event.stage == "notice":
            raise left

    request = Request("a lake", model=str(folder), width=64, height=64, steps=1, seed=3)
    with pytest.raises(ConnectionResetError) as caught:
        generate(request, Path("p.png"), on_event=stop)
    assert caught.value is left


# Decoding


def test_decoding_moves_from_its_first_sweep_on(miniature: Miniature) -> None:
    request = Request("a lake", model=str(miniature("1.6b")), width=160, height=320, steps=1, seed=1)
    events: list[Progress] = []
    generate(request, Path("p.png"), on_event=events.append)
    decoding = [event for event in events if event.stage == "decode"]
    done, rows = [event.done for event in decoding], [event.rows for event in decoding]
    assert (done[0], rows[0]) == (0, 0)
    assert done == sorted(done)
    assert rows == sorted(rows)
    assert (done[-1], rows[-1]) == (320, 320)
    assert {event.total for event in decoding} == {320}
    before_rows = [event.done for event in decoding if not event.rows]
    assert len(set(before_rows)) > 3
    spec = open_checkpoint(request.model)
    planned = make_plan(spec, request, probe(spec, request), 1).decoding
    assert planned is not None
    share = planned.share_done(len(planned.sweeps) - 1, 0.0)
    assert 0 < share < 1
    assert max(before_rows) == pytest.approx(share * 320, abs=0.1 * 320)


@pytest.mark.parametrize("starts_over", [False, True])
def test_each_sweep_counts_as_long_as_it_takes(miniature: Miniature, starts_over: bool) -> None:
    spec = open_checkpoint(miniature("1.6b"))
    request = Request("a lake", width=1024, height=1024, steps=1, seed=1, memory_bytes=2**40)
    plan = make_plan(spec, request, probe(spec, request), 1)
    assert plan.decoding is not None
    events: list[Progress] = []
    told = DecodeProgress(events.append, plan, 0)
    count = len(plan.decoding.sweeps)
    for index in range(count):
        for share in (0.25, 0.5, 1.0):
            told.on_sweep_rows(index, count, share)
        if starts_over and index == 1:
            told.on_sweep_rows(0, count, 0.5)
    for rows in (1, 511, 1024):
        told.on_rows(rows)
    seconds = [sweep.seconds for sweep in plan.decoding.sweeps]
    expected = [
        (sum(seconds[:index]) + share * seconds[index]) / sum(seconds)
        for index in range(count - 1)
        for share in (0.25, 0.5, 1.0)
    ]
    done = [event.done for event in events]
    assert done == sorted(done)
    assert done[-1] == 1024
    if not starts_over:
        assert done[1:-3] == [int(share * 1024) for share in expected]


@pytest.mark.parametrize("decode", ["whole", "tiled", "patch"])
def test_other_ways_to_decode_count_rows(miniature: Miniature, decode: Any) -> None:
    request = Request("a lake", model=str(miniature("1.6b")), width=64, height=96, steps=1, seed=1, decode=decode)
    events: list[Progress] = []
    generate(request, Path("p.png"), on_event=events.append)
    assert [(event.done, event.rows) for event in events if event.stage == "decode"][-1] == (96, 96)


# Writing


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.dzi", "p.webp"])
@pytest.mark.parametrize("beside", [False, True])
def test_encoding_ends_soon(tmp_path: Path, name: str, beside: bool) -> None:
    side = 3072 if name != "p.webp" else 2048
    target = check_target(tmp_path / name, side, side)
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    asked_at: list[float] = []

    def stop() -> None:
        asked_at.append(time.monotonic())
        raise Asked

    with pytest.raises(Asked):
        write_image(target, iter([noise]), on_wait=stop, beside=beside)
    assert len(asked_at) == 1
    # libwebp takes a picture in one piece and cannot be stopped.
    assert time.monotonic() - asked_at[0] < 5 or name == "p.webp"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("here", "cache")] == []


# Work on another thread


def test_watched_work_gives_what_it_finds() -> None:
    looks: list[int] = []
    assert run_watched(lambda: 7, lambda: looks.append(threading.get_ident()), pytest.fail) == 7
    assert looks == [threading.get_ident()]


def test_watched_work_raises_what_it_raises() -> None:
    def fail() -> None:
        raise OutputError("no")

    with pytest.raises(OutputError, match="no"):
        run_watched(fail, lambda: None, pytest.fail)


def test_what_a_look_raises_stops_the_work() -> None:
    stopped = threading.Event()

    def look() -> None:
        raise Asked

    with pytest.raises(Asked):
        run_watched(lambda: stopped.wait(60), look, stopped.set)
    assert stopped.is_set()


# Lines where there is no terminal


def test_a_long_job_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listen = log.Log(pictures=2)
    for second in range(100):
        now[0] = float(second)
        listen(Progress("denoise", second // 10, 20, picture=1))
        listen(pulse("denoise"))
    assert capsys.readouterr().err.splitlines() == [
        "denoising 2/2 3/20 steps, 30.0 s so far",
        "denoising 2/2 6/20 steps, 60.0 s so far",
        "denoising 2/2 9/20 steps, 90.0 s so far",
    ]


def test_a_short_job_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    log.Log()(Progress("fetch", 1, 2, detail="owner/model"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("passed", "between"), [(0, 30), (250, 30), (600, 60), (36_000, 3600)])
def test_lines_are_rarer_in_longer_jobs(passed: float, between: float) -> None:
    assert log.seconds_between_lines(passed) == between
