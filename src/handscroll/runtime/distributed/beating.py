"""Whether the other processes of a run are alive: each follower has a line to the leader; both send a byte at times.

A process that died closes its line at once; one that hangs or was stopped is silent. Whoever notices tells the others
why, and all of them end: a rank that waits for another one in the middle of a layer cannot do anything else.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from handscroll.system import LAUNCHER

BEAT_S = 0.5
SILENT_S = 6.0  # a process that is merely slow beats from a thread of its own
JOIN_S, HELLO_S = 60.0, 3.0
MAX_LINE = 4096

# Told why the run cannot go on, an exit code and the error's facts; it does not return.
OnFailure = Callable[[str, Mapping[str, Any]], None]


def end_process(message: str, facts: Mapping[str, Any]) -> NoReturn:
    """What is done about a failure where nothing else is asked for."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(int(facts.get("exit_code", 1)))


def join_s() -> float:
    """HANDSCROLL_JOIN_S: how long a rank waits for the others."""
    try:
        return max(1.0, float(os.environ.get("HANDSCROLL_JOIN_S", JOIN_S)))
    except ValueError:
        return JOIN_S


class Line:
    """A connection on which texts are sent, a line each; an empty line is a beat."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(BEAT_S)
        self._lock = threading.Lock()
        self._pending = b""
        self.heard_at = time.monotonic()
        self.closed = False

    def send(self, facts: Mapping[str, Any] | None = None) -> None:
        data = b"\n" if facts is None else json.dumps(facts).encode() + b"\n"
        try:
            with self._lock:
                self._connection.sendall(data)
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """What has come since, without beats; waits a moment where nothing has."""
        try:
            data = self._connection.recv(MAX_LINE)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.heard_at = time.monotonic()
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > MAX_LINE:
            self.closed = True
        return [facts for line in lines if line and isinstance(facts := _parsed(line), dict)]

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at

    def close(self) -> None:
        self._connection.close()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Beating:
    """Beats on all lines, and listens on them. Their names say whose each is, as 'rank 2 (cpu, process 31)'.

    on_failure is called once, on a thread of its own, when a line is closed or silent before `stop`, or says an error.
    """

    def __init__(self, lines: Mapping[str, Line], on_failure: OnFailure) -> None:
        self._lines, self._on_failure = dict(lines), on_failure
        self._stopped = threading.Event()
        self._once = threading.Lock()
        for line in self._lines.values():
            line.heard_at = time.monotonic()
        self._threads = [threading.Thread(target=self._beat, daemon=True)]
        self._threads += [threading.Thread(target=self._listen, args=each, daemon=True) for each in lines.items()]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """From here on nothing is a failure. The others are told."""
        self._stopped.set()
        for line in self._lines.values():
            line.send({"end": True})

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Says an error of this process to all others, which end; from here on nothing is a failure of theirs."""
        self._stopped.set()
        for line in self._lines.values():
            line.send({"error": facts})

    def _beat(self) -> None:
        launcher = os.environ.get(LAUNCHER)
        while not self._stopped.wait(BEAT_S):
            if launcher is not None and str(os.getppid()) != launcher:
                self._fail("the process that started the ranks has ended", {})
                return
            for line in self._lines.values():
                line.send()

    def _listen(self, name: str, line: Line) -> None:
        while not self._stopped.is_set():
            for facts in line.receive():
                if facts.get("end"):
                    return
                if isinstance(error := facts.get("error"), dict):
                    self._fail(str(error.get("message", "")), error, of=line)
                    return
            if line.closed:
                self._fail(f"{name} has ended", {}, of=line)
            elif line.silent_s > SILENT_S:
                self._fail(f"{name} does not answer any more", {}, of=line)
            else:
                continue
            return

    def _fail(self, message: str, facts: Mapping[str, Any], of: Line | None = None) -> None:
        if self._stopped.is_set() or not self._once.acquire(blocking=False):
            return
        told = {"code": "rank_failed", "exit_code": 1, **facts, "message": message}
        for line in self._lines.values():
            if line is not of:
                line.send({"error": told})
        self._on_failure(message, told)


def listen(host: str) -> socket.socket:
    """Where followers connect to."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def accept(server: socket.socket, secret: str, count: int) -> dict[int, Line]:
    """The lines of `count` followers by rank, each of which has said the secret. Raises TimeoutError."""
    lines: dict[int, Line] = {}
    until = time.monotonic() + join_s()
    while len(lines) < count:
        server.settimeout(max(0.01, until - time.monotonic()))
        line = Line(server.accept()[0])
        said = _first(line)
        if not said:
            line.close()
        for facts in said:
            known = secrets.compare_digest(str(facts.get("secret")).encode(), secret.encode())
            if known and isinstance(rank := facts.get("rank"), int):
                lines[rank] = line
    return lines


def connect(host: str, port: int, secret: str, rank: int) -> Line:
    """A follower's line to the leader."""
    line = Line(socket.create_connection((host, port), timeout=join_s()))
    line.send({"secret": secret, "rank": rank})
    return line


def _first(line: Line) -> list[dict[str, Any]]:
    """What somebody says who has connected; a stranger who says nothing is not waited for."""
    until = time.monotonic() + HELLO_S
    while not line.closed and time.monotonic() < until:
        if found := line.receive():
            return found
    return []
