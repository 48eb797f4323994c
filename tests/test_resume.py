"""Killed, interrupted, run again: the same picture, and nothing but the picture.

Runs are killed in processes of their own. A nursery process imports the libraries once and forks a child a run, so
that a run takes a fraction of a second; `SLOW_DOWN` stretches its stages, so that random moments fall into all of them.

    python tests/test_resume.py 20        kills 20 runs at random moments and prints where it hit
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A child's preparations are a line of Python, its arguments those of the command line.
NURSERY = """
import gc, json, os, sys
import torch, pyvips, diffusers, transformers
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Model, PreTrainedTokenizerFast
from handscroll.cli import main as cli
from handscroll.cli import work
from handscroll import pipeline
from handscroll import files
from handscroll.jobs import folder, state_file, store
from handscroll.pictures import writing
from handscroll.runtime.sampling import schedule

torch.set_num_threads(1)
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(job["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job["out"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(job["prepare"])
        code = cli.run(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

SAVE_EVERY_STEP = "schedule.worth_saving = lambda *_: True"

# Every stage takes about a quarter of a second: loading, four steps, rows, encoding, publishing, cleaning up.
SLOW_DOWN = (
    SAVE_EVERY_STEP
    + """
import time
def slow(module, name, seconds):
    original = getattr(module, name)
    def slowed(*arguments, **options):
        time.sleep(seconds)
        result = original(*arguments, **options)
        time.sleep(seconds)
        return result
    setattr(module, name, slowed)
slow(pipeline, "encode_prompts", 0.1)
slow(schedule.SamplerRun, "step_done", 0.03)
slow(store, "write_whole", 0.02)
slow(state_file, "write_tensors", 0.02)
slow(files.os, "write", 0.03)
slow(writing, "encode_picture", 0.1)
slow(writing, "publish", 0.1)
slow(folder, "discard", 0.02)
"""
)

# Dies at the n-th call that touches a file by name, before it happens.
DIE_AT_FILE_OPERATION = (
    SAVE_EVERY_STEP
    + """
import signal
def start_dying(n):
    names = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
    here, count = os.getcwd(), 0
    def watch(event, arguments):
        nonlocal count
        if event in names and not (event == "open" and isinstance(arguments[0], int)):
            path = os.fsdecode(arguments[0])
            if os.path.abspath(path).startswith(here):
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
start_dying(%d)
"""
)


class Nursery:
    """Starts command lines of handscroll as processes, quickly."""

    def __init__(self, scratch: Path) -> None:
        self._out = scratch / "out"
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, folder: Path, arguments: list[str], prepare: str = SAVE_EVERY_STEP) -> int:
        """The process id of a run in `folder`."""
        job = {"folder": str(folder), "out": str(self._out), "prepare": prepare, "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        return int(self._read())

    def wait(self) -> tuple[int, str, str]:
        """Exit code (negative: a signal), stdout and stderr of the run that was started."""
        exit_code = int(self._read())
        stdout, stderr = (Path(f"{self._out}.{name}").read_text() for name in ("stdout", "stderr"))
        return exit_code, stdout, stderr

    def run(self, folder: Path, arguments: list[str], prepare: str = SAVE_EVERY_STEP) -> tuple[int, str, str]:
        self.start(folder, arguments, prepare)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_whole_or_absent(folder: Path, expected: dict[str, bytes]) -> None:
    """No half file under a name that the user knows; a Deep Zoom picture is there when its index is."""
    found = {name: data for name, data in files(folder).items() if ".run/" not in name}
    if "p.dzi" in expected and "p.dzi" not in found:
        return
    found.pop("p_files/.exchanging", None)
    assert all(expected.get(name) == data for name, data in found.items()), found.keys()


def where(folder: Path, output: str = "p.png") -> str:
    """What a killed run had come to, for the report."""
    run = folder / f"{output}.run"
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if (folder / output).exists():
        return "cleaning up"
    if "picture.part" in names:
        return "encoding the file"
    if any(name.startswith("latent-") for name in names):
        return "decoding"
    if any(name.startswith("state-") for name in names):
        return "denoising"
    return "prompt" if "job.json" in names else "starting"


def kill_at(nursery: Nursery, folder: Path, arguments: list[str], seconds: float) -> tuple[int, str]:
    """Kills a slowed run after so long. Returns its exit code, and where it was."""
    process = nursery.start(folder, arguments, SLOW_DOWN)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    exit_code, *_ = nursery.wait()
    return exit_code, where(folder) if exit_code else "finished"


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def options(miniature: Callable[..., Path]) -> Callable[..., list[str]]:
    """`options("p.png", row="1.6b", steps=4)`: the command line of a small picture."""

    def of(output: str = "p.png", row: str = "1.6b", steps: int = 4, **more: object) -> list[str]:
        arguments = ["generate", "a red sun", "--model", str(miniature(row)), "--size", "104x200"]
        arguments += ["--steps", str(steps), "--seed", "7", "-o", output]
        return arguments + [str(part) for name, value in more.items() for part in (f"--{name}", value)]

    return of


Options = Callable[..., list[str]]
_expected: dict[str, dict[str, bytes]] = {}


def uninterrupted(nursery: Nursery, arguments: list[str]) -> dict[str, bytes]:
    """The files that a run leaves which nothing happens to."""
    key = json.dumps(arguments)
    if key not in _expected:
        with tempfile.TemporaryDirectory() as folder:
            exit_code, _, stderr = nursery.run(Path(folder), arguments)
            assert exit_code == 0, stderr
            _expected[key] = files(Path(folder))
    return _expected[key]


# Killed


def check_kill(nursery: Nursery, arguments: list[str], seconds: float, folder: Path) -> str:
    """Kill, look, run the same command again: the same bytes. Returns where it was killed."""
    expected = uninterrupted(nursery, arguments)
    exit_code, stage = kill_at(nursery, folder, arguments, seconds)
    assert exit_code in (-9, 0)
    assert_whole_or_absent(folder, expected)
    exit_code, _, stderr = nursery.run(folder, arguments)
    assert exit_code == 0, stderr
    assert files(folder) == expected
    assert os.listdir(folder) == ["p.png"]
    return stage


def slowed_seconds(nursery: Nursery, arguments: list[str]) -> float:
    """How long a slowed run takes that nothing happens to; the first one of all is slower."""
    uninterrupted(nursery, arguments)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        exit_code, _, stderr = nursery.run(Path(folder), arguments, SLOW_DOWN)
        assert exit_code == 0, stderr
        return time.perf_counter() - start


def test_the_same_command_twice_gives_the_same_file(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    assert nursery.run(tmp_path, options())[0] == 0
    first = files(tmp_path)
    assert list(first) == ["p.png"]
    assert nursery.run(tmp_path, options())[0] == 0
    assert files(tmp_path) == first


@pytest.mark.parametrize("part", [0.15, 0.4, 0.65, 0.9])
def test_a_killed_run_goes_on_to_the_same_picture(
    nursery: Nursery, options: Options, tmp_path: Path, part: float
) -> None:
    check_kill(nursery, options(), part * slowed_seconds(nursery, options()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_a_run_killed_at_a_random_moment(nursery: Nursery, options: Options, tmp_path: Path, draw: int) -> None:
    seconds = random.Random(draw).uniform(0, slowed_seconds(nursery, options()))
    check_kill(nursery, options(), seconds, tmp_path)


def die_at_each_operation(nursery: Nursery, arguments: list[str], folder: Path, every: int) -> int:
    """Kills a run before its n-th file operation, for every `every`-th n, and each time runs it again. How many."""
    expected = uninterrupted(nursery, arguments)
    n = 0
    for n in range(1, 1000, every):
        here = folder / str(n)
        here.mkdir()
        exit_code, _, stderr = nursery.run(here, arguments, DIE_AT_FILE_OPERATION % n)
        assert exit_code in (-9, 0), stderr
        assert_whole_or_absent(here, expected)
        killed = exit_code == -9
        exit_code, _, stderr = nursery.run(here, arguments)
        assert exit_code == 0, (n, stderr)
        assert files(here) == expected, n
        assert {path.name for path in here.iterdir()} == {name.partition("/")[0] for name in expected}
        if not killed:
            return n
    raise AssertionError("more file operations than were thought of")


@pytest.mark.parametrize("output", ["p.png", "p.dzi"])
def test_dying_at_some_file_operations(nursery: Nursery, options: Options, tmp_path: Path, output: str) -> None:
    assert die_at_each_operation(nursery, options(output, steps=2), tmp_path, every=9) > 40


@pytest.mark.slow
@pytest.mark.parametrize("output", ["p.png", "p.dzi", "p.tif", "p.jpg"])
@pytest.mark.parametrize("row", ["1.6b", "sprint-1.6b"])
def test_dying_at_every_file_operation(
    nursery: Nursery, options: Options, tmp_path: Path, output: str, row: str
) -> None:
    die_at_each_operation(nursery, options(output, row, steps=2), tmp_path, every=1)


@pytest.mark.slow
def test_several_pictures_dying_at_every_file_operation(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    arguments = [*options(steps=2, count=2), "--save-latent", "l.safetensors"]
    die_at_each_operation(nursery, arguments, tmp_path, every=1)


# Interrupted


INTERRUPTED = """
import signal
def interrupt_at(stage, done):
    emit = work.print_notice
    def listen(event):
        emit(event)
        if (event.stage, event.done) == (stage, done):
            signal.raise_signal(signal.SIGINT)
    work.print_notice = listen
interrupt_at(%r, %d)
"""


@pytest.mark.parametrize(
    ("stage", "done", "from_where"),
    [("denoise", 2, "from step 2 of 4"), ("decode", 0, "from the finished latent"), ("text", 0, "")],
)
def test_control_c_keeps_what_there_is(
    nursery: Nursery, options: Options, tmp_path: Path, stage: str, done: int, from_where: str
) -> None:
    expected = uninterrupted(nursery, options())
    interrupted = SAVE_EVERY_STEP + INTERRUPTED % (stage, done)
    exit_code, stdout, stderr = nursery.run(tmp_path, options(), interrupted)
    assert (exit_code, stdout) == (130, "")
    if not from_where:
        assert stderr == "interrupted\n"
        assert files(tmp_path) == {}
        return
    assert stderr == f"interrupted; `handscroll resume p.png.run` goes on {from_where}\n"
    assert os.listdir(tmp_path) == ["p.png.run"]
    exit_code, stdout, stderr = nursery.run(tmp_path, ["resume", "p.png.run"])
    assert (exit_code, stdout) == (0, "p.png\n")
    assert stderr.startswith(f"note: p.png.run goes on {from_where}\n104x200, ")
    assert files(tmp_path) == expected


def test_json_says_what_was_done_before(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    interrupted = SAVE_EVERY_STEP + INTERRUPTED % ("denoise", 3)
    _, stdout, _ = nursery.run(tmp_path, [*options(), "--json"], interrupted)
    error = json.loads(stdout)["error"]
    assert error["code"] == "interrupted"
    assert "handscroll resume p.png.run" in error["message"]
    found = json.loads(nursery.run(tmp_path, ["resume", "p.png", "--json"])[1])
    assert found["resumed_from_step"] == 3
    assert "resumed_from_step" not in json.loads(nursery.run(tmp_path, [*options(), "--json"])[1])


def test_a_drawn_seed_is_remembered(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    arguments = [part for part in options() if part not in ("--seed", "7")]
    nursery.run(tmp_path, arguments, SAVE_EVERY_STEP + INTERRUPTED % ("denoise", 2))
    seed = json.loads((tmp_path / "p.png.run" / "job.json").read_text())["first_seed"]
    nursery.run(tmp_path, arguments, SAVE_EVERY_STEP + INTERRUPTED % ("denoise", 3))
    exit_code, _, stderr = nursery.run(tmp_path, arguments)
    assert exit_code == 0
    assert stderr.startswith("note: p.png.run goes on from step 3 of 4\n")
    assert stderr.endswith(f"seed {seed}\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--seed", "8"], "its seed was 7, now it is 8"),
        (["--size", "96x200"], "its size was '104x200', now it is '96x200'"),
        (["--steps", "3"], "its steps was 4, now it is 3"),
        (["--negative", "fog"], "its negative prompt was '', now it is 'fog'"),
    ],
)
def test_another_command_for_the_same_file_starts_over(
    nursery: Nursery, options: Options, tmp_path: Path, change: list[str], told: str
) -> None:
    expected = uninterrupted(nursery, options() + change)
    nursery.run(tmp_path, options(), SAVE_EVERY_STEP + INTERRUPTED % ("denoise", 3))
    exit_code, _, stderr = nursery.run(tmp_path, options() + change)
    assert exit_code == 0
    assert stderr.startswith(f"note: starting over in p.png.run: {told}\n")
    assert files(tmp_path) == expected


def test_another_way_to_decode_goes_on(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    nursery.run(tmp_path, options(), INTERRUPTED % ("decode", 0))
    exit_code, _, stderr = nursery.run(tmp_path, [*options(), "--decode", "whole"])
    assert exit_code == 0
    assert stderr.startswith("note: p.png.run goes on from the finished latent\n")


def test_a_kept_latent_of_a_run_can_be_decoded(nursery: Nursery, options: Options, tmp_path: Path) -> None:
    nursery.run(tmp_path, options(), INTERRUPTED % ("decode", 0))
    exit_code, _, stderr = nursery.run(tmp_path, ["decode", "p.png.run/latent-1.safetensors", "-o", "q.png"])
    assert exit_code == 0, stderr
    assert (tmp_path / "q.png").read_bytes() == uninterrupted(nursery, options())["p.png"]


def test_what_cannot_be_resumed_is_one_line(
    nursery: Nursery, options: Options, tmp_path: Path, miniature: Callable[..., Path]
) -> None:
    def refused(*arguments: str) -> str:
        exit_code, stdout, stderr = nursery.run(tmp_path, ["resume", *arguments])
        assert (exit_code, stdout) != (0, "")
        assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
        return stderr

    assert "no unfinished run" in refused("p.png")
    (tmp_path / "folder").mkdir()
    assert "not a run folder" in refused("folder")
    model = shutil.copytree(miniature(), tmp_path / "model")
    arguments = [str(model) if part == str(miniature()) else part for part in options()]
    nursery.run(tmp_path, arguments, SAVE_EVERY_STEP + INTERRUPTED % ("denoise", 3))
    assert "device" in refused("p.png.run", "--device", "cuda:7")
    os.utime(model / "vae" / "config.json")
    assert "model files" in refused("p.png.run")
    os.rename(tmp_path / "p.png.run", tmp_path / "q.png.run")
    assert "was renamed" in refused("q.png.run")
    os.rename(tmp_path / "q.png.run", tmp_path / "p.png.run")
    shutil.rmtree(model)
    assert "model" in refused("p.png.run")
    job = tmp_path / "p.png.run" / "job.json"
    job.write_text(job.read_text().replace('"format_version": 1', '"format_version": 0'))
    assert "written by handscroll" in refused("p.png.run")
    job.write_text("{")
    assert "broken" in refused("p.png.run")


def main(kills: int) -> None:
    """Kills runs at random moments and prints what became of them."""
    import miniatures

    with tempfile.TemporaryDirectory() as scratch:
        model = miniatures.make_checkpoint(Path(scratch) / "model", row="1.6b")
        nursery = Nursery(Path(scratch))
        arguments = ["generate", "a red sun", "--model", str(model), "--size", "104x200", "--steps", "4"]
        arguments += ["--seed", "7", "-o", "p.png"]
        seconds = slowed_seconds(nursery, arguments)
        draw = random.Random()
        hit: Counter[str] = Counter()
        while hit.total() - hit["finished"] < kills:
            with tempfile.TemporaryDirectory() as folder:
                hit[check_kill(nursery, arguments, draw.uniform(0, seconds), Path(folder))] += 1
        nursery.close()
    late = hit.pop("finished", 0)
    print(f"{kills} runs of {seconds:.1f} s killed at random moments, all went on to the same bytes: {dict(hit)}")
    print(f"{late} were done before the moment came")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
