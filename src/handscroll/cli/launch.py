"""Several processes for one picture: starts a rank for each of `--devices`, watches them, and ends all when one ends.

Every rank runs the same command line and is told its number in the environment, as torchrun does; under torchrun this
module starts nothing. torch's elastic agent would do for most of it, but gives a rank that was stopped 30 s to end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import typer

from handscroll.cli.output import to_json
from handscroll.errors import UsageError
from handscroll.request import Request, check_devices, count_devices
from handscroll.system import LAUNCHER, PARENT, STORE, how_it_ended, threads_of_each, usable_cores
from handscroll.units import MAX_SIDE_PX, MIN_SIDE_PX, last_line, one_line

# What this process was called with, for the ranks that it starts.
called_with: list[str] = []

POLL_S = 0.1
MOST_A_CORE = 8
GOES_ON = "; the same command, or `handscroll resume`, goes on"
GRACE_S = 2.0  # for a rank to say why, once another has ended
STOPPED_S = 8.0  # a rank that somebody stopped is taken for lost


def start_ranks(devices: str | None, height_px: int | None = None, more: Sequence[str] = ()) -> None:
    """Runs the command on several ranks and leaves, where it names devices and this is not one of the ranks yet.

    height_px: of the picture, where that is known. more: arguments that the ranks get beside this process's.
    Raises UsageError for more devices than any picture has rows for.
    """
    if devices is None or not _is_launcher(devices):
        return
    height_px = height_px or MAX_SIDE_PX
    count, most = count_devices(devices), -(-height_px // MIN_SIDE_PX)
    if count > most:
        raise UsageError(
            f"{count} devices cannot share a picture of {height_px} pixels: at most one for each {MIN_SIDE_PX} rows of "
            f"pixels; use --devices {most} or fewer"
        )
    cores = usable_cores()
    if devices.startswith("cpu") and count > (most := MOST_A_CORE * cores):
        raise UsageError(f"{count} processes are too many for {cores} cores; use --devices cpu:{most} or fewer")
    raise typer.Exit(_run_ranks(count, [*called_with, *more]))


def _is_launcher(devices: str) -> bool:
    """Whether this process is to start ranks for these devices, and is none itself."""
    return count_devices(devices) > 1 and "RANK" not in os.environ


def follows() -> bool:
    """Whether this process is a rank that does what another tells it."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def reads_nothing(devices: str | None) -> bool:
    """Whether this process is not the one that reads standard input and asks: it starts ranks, or follows one."""
    if devices is not None:
        check_devices("devices", devices)
    return follows() or (devices is not None and _is_launcher(devices))


def follow(request: Request) -> None:
    """Does what the first rank tells. Ctrl-C is that one's to obey."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from handscroll import pipeline

    pipeline.follow(request, end_of_rank)


def end_of_rank(message: str, facts: Mapping[str, Any]) -> NoReturn:
    """Ends this process with the cause, because another rank has ended or does not answer."""
    if facts.get("code") == "rank_failed":
        message += GOES_ON
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    if "--json" in called_with and not follows():
        print(to_json({"error": {key: value for key, value in facts.items() if key != "exit_code"}}), flush=True)
    os._exit(int(facts.get("exit_code", 1)))


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None  # on stderr; the leader's goes where ours goes
    stopped_s: float = 0.0

    @property
    def last_line(self) -> str:
        if self.said is None:
            return ""
        self.said.seek(0)
        return last_line(self.said.read())

    def look(self) -> None:
        """Counts how long it has been stopped, by looks of ours: while we are stopped too, nothing counts."""
        self.stopped_s = self.stopped_s + POLL_S if _is_stopped(self.process.pid) else 0.0


def _run_ranks(count: int, arguments: Sequence[str]) -> int:
    """The exit code of all ranks together."""
    folder = tempfile.mkdtemp(prefix="handscroll-ranks-")  # which nobody else may read
    ranks: list[_Rank] = []
    told: list[int] = []
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, lambda number, _: _pass_on(ranks, number, told)) for number in heard}
    try:
        for number in range(count):
            ranks.append(_started(number, count, os.path.join(folder, "store"), arguments))
        return _watched(ranks)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
            rank.process.wait()
            if rank.said is not None:
                rank.said.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _pass_on(ranks: Sequence[_Rank], number: int, told: list[int]) -> None:
    """Hands a wish to end to the leader, which ends in order and ends the others; the second ends all at once."""
    told.append(number)
    for rank in ranks if len(told) > 1 else ranks[:1]:
        if rank.process.poll() is None:
            rank.process.send_signal(number if len(told) == 1 else signal.SIGKILL)


def _started(number: int, count: int, store: str, arguments: Sequence[str]) -> _Rank:
    environ = {**os.environ, "RANK": str(number), "LOCAL_RANK": str(number), LAUNCHER: str(os.getpid())}
    environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", STORE: store}
    if sys.platform.startswith("linux"):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(count)))
    command = [sys.executable, "-P", "-m", "handscroll", *arguments]
    # In sessions of their own: a terminal's Ctrl-C comes here alone, and is passed on as any other.
    if number == 0:
        return _Rank(number, subprocess.Popen(command, env=environ, start_new_session=True), None)
    said = tempfile.TemporaryFile()  # noqa: SIM115
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environ, stdin=nothing, stdout=nothing, stderr=said, start_new_session=True)
    return _Rank(number, process, said)


def _watched(ranks: Sequence[_Rank]) -> int:
    parent = os.environ.get(PARENT)
    while True:
        time.sleep(POLL_S)
        if parent is not None and str(os.getppid()) != parent:
            return 1  # nobody waits for the picture any more
        for rank in ranks:
            rank.look()
        ended = [rank for rank in ranks if rank.process.poll() is not None]
        failed = [rank for rank in ended if rank.process.returncode]
        stopped = [rank for rank in ranks if rank.stopped_s > STOPPED_S]
        if failed or stopped:
            return _failed(ranks, failed, stopped)
        if ranks[0] in ended:
            # The leader is done, and has told the others; what they still do is nobody's concern.
            _wait_while(lambda: any(rank.process.poll() is None for rank in ranks))
            return 0


def _wait_while(is_so: Callable[[], bool]) -> None:
    """For a moment at most."""
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until and is_so():
        time.sleep(POLL_S)


def _failed(ranks: Sequence[_Rank], failed: Sequence[_Rank], stopped: Sequence[_Rank]) -> int:
    """Waits a moment for the leader to say why; else says it for it."""
    leader = ranks[0].process
    _wait_while(lambda: not stopped and leader.poll() is None)
    code = leader.poll()
    if code is not None and code >= 0:
        return code
    if code is not None:
        line = f"rank 0 (process {leader.pid}) {how_it_ended(code)}"
    elif failed:
        rank = failed[0]
        line = f"rank {rank.number} (process {rank.process.pid}) {how_it_ended(rank.process.returncode)}"
        said = rank.last_line.removeprefix("error: ")
        line += f": {said}" if said else ""
    else:
        line = f"rank {stopped[0].number} (process {stopped[0].process.pid}) is stopped and does not answer any more"
    returned = failed[0].process.returncode if failed else 1
    line += "" if returned == UsageError.exit_code else GOES_ON
    print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    if "--json" in called_with:
        print(to_json({"error": {"code": "rank_failed", "message": line}}), flush=True)
    return returned if returned > 0 else 1


def _is_stopped(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
