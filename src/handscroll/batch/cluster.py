"""Workers as actors of a Ray cluster, one for each GPU or machine. Ray keeps count of machines and processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from handscroll.batch.local import on_device
from handscroll.batch.pool import At, Failed, Heard, Lost, Made, Pool, Ready, Said, Starts, WorkerError
from handscroll.batch.worker import Maker, described
from handscroll.errors import UsageError
from handscroll.events import Progress
from handscroll.request import count_devices
from handscroll.units import one_line
from handscroll.version import __version__

CONNECT_S, JOIN_S = 5.0, 40.0
LOOK_EVERY_S = 2.0
WAITS_S = 30.0  # before the user is told that no worker has come
MAX_REASON = 200
TOKEN, LOOK = "token", "look"
# Ray speaks gRPC, so HTTP/2: how a client begins, and the kind of the frame with which a server answers (RFC 9113).
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = bytes([4])
_TRY = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); ray.nodes()"


class Actor:
    """A worker on some machine of the cluster. What it takes and gives are JSON values, and a picture's bytes."""

    def __init__(self, threads: int) -> None:
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # torch is not imported yet
        self._maker = Maker()
        self._at: Progress | None = None
        self._said: list[str] = []
        self._own_folder: str | None = None

    def introduce(self, folder: str, token: str) -> dict[str, Any]:
        """Who it is, and whether it sees the folder in which the driver has put this token."""
        try:
            is_shared = Path(folder, TOKEN).read_text() == token
        except OSError:
            is_shared = False
        if not is_shared:
            self._own_folder = tempfile.mkdtemp(prefix="handscroll-batch-")
        return {**described(), "host": socket.gethostname(), "shared": is_shared}

    def make(self, task: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """What became of a task; with the picture itself where the driver does not see this machine's disk."""
        if self._own_folder is None:
            return self._maker.make(task, self._listen), None
        path = Path(self._own_folder, Path(task["path"]).name)
        found = self._maker.make({**task, "path": str(path)}, self._listen)
        content = path.read_bytes() if "made" in found else None
        path.unlink(missing_ok=True)
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
    one on each GPU, or each machine where there is none. devices: of each picture, as `--devices`.
    """

    def __init__(self, address: str, folder: Path, workers: int | None, device: str, devices: str | None) -> None:
        self._address, self._folder, self._asked = address, folder.absolute(), workers
        self._device, self._devices = device, devices
        self._token = secrets.token_hex(16)
        self._starts = Starts()
        self._workers: dict[int, _Worker] = {}
        self._waiting: dict[Any, tuple[int, str]] = {}  # what was asked of actors: of which, and what
        self._numbers = 0
        self._looked = self._since = 0.0

    def __enter__(self) -> Self:
        self._ray = connect(self._address)
        # Of workers that ended Ray writes paragraphs on standard output, which is for results. We say it in a line.
        self._nowhere = contextlib.ExitStack()
        self._nowhere.enter_context(contextlib.redirect_stdout(self._nowhere.enter_context(open(os.devnull, "w"))))
        try:
            self._folder.joinpath(TOKEN).write_text(self._token)
            self._arrange()
            for _ in range(self._count):
                self._start_actor()
        except BaseException:
            self._leave()
            raise
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                left = [worker.actor.leave.remote() for worker in self._workers.values() if worker.is_ready]
                self._ray.wait(left, num_returns=len(left), timeout=CONNECT_S) if left else None
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
        told = {**task, "request": on_device(task["request"], self._on), "processes": self._on_a_machine}
        at.is_at_work = True
        self._waiting[at.actor.make.remote(told)] = worker, "make"

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
        if not any(at.is_ready for at in self._workers.values()) and time.monotonic() - self._since > WAITS_S:
            self._since = time.monotonic()
            found.append(Said(0, f"no worker has come yet; the cluster has {self._told}, is it in use by others?"))
        return found

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
        return [Made(worker, found["made"], content)]

    def _introduced(self, worker: int, facts: Mapping[str, Any]) -> Heard:
        if facts["version"] != __version__:
            raise WorkerError(
                f"{facts['host']} has handscroll {facts['version']}, this is {__version__}; install the same on all"
            )
        at = self._workers[worker]
        at.name = f"worker {worker} (process {facts['process']} on {facts['host']})"
        at.is_ready = True
        self._starts.ready()
        return Ready(worker)

    def _lost(self, worker: int, error: BaseException) -> Heard:
        at = self._workers.pop(worker)
        self._ray.kill(at.actor)
        why = f"{at.name} was lost: {_said_by_ray(error)}"
        others = any(each.is_ready for each in self._workers.values())
        if at.is_ready or self._starts.failed(why, others=others):
            self._start_actor()
        return Lost(worker, why)

    def _arrange(self) -> None:
        """How many workers, and what each of them takes of the cluster. Raises UsageError."""
        there = self._ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        machines = max(1, sum(1 for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")))
        group = 1 if self._devices is None else count_devices(self._devices)
        on_cpu = self._device == "cpu" or (self._devices or "").startswith("cpu") or not gpus
        if self._device.startswith("cuda:"):
            raise UsageError(f"--device {self._device} names a GPU of this machine; on a cluster use auto, cpu or cuda")
        if self._device == "cuda" and not gpus:
            raise UsageError(f"the cluster at {self._address} has no GPU; use --device cpu")
        self._told = f"{cores} cores and {gpus} GPUs on {machines} machines"
        most = cores // group if on_cpu else gpus // group
        self._count = self._asked or (min(most, machines) if on_cpu else most)
        if not 1 <= self._count <= most:
            of_each = f" of {group} devices each" if group > 1 else ""
            raise UsageError(
                f"{self._asked or 1} workers{of_each} do not fit: the cluster has {self._told}; use --workers {most} "
                "or fewer"
                if most
                else f"the cluster has {self._told}, too few for --devices {self._devices}"
            )
        self._on_a_machine = -(-self._count // machines)
        self._threads = max(1, cores // self._count) if on_cpu and group == 1 else 0
        self._takes = {"num_cpus": group if on_cpu else 1, "num_gpus": 0 if on_cpu else group}
        several = f"cpu:{group}" if on_cpu else str(group)
        self._on = several if group > 1 else "cpu" if on_cpu else "cuda"

    def _start_actor(self) -> None:
        self._numbers += 1
        remote = self._ray.remote(concurrency_groups={LOOK: 1}, **self._takes)(Actor)
        actor = remote.options(scheduling_strategy="SPREAD").remote(self._threads)
        self._workers[self._numbers] = _Worker(actor, f"worker {self._numbers}")
        self._waiting[actor.introduce.remote(self._folder_told(), self._token)] = self._numbers, "introduce"

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
    ray.method(concurrency_group=LOOK)(Actor.look)  # which is called while the actor makes a picture
    return ray


def _check_answers(address: str) -> None:
    """Raises UsageError, and WorkerError where no server of Ray's kind answers, which Ray itself tries for minutes."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
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
        lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        telling = [line.rpartition("] ")[2] for line in lines if "token" in line.lower()] or lines
        why = one_line(telling[-1], MAX_REASON) if telling else f"nothing is heard within {JOIN_S:g} s"
        raise WorkerError(f"the Ray cluster at {address} does not let this process in: {why}")


def _said_by_ray(error: BaseException) -> str:
    """The line of Ray's that tells the cause: it writes paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "Error" in line or "killed" in line.lower()]
    return one_line((telling or lines or [type(error).__name__])[-1], MAX_REASON)
