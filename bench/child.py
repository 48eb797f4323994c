"""Run one measurement in a process of its own: its exit code, its output, and the most memory that it held.

    python bench/child.py REPORT.json COMMAND ...

A process that is started inherits the peak of the one that starts it. So the command is started from this file, alone
in a process of 10 MB, which is what lies behind `run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "src"
BUDGET_TOO_SMALL = 3


class Child:
    """A process that has ended. `peak_bytes` is its peak resident memory as /usr/bin/time -v prints it."""

    def __init__(self, exit_code: int, peak_bytes: int, seconds: float, stdout: str, stderr: str) -> None:
        self.exit_code, self.peak_bytes, self.seconds = exit_code, peak_bytes, seconds
        self.stdout, self.stderr = stdout, stderr

    @property
    def answer(self) -> Any:
        """The JSON value that it printed, alone or as its last line; empty where there is none."""
        for text in (self.stdout, (self.stdout.splitlines() or [""])[-1]):
            try:
                return json.loads(text)
            except ValueError:
                continue
        return {}

    @property
    def why(self) -> str:
        """What a failed one said last."""
        if self.exit_code < 0:
            return f"ended by signal {-self.exit_code} (9: out of memory)"
        return (self.stderr.strip().splitlines() or [f"exit code {self.exit_code}"])[-1]


class ChildError(Exception):
    """A measurement that did not come about; the message says why."""


def run(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, timeout_seconds: float | None = None
) -> Child:
    """Runs a command to its end, with `environment` added to this process's. Raises ChildError where it takes longer.

    Where the machine runs out of memory the command is the first to go, and it never outlives this call.
    """
    with tempfile.TemporaryDirectory(prefix="handscroll-bench-") as folder:
        report = Path(folder) / "report.json"
        launcher = [sys.executable, "-I", "-S", __file__, report, *command]
        paths = os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH"))))
        launched = subprocess.Popen(
            list(map(str, launcher)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
            start_new_session=True,
        )
        try:
            stdout, stderr = launched.communicate(timeout=timeout_seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launched.pid, signal.SIGKILL)
            launched.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ChildError(f"not done in {timeout_seconds:.0f} s") from None
            raise
        if not report.exists():
            raise ChildError(f"{command[0]} could not be started: {stderr.strip()}")
        measured = json.loads(report.read_text())
    return Child(**measured, stdout=stdout, stderr=stderr)


def handscroll(arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Child:
    """`handscroll ARGUMENTS --json --quiet`; its `answer` is the result, or the error."""
    return run([sys.executable, "-m", "handscroll", *arguments, "--json", "--quiet"], environment)


def least_bytes(arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> int:
    """The budget that handscroll names when it refuses one of 1 MiB. Raises ChildError where it does not refuse it."""
    refused = handscroll([*arguments, "--memory", "1MiB"], environment)
    if refused.exit_code != BUDGET_TOO_SMALL:
        raise ChildError(f"a budget of 1 MiB ended with exit code {refused.exit_code}, not 3: {refused.why}")
    return refused.answer["error"]["minimum_bytes"]


def main(report: str, *command: str) -> None:
    begun = time.perf_counter()
    started = os.posix_spawnp(command[0], command, os.environ)
    with contextlib.suppress(OSError):  # no such thing but on Linux, or the command is done already
        Path(f"/proc/{started}/oom_score_adj").write_text("1000")
    _, status, usage = os.wait4(started, 0)
    peak_bytes = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    measured = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "peak_bytes": peak_bytes,
        "seconds": time.perf_counter() - begun,
    }
    Path(report).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
