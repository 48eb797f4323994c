"""Run folders and latents that are broken at random: a line each, soon, in little memory, and nothing else is touched.

The default suite tries a few dozen; `-m thorough` a few hundred.
"""

from __future__ import annotations

import random
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from handscroll import Request, generate
from handscroll.cli import main as cli
from handscroll.events import Progress
from handscroll.runtime.sampling import schedule
from mutations import CHANGES

Miniature = Callable[..., Path]
FEW = {"job": 25, "latent": 20, "state": 6}  # a state that is refused is a picture from its first step on
MANY = {"job": 100, "latent": 100, "state": 80}
MAX_SECONDS, MAX_BYTES = 1.0, 64 << 20


@pytest.fixture(scope="module")
def runs(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a run in them: one that is cut off while it is denoised, one before it is decoded."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "worth_saving", lambda *_: True)
        for stage in ("denoise", "decode"):

            def stop(event: Progress, stage: str = stage) -> None:
                if event.stage == stage and event.done:
                    raise KeyboardInterrupt

            made[stage] = tmp_path_factory.mktemp(stage)
            request = Request("a lake", model=str(miniature("1.6b")), width=64, height=64, steps=2, seed=3)
            with pytest.raises(KeyboardInterrupt):
                generate(request, made[stage] / "p.png", save_latent=made[stage] / "l.safetensors", on_event=stop)
    shutil.copy(made["decode"] / "p.png.run" / "latent-1.safetensors", made["decode"] / "l.safetensors")
    return made


def check(
    number: int, kind: str, runs: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """One broken file, and what is said of it. Whatever is refused is refused soon, and little is read for it."""
    draw = random.Random(f"{kind} {number}")
    work = folder / f"{kind}-{number}"
    shutil.copytree(runs["denoise" if kind == "state" else "decode"], work)
    file = {
        "job": work / "p.png.run" / "job.json",
        "state": work / "p.png.run" / "state-1.safetensors",
        "latent": work / "l.safetensors",
    }[kind]
    file.write_bytes(CHANGES[file.suffix](file.read_bytes(), draw))
    bystander = work / "weights.safetensors"
    bystander.write_bytes(b"mine")
    before = {path for path in folder.rglob("*") if work not in path.parents}
    command = ["decode", str(file), "-o", str(work / "q.png")] if kind == "latent" else ["resume", str(file.parent)]
    capsys.readouterr()
    for arguments in (["info", str(file if kind == "latent" else file.parent)], command):
        tracemalloc.start()
        started = time.process_time()
        exit_code = cli.run(arguments)
        seconds, peak_bytes = time.process_time() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        ran = capsys.readouterr()
        told = f"{arguments} of {work}: {ran.err[-2000:]}"
        assert exit_code in (0, 1, 2, 3), told
        errors = re.findall(r"^error: .*$", ran.err, re.MULTILINE)
        assert len(errors) == (exit_code != 0), told
        assert "Traceback" not in ran.err, told
        assert "a fault in handscroll itself" not in ran.err, told
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", ran.err + ran.out), told
        if exit_code:
            assert seconds < MAX_SECONDS, told
            assert peak_bytes < MAX_BYTES, told
    assert bystander.read_bytes() == b"mine"
    assert {path for path in folder.rglob("*") if work not in path.parents} == before
    shutil.rmtree(work)
    return exit_code, ran.err


@pytest.mark.parametrize("kind", ["job", "state", "latent"])
def test_broken_at_random(kind: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["info", str(runs["decode"] / "p.png.run")])  # what is imported on the way is not the file's
    for number in range(FEW[kind]):
        check(number, kind, runs, tmp_path, capsys)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["job", "state", "latent"])
def test_broken_at_random_many_times(
    kind: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(100, 100 + MANY[kind]):
        check(number, kind, runs, tmp_path, capsys)
