"""Workers as processes of this machine, one for each device, or for each group of devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

from handscroll.batch.devices import on_device
from handscroll.batch.pool import At, Failed, Heard, Lost, Made, Pool, Ready, Said, Starts, WorkerError
from handscroll.system import how_it_ended, threads_of_each
from handscroll.units import last_line, one_line

COMMAND = ("-P", "-m", "handscroll.batch.worker")
END_S = 5.0  # for a process whose output has ended
MAX_REASON = 200


@dataclass
class _Process:
    number: int
    device: str
    process: subprocess.Popen[bytes]
    said: IO[bytes]  # on standard error
    is_ready: bool = False

    @property
    def name(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"

    def last_line(self) -> str:
        self.said.seek(0)
        return last_line(self.said.read(), MAX_REASON)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue  # a pipe that nobody reads any more


class LocalPool(Pool):
    """A process for each of these devices. One that ends is started anew on the same."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = list(devices)
        self._processes: dict[int, _Process] = {}
        self._heard: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        self._started = 0
        self._starts = Starts()

    def start(self, worker: int, task: Mapping[str, Any]) -> None:
        at = self._processes[worker]
        told = {**task, "request": on_device(task["request"], at.device), "processes": len(self._devices)}
        assert at.process.stdin is not None
        try:
            at.process.stdin.write(json.dumps(told).encode() + b"\n")
            at.process.stdin.flush()
        except OSError:
            return  # it has ended, which is heard next

    def replace(self, worker: int) -> None:
        at = self._processes.pop(worker)
        at.end()
        self._start_process(at.device)

    def heard(self, seconds: float) -> Sequence[Heard]:
        found = []
        try:
            found.append(self._heard.get(timeout=seconds))
            while True:
                found.append(self._heard.get_nowait())
        except Empty:
            pass
        return [self._understood(worker, line) for worker, line in found if worker in self._processes]

    def __enter__(self) -> Self:
        try:
            for device in self._devices:
                self._start_process(device)
        except OSError as error:
            self.__exit__(None, None, None)
            raise WorkerError(f"no worker can start: {one_line(error, MAX_REASON)}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for at in self._processes.values():
            at.end()
        self._processes.clear()

    def _start_process(self, device: str) -> None:
        self._started += 1
        environ = dict(os.environ)
        if device.startswith("cpu") and len(self._devices) > 1:
            environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(len(self._devices))))
        said = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, *COMMAND]
        pipe = subprocess.PIPE
        # In a session of its own, so that a terminal's Ctrl-C comes to the process that gives out the work alone.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=environ, start_new_session=True)
        at = self._processes[self._started] = _Process(self._started, device, process, said)
        threading.Thread(target=self._listen, args=(at,), daemon=True).start()

    def _listen(self, at: _Process) -> None:
        assert at.process.stdout is not None
        try:
            for line in at.process.stdout:
                self._heard.put((at.number, line))
        except ValueError:
            return  # closed by `end`
        self._heard.put((at.number, b""))

    def _understood(self, worker: int, line: bytes) -> Heard:
        at = self._processes[worker]
        if not line.endswith(b"\n"):  # its output has ended, perhaps in the middle of a line
            return self._lost(at)
        match json.loads(line):
            case {"ready": _}:
                at.is_ready = True
                self._starts.ready()
                return Ready(worker)
            case {"at": [stage, done, total]}:
                return At(worker, stage, done, total)
            case {"notice": str(said)}:
                return Said(worker, said)
            case {"made": dict(facts), **rest}:
                return Made(worker, facts, is_worn=bool(rest.get("worn")))
            case {"failed": dict(error)}:
                return Failed(worker, error)
        return Said(worker, f"{at.name} says what nobody understands: {one_line(line.decode(), MAX_REASON)}")

    def _lost(self, at: _Process) -> Lost:
        try:
            code: int | None = at.process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        why = f"{at.name} {'does not answer any more' if code is None else how_it_ended(code)}"
        said = at.last_line()
        why += f": {said}" if said and (code or 0) > 0 else ""
        at.end()
        del self._processes[at.number]
        others = any(each.is_ready for each in self._processes.values())
        if at.is_ready or self._starts.failed(why, others=others):
            self._start_process(at.device)
        return Lost(at.number, why)
