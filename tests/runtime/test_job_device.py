"""A job on cuda:1 works there whatever the current device is: what is asked of CUDA is recorded, on no device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from handscroll.runtime import decode, maps, rates
from handscroll.weights.pinned import pinned_bytes
from handscroll.weights.transfer import CudaTransfer

JOB = torch.device("cuda:1")
MIB = 2**20


class FakeStream:
    def __init__(self, recorder: Recorder, device: Any) -> None:
        self.recorder, self.device = recorder, torch.device(device)
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


class FakeEvent:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.made_on = recorder, recorder.current
        self.stream: FakeStream | None = None
        recorder.events.append(self)

    def record(self, stream: Any = None) -> None:
        assert stream is not None, "an event that is recorded without a stream belongs to the current device"
        assert self.recorder.current == stream.device.index, "recorded while another device is the current one"
        self.stream = stream

    def synchronize(self) -> None:
        pass


class Recorder:
    """CUDA with two devices, of which 0 is the current one."""

    def __init__(self) -> None:
        self.current = 0
        self.events: list[FakeEvent] = []
        self.pinned: list[tuple[int, int]] = []  # the current device, and the bytes
        self.streams = {index: FakeStream(self, f"cuda:{index}") for index in (0, 1)}
        self.empty = torch.empty

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        assert stream.device.index == self.current
        yield

    def current_stream(self, device: Any = None) -> FakeStream:
        assert device is not None, "the current device's stream is not the job's"
        return self.streams[torch.device(device).index]

    def make_empty(self, *size: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> Any:
        made = self.empty(*size, **options)
        if pin_memory:
            self.pinned.append((self.current, made.nbytes))
        return made


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(found, device))
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(found))
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(torch, "empty", found.make_empty)
    return found


def test_weights_are_copied_on_the_jobs_device(recorder: Recorder) -> None:
    transfer: Any = CudaTransfer(JOB)
    assert transfer.stream.device == JOB
    host, there = transfer.allocate_host(64), torch.zeros(64, dtype=torch.uint8)
    host.fill_(7)
    after = transfer.mark()
    copied = transfer.send(host, there, after)
    transfer.follow(copied)
    assert there.eq(7).all()
    assert transfer.stream.waited == [after]
    assert recorder.streams[1].waited == [copied]
    assert (after.stream, copied.stream) == (recorder.streams[1], transfer.stream)
    assert [event.made_on for event in recorder.events] == [1, 1]
    assert recorder.pinned == [(1, 64)]
    assert recorder.current == 0


def test_layers_on_the_host_share_pinned_blocks(recorder: Recorder) -> None:
    transfer: Any = CudaTransfer(JOB)
    each = 160 * MIB // 64
    transfer.expect(20 * each)
    pieces = [transfer.allocate_host(each) for _ in range(20)]
    taken = [n_bytes for _, n_bytes in recorder.pinned]
    assert all(n_bytes == pinned_bytes(n_bytes) for n_bytes in taken)
    assert sum(taken) < 1.15 * 20 * each
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert all(piece.eq(number).all() for number, piece in enumerate(pieces))
    # What is asked for beyond that is pinned by itself.
    transfer.allocate_host(8 * each)
    assert recorder.pinned[-1] == (1, 8 * each)
    transfer.expect(2 * each)
    transfer.allocate_host(each)
    assert recorder.pinned[-1] == (1, pinned_bytes(2 * each) // 2 if 2 * each & (2 * each - 1) else 2 * each)


class OnCuda:
    """A row block that says it is on cuda:1."""

    device = JOB
    dtype = torch.float32
    shape = torch.Size((1, 3, 4, 5))


def test_rows_come_back_by_an_event_of_the_jobs_device(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.arange(60, dtype=torch.uint8).view(4, 5, 3)
    monkeypatch.setattr(decode, "_to_uint8", lambda row_block: (pixels, torch.ones((), dtype=torch.bool)))
    on_their_way = decode._Pixels(OnCuda())  # type: ignore[arg-type]
    assert on_their_way.on_their_way
    assert (on_their_way.arrived() == pixels.numpy()).all()
    (event,) = recorder.events
    assert (event.made_on, event.stream) == (1, recorder.streams[1])
    assert {current for current, _ in recorder.pinned} == {1}


def test_a_map_on_the_host_is_pinned_for_the_jobs_device(recorder: Recorder) -> None:
    chunk = maps.HostMap(4).new_chunk(OnCuda(), 4)  # type: ignore[arg-type]
    assert chunk.shape == (1, 4, 4, 5)
    assert recorder.pinned == [(1, chunk.nbytes)]


def test_copies_are_timed_on_the_device_that_is_asked_about(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(
        torch, "ones", lambda *size, pin_memory, **options: recorder.make_empty(*size, pin_memory=pin_memory, **options)
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *given, **options: self)
    emptied: list[bool] = []
    monkeypatch.setattr(rates, "empty_pinned_cache", lambda: emptied.append(True))
    assert rates._copied_bytes_a_second("cuda:1") > 0
    assert waited == ["cuda:1"]
    assert recorder.pinned == [(1, 64 * MIB)]
    assert emptied == [True]
