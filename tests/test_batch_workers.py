"""Batches with workers that are processes: some are killed, and so is the one that gives out the work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from handscroll.batch import local
from handscroll.batch.lines import Task, read_tasks
from handscroll.batch.places import open_place
from handscroll.batch.pool import WorkerError
from handscroll.batch.run import run_batch
from handscroll.errors import UsageError
from handscroll.events import ignore

ASKED = ["--size", "64", "--steps", "1"]
SOON_S = 10.0
WAIT_S = 120.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "handscroll", *arguments]


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environ(), capture_output=True, text=True, timeout=300)


def prompts(folder: Path, count: int) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"a lake number {number}\n" for number in range(count)))
    return file


def started(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), env=environ(), stdout=pipe, stderr=pipe, text=True)


def wait_for(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def has_made(folder: Path, pictures: int) -> bool:
    return len(list(folder.glob("*.png"))) >= pictures


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [each for each in psutil.Process(process.pid).children() if "handscroll.batch.worker" in each.cmdline()]


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]


def check_whole(folder: Path, file: Path) -> None:
    """Every picture is there, was made once, and nothing else was left; one is what `generate` makes."""
    tasks = read_tasks(file, {"size": "64", "steps": 1})
    assert {path.name for path in folder.iterdir()} == {task.output for task in tasks} | {"batch.jsonl"}
    assert Counter(line["output"] for line in journal(folder)) == Counter(task.output for task in tasks)
    assert all(line["status"] == "done" for line in journal(folder))
    task, alone = tasks[-1], folder.parent / "alone.png"
    done = run("generate", task.request.prompt, "--seed", str(task.request.seed), "-o", str(alone), "-q", *ASKED)
    assert done.returncode == 0, done.stderr
    assert alone.read_bytes() == (folder / task.output).read_bytes()


def test_killed_workers_pictures_are_made_by_others(tmp_path: Path) -> None:
    file, folder = prompts(tmp_path, 10), tmp_path / "out"
    process = started("batch", str(file), "-o", str(folder), "--workers", "cpu:2", "--json", *ASKED)
    for pictures in (1, 4):
        wait_for(lambda: has_made(folder, pictures))  # noqa: B023
        workers_of(process)[0].kill()
    out, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    summary = json.loads(out)
    assert (summary["made"], summary["failed"], summary["kept"]) == (10, [], 0)
    assert said.count("was ended by SIGKILL") == 2
    for each in summary["retried"]:
        assert "was ended by SIGKILL" in each["why"]
    check_whole(folder, file)


def test_a_batch_that_was_killed_goes_on(tmp_path: Path) -> None:
    file, folder = prompts(tmp_path, 6), tmp_path / "out"
    arguments = ("batch", str(file), "-o", str(folder), "--workers", "2", *ASKED)
    process = started(*arguments)
    wait_for(lambda: has_made(folder, 3))
    workers = workers_of(process)
    process.kill()
    process.communicate()
    assert workers
    psutil.wait_procs(workers, timeout=SOON_S)
    assert not [each for each in workers if each.is_running()]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} were there" in done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert before == {path: path.stat().st_mtime_ns for path in before}
    check_whole(folder, file)
    assert run(*arguments).stderr.splitlines()[-1].startswith("0 pictures in")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_batch_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    file, folder = prompts(tmp_path, 50), tmp_path / "out"
    process = started("batch", str(file), "-o", str(folder), *ASKED)
    wait_for(lambda: list(folder.glob("*.png")))
    workers = workers_of(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=SOON_S)
    psutil.wait_procs(workers, timeout=SOON_S)
    assert workers
    assert not [each for each in workers if each.is_running()]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1].endswith("of 50 pictures are there; the same command goes on")


def test_pictures_that_cannot_be_made_keep_no_other_from_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "p.jsonl", tmp_path / "out"
    lines = [{"prompt": "a lake", "seed": 1}, {"prompt": "a bay", "model": str(tmp_path), "seed": 2}, {"prompt": "b"}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "model_index.json").write_text("{}")
    done = run("batch", str(file), "-o", str(folder), *ASKED)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1  # a model that cannot be opened is refused before any work
    file.write_text("\n".join(json.dumps(line) for line in [lines[0], {"prompt": "b", "precision": "fp8"}, lines[2]]))
    done = run("batch", str(file), "-o", str(folder), "--json", *ASKED)
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["made"]) == (1, 2)
    (failed,) = summary["failed"]
    assert (failed["line"], failed["error"]["code"]) == (2, "bad_usage")
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 3 pictures were not made; line 2: ")


@pytest.mark.thorough
def test_a_group_of_devices_makes_the_same_picture(tmp_path: Path) -> None:
    file, folder = prompts(tmp_path, 2), tmp_path / "out"
    done = run("batch", str(file), "-o", str(folder), "--devices", "cpu:2", *ASKED)
    assert done.returncode == 0, done.stderr
    assert all(line["ranks"] for line in journal(folder))
    check_whole(folder, file)


def test_workers_that_cannot_start_end_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "COMMAND", ("-c", "import sys; sys.exit('libgomp.so: not found')"))
    tasks = read_tasks(prompts(tmp_path, 2), {})
    with pytest.raises(WorkerError, match=r"no worker can start: worker \d .* has ended: libgomp.so: not found"):
        run_batch(tasks, open_place(str(tmp_path / "out")), lambda folder, to_do: local.LocalPool(["cpu"]), ignore)


# Ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster of this machine alone."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # newer releases want a token
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray-")  # the names of its sockets must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {**environ(), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    start += ["--num-cpus=4", "--include-dashboard=false"]
    nothing = subprocess.DEVNULL
    head = subprocess.Popen(start, env=own, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        wait_for(lambda: is_open(port))
        yield f"127.0.0.1:{port}"
    finally:
        # Not by `ray stop`, which would end every cluster of this user.
        of_cluster = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(SOON_S)
        for each in [*psutil.wait_procs(of_cluster, timeout=SOON_S)[1]]:
            each.kill()
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        if line[0].startswith("ray::HandscrollWorker"):
            found.append(process)
    return found


@pytest.mark.thorough
def test_a_cluster_loses_two_workers(tmp_path: Path, cluster: str) -> None:
    file, folder = prompts(tmp_path, 40), tmp_path / "out"
    process = started("batch", str(file), "-o", str(folder), "--ray", cluster, "--workers", "3", "--json", *ASKED)
    for pictures in (3, 8):
        wait_for(lambda: has_made(folder, pictures))  # noqa: B023
        actors()[0].kill()
    out, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    summary = json.loads(out)
    assert (summary["made"], summary["kept"], summary["failed"]) == (40, 0, [])
    assert said.count("was lost: ") == 2, said
    assert {each["output"] for each in summary["retried"]} == {
        line["output"] for line in journal(folder) if line["tries"] > 1
    }
    check_whole(folder, file)
    wait_for(lambda: not actors())


@pytest.mark.thorough
def test_a_cluster_loses_its_driver(tmp_path: Path, cluster: str) -> None:
    file, folder = prompts(tmp_path, 16), tmp_path / "out"
    arguments = ("batch", str(file), "-o", str(folder), "--ray", cluster, "--workers", "2", "--json", *ASKED)
    process = started(*arguments)
    wait_for(lambda: has_made(folder, 5))
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["kept"] >= len(before)
    assert (summary["kept"] + summary["made"], summary["failed"]) == (16, [])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    check_whole(folder, file)


@pytest.mark.thorough
def test_a_cluster_that_does_not_see_the_folder_sends_its_pictures(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handscroll.batch import cluster as module

    monkeypatch.setattr(module.RayPool, "_folder_told", lambda self: str(tmp_path / "elsewhere"))
    file, folder = prompts(tmp_path, 6), tmp_path / "out"
    tasks = read_tasks(file, {"size": "64", "steps": 1})

    def pool(work: Path, to_do: Sequence[Task]) -> module.RayPool:
        return module.RayPool(cluster, work, 2, "auto", None)

    summary = run_batch(tasks, open_place(str(folder)), pool, ignore)
    assert (summary.made, summary.failed) == (6, [])
    assert {path.name for path in folder.iterdir()} == {task.output for task in tasks} | {"batch.jsonl"}


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """The port of a server that is something else: it says this and hangs up, or nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                line, _ = server.accept()
                line.recv(100)
                if answer is None:
                    time.sleep(SOON_S)
                line.sendall(answer or b"")
                line.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_addresses_where_no_cluster_is(tmp_path: Path) -> None:
    file, folder = prompts(tmp_path, 1), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    done = run("batch", str(file), "-o", str(folder), "--ray", f"127.0.0.1:{port}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"nobody answers at 127.0.0.1:{port}" in done.stderr
    assert time.monotonic() - began < SOON_S
    answers = {b"HTTP/1.0 400 Bad Request\r\n\r\n": "is no Ray cluster", b"": "is no Ray cluster", None: "timed out"}
    for answer, why in answers.items():
        with answering(answer) as other:
            done = run("batch", str(file), "-o", str(folder), "--ray", f"127.0.0.1:{other}")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert why in done.stderr
    done = run("batch", str(file), "-o", str(folder), "--ray", "somewhere")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is no address" in done.stderr


def test_a_machine_without_ray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from handscroll.batch.cluster import connect

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'handscroll\[ray\]'"):
        connect("auto")
