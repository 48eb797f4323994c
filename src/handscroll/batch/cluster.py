"""Workers as actors of a Ray cluster, one for each GPU or machine. Ray keeps count of machines and processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from handscroll.batch.devices import arranged, on_device
from handscroll.batch.journal import TOKEN
from handscroll.batch.pool import At, Failed, Heard, Lost, Made, Pool, Ready, Said, Starts, WorkerError
from handscroll.batch.worker import Maker, described
from handscroll.errors import OutputError, UsageError
from handscroll.events import Progress
from handscroll.files import cache_folder
from handscroll.units import duration, one_line
from handscroll.version import __version__

CONNECT_S, JOIN_S = 5.0, 40.0
LOOK_EVERY_S = 2.0
WAITS_S, MOST_WAITS_S = 30.0, 300.0  # before the user is told that no worker is there; before that is the end
MAX_REASON = 200
LOOK = "look"
# Ray speaks gRPC, so HTTP/2: how a client begins, and the kind of the frame with which a server answers (RFC 9113).
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = bytes([4])
# What Ray says where the machine is gone that the batch's own process is registered with.
_ENDED = ("owner has died", "owner died", "job has finished")
_MEANINGS = {
    "running low on memory": "its machine ran out of memory, and Ray ended it",
    "node was terminated": "its machine is gone",
    "node has died": "its machine is gone",
    "node died": "its machine is gone",
    "worker process has died": "its process has ended",
    "is unavailable": "it cannot be reached any more",
}
_LOG_HEAD = re.compile(r"^\[[^]]*\] (\S+:\d+: )?")  # of Ray's log lines: time, process, place in its source
_TRY = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); ray.nodes()"


class HandscrollWorker:
    """A worker on some machine of the cluster. What it takes and gives are JSON values, and a picture's bytes."""

    def __init__(self, threads: int) -> None:
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # torch is not imported yet
        self._maker = Maker()
        self._at: Progress | None = None
        self._said: list[str] = []
        self._own_folder: Path | None = None

    def introduce(self, folder: str, token: str, driver: str) -> dict[str, Any]:
        """Who it is, and whether it sees the folder in which the driver, of this host, has put this token."""
        try:
            is_shared = Path(folder, TOKEN).read_text() == token
        except OSError:
            is_shared = False
        if not is_shared:  # the same for every worker of this user here, so that another goes on from a state
            name = hashlib.sha256(f"{driver}:{folder}".encode()).hexdigest()[:16]
            self._own_folder = cache_folder() / "batch" / name
            self._own_folder.mkdir(parents=True, exist_ok=True)
        return {**described(), "host": socket.gethostname()}

    def make(self, task: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """What became of a task; with the picture itself where the driver does not see this machine's disk."""
        if self._own_folder is None:
            return self._maker.make(task, self._listen), None
        path = self._own_folder / Path(task["path"]).name
        found = self._maker.make({**task, "path": str(path)}, self._listen)
        content = path.read_bytes() if "made" in found else None
        path.unlink(missing_ok=True)
        if found.get("failed", {}).get("code") == OutputError.code:  # of this machine's disk alone
            found["failed"]["code"] = "cannot_write_there"
        return found, content

    def look(self) -> tuple[list[Any], list[str]]:
        """Where the task is, and the lines that the user should read since the last time."""
        said, self._said = self._said, []
        at = self._at
        return ([] if at is None else [at.stage, at.done, at.total]), said

    def leave(self) -> None:
        """Removes what it has put on its machine."""
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def _listen(self, event: Progress) -> None:
        if event.stage == "notice":
            self._said.append(event.detail)
        elif event.stage != "pulse":
            self._at = event


@dataclass
class _Worker:
    actor: Any
    name: str
    is_ready: bool = False
    is_at_work: bool = False


class RayPool(Pool):
    """Actors on the cluster at an address, as `ray.init` takes it: host:port, ray://host:port, auto or local.

    folder: where pictures are while they are made; workers that do not see it send theirs. workers: how many, None for
    one on each GPU, or each machine where there is none. devices: of each picture, as `--devices`. most: workers that
    there is work for.
    """

    def __init__(
        self, address: str, folder: Path, workers: int | None, device: str, devices: str | None, most: int | None = None
    ) -> None:
        self._address, self._folder, self._asked, self._most = address, folder.absolute(), workers, most
        self._device, self._devices = device, devices
        self._token = secrets.token_hex(16)
        self._starts = Starts()
        self._workers: dict[int, _Worker] = {}
        self._waiting: dict[Any, tuple[int, str]] = {}  # what was asked of actors: of which, and what
        self._numbers = 0
        self._looked = 0.0
        self._since = self._told_at = time.monotonic()
        self._had_worker = False

    def __enter__(self) -> Self:
        self._ray = connect(self._address)
        # Of workers that ended Ray writes paragraphs on standard output, which is for results. We say it in a line.
        self._nowhere = contextlib.ExitStack()
        self._nowhere.enter_context(contextlib.redirect_stdout(self._nowhere.enter_context(open(os.devnull, "w"))))
        try:
            self._folder.joinpath(TOKEN).write_text(self._token)
            there = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._arranged = arranged(there, self._asked, self._device, self._devices, self._most)
            for _ in range(self._arranged.workers):
                self._start_actor()
        except BaseException:
            self._leave()
            raise
        self._since = self._told_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            left = [
                each.actor.leave.remote() for each in self._workers.values() if each.is_ready and not each.is_at_work
            ]
            if left:
                self._ray.wait(left, num_returns=len(left), timeout=CONNECT_S)
            for worker in self._workers.values():
                self._ray.kill(worker.actor)
        finally:
            self._workers.clear()
            self._leave()

    def _leave(self) -> None:
        self._ray.shutdown()
        self._nowhere.close()

    def start(self, worker: int, task: Mapping[str, Any]) -> None:
        at = self._workers[worker]
        told = {
            **task,
            "request": on_device(task["request"], self._arranged.device),
            "processes": self._arranged.on_a_machine,
        }
        at.is_at_work = True
        self._waiting[at.actor.make.remote(told)] = worker, "make"

    def replace(self, worker: int) -> None:
        self._ray.kill(self._workers.pop(worker).actor)
        self._start_actor()

    def heard(self, seconds: float) -> Sequence[Heard]:
        if self._waiting:
            ready, _ = self._ray.wait(list(self._waiting), timeout=seconds)
        else:
            ready = []
            time.sleep(seconds)
        found: list[Heard] = []
        for reference in ready:
            worker, asked = self._waiting.pop(reference)
            if worker in self._workers:
                found += self._answered(worker, asked, reference)
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            asked_already = {worker for worker, asked in self._waiting.values() if asked == LOOK}
            for number, at in self._workers.items():
                if at.is_at_work and number not in asked_already:
                    looking = at.actor.look.remote()
                    self._waiting[looking] = number, LOOK
        return [*found, *self._waited()]

    def _waited(self) -> list[Heard]:
        """What the user is told where no worker comes. Raises WorkerError where none can."""
        now = time.monotonic()
        if any(at.is_ready for at in self._workers.values()):
            self._since = self._told_at = now
        elif now - self._told_at > WAITS_S:
            self._told_at = now
            if not any(node["Alive"] for node in self._ray.nodes()):
                raise WorkerError(f"the Ray cluster at {self._address} has no machine any more")
            if now - self._since > MOST_WAITS_S and self._had_worker:
                raise WorkerError(f"no worker has come back within {duration(MOST_WAITS_S)}")
            return [Said(0, f"no worker is there yet; the cluster has {self._arranged.has}, is it in use by others?")]
        return []

    def _answered(self, worker: int, asked: str, reference: Any) -> list[Heard]:
        at = self._workers[worker]
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return [self._lost(worker, error)]
        if asked == LOOK:
            where, said = answer
            return [*(Said(worker, line) for line in said), *([At(worker, *where)] if where else [])]
        if asked == "introduce":
            return [self._introduced(worker, answer)]
        at.is_at_work = False
        found, content = answer
        if "failed" in found:
            return [Failed(worker, found["failed"])]
        return [Made(worker, found["made"], content, is_worn=bool(found.get("worn")))]

    def _introduced(self, worker: int, facts: Mapping[str, Any]) -> Heard:
        if facts["version"] != __version__:
            raise WorkerError(
                f"{facts['host']} has handscroll {facts['version']}, this is {__version__}; install the same on all"
            )
        at = self._workers[worker]
        at.name = f"worker {worker} (process {facts['process']} on {facts['host']})"
        at.is_ready = self._had_worker = True
        self._starts.ready()
        return Ready(worker)

    def _lost(self, worker: int, error: BaseException) -> Heard:
        at = self._workers.pop(worker)
        self._ray.kill(at.actor)
        if any(mark in str(error) for mark in _ENDED):
            raise WorkerError(
                f"the machine is gone by which this process works with the Ray cluster at {self._address}"
            )
        why = f"{at.name} was lost: {_said_by_ray(error)}"
        others = any(each.is_ready for each in self._workers.values())
        if at.is_ready or self._starts.failed(why, others=others):
            self._start_actor()
        return Lost(worker, why)

    def _start_actor(self) -> None:
        self._numbers += 1
        takes = {"num_cpus": self._arranged.cpus, "num_gpus": self._arranged.gpus}
        remote = self._ray.remote(concurrency_groups={LOOK: 1}, **takes)(HandscrollWorker)
        actor = remote.options(scheduling_strategy="SPREAD").remote(self._arranged.threads)
        self._workers[self._numbers] = _Worker(actor, f"worker {self._numbers}")
        introduced = actor.introduce.remote(self._folder_told(), self._token, socket.gethostname())
        self._waiting[introduced] = self._numbers, "introduce"

    def _folder_told(self) -> str:
        return str(self._folder)


def connect(address: str) -> Any:
    """Ray, connected to a cluster. Raises UsageError where it is not installed, WorkerError where nobody answers."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--ray wants the library Ray, which is not here ({one_line(error, MAX_REASON)}); "
            "install it with `pip install 'handscroll[ray]'`"
        ) from error
    # Ray asks for the second in a warning; workers that compute on the processor are told so by their task.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != "local":
        _check_answers(address)
        _check_lets_in(address)
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, configure_logging=False)
    except Exception as error:  # each of Ray's layers has errors of its own
        raise WorkerError(f"no Ray cluster at {address}: {one_line(error, MAX_REASON)}") from error
    ray.method(concurrency_group=LOOK)(HandscrollWorker.look)  # which is called while the actor makes a picture
    return ray


def _check_answers(address: str) -> None:
    """Raises UsageError, and WorkerError where no server of Ray's kind answers, which Ray itself tries for minutes."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    is_whole = bool(re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.%\w]+\]", host))
    if not colon or not is_whole or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(f"--ray {address!r} is no address; write host:6379, ray://host:10001, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as line:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                line.settimeout(CONNECT_S)
                line.sendall(_HELLO)
                if line.recv(4)[3:] != _SETTINGS:
                    raise WorkerError(f"what answers at {address} is no Ray cluster")
    except OSError as error:
        raise WorkerError(f"nobody answers at {address}: {one_line(error, MAX_REASON)}") from error


def _check_lets_in(address: str) -> None:
    """Raises WorkerError where a cluster does not take this machine, as without its token. Where it does not, Ray tries
    for ever and tells of every try: so a process of its own tries, which can be ended.
    """
    command = [sys.executable, "-P", "-c", _TRY, address]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=JOIN_S, check=False)
        said, is_in = done.stderr, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        said, is_in = error.stderr or b"", False
    if not is_in:
        lines = [_LOG_HEAD.sub("", line) for line in said.decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "token" in line.lower()] or lines
        why = one_line(telling[-1], MAX_REASON) if telling else f"nothing is heard within {JOIN_S:g} s"
        raise WorkerError(f"the Ray cluster at {address} does not let this process in: {why}")


def _said_by_ray(error: BaseException) -> str:
    """The line of Ray's that tells the cause: it writes paragraphs."""
    said = str(error)
    for mark, meaning in _MEANINGS.items():
        if mark in said:
            return meaning
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "Error" in line or "killed" in line.lower()]
    return one_line((telling or lines or [type(error).__name__])[-1], MAX_REASON)
