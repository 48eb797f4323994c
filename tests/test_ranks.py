"""One picture on several processes: the same bytes as on one, and an end with its cause when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from handscroll.events import ignore
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import Hardware, PlanInputs
from handscroll.plan.search import make_plan
from handscroll.request import Request
from handscroll.runtime.distributed import Team
from handscroll.runtime.distributed.processes import ProcessRanks
from handscroll.runtime.keeping import Keeping
from handscroll.runtime.session import Session

ASKED = ["--steps", "3", "--seed", "5", "--precision", "fp32"]
Miniature = Callable[..., Path]
SOON_S = 10.0


def command(*arguments: str, **environ: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "handscroll", *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **environ}


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    line, env = command(*arguments, **environ)
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)


def made(path: Path, model: Path, *arguments: str) -> bytes:
    asked = ["generate", "a lake", "--model", str(model), "-o", str(path), "--quiet", *ASKED]
    done = run(*asked, *arguments)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.mark.parametrize(
    ("row", "asked", "ranks"),
    [
        ("1.6b", ["--size", "96x224"], "cpu:3"),
        pytest.param("1.6b", ["--size", "96x224"], "cpu:7", marks=pytest.mark.slow),
        pytest.param("1.6b", ["--size", "90x250", "--precision", "bf16"], "cpu:4", marks=pytest.mark.thorough),
        pytest.param("1.6b", ["--size", "64x160", "--precision", "int8"], "cpu:2", marks=pytest.mark.thorough),
        pytest.param("1.6b", ["--size", "64x160", "--precision", "int4"], "cpu:2", marks=pytest.mark.slow),
        pytest.param("sprint-1.6b", ["--size", "64x160"], "cpu:2", marks=pytest.mark.slow),
        pytest.param("1.6b-4k", ["--size", "256", "--compose", "128"], "cpu:2", marks=pytest.mark.thorough),
    ],
)
def test_ranks_make_the_same_file(miniature: Miniature, tmp_path: Path, row: str, asked: list[str], ranks: str) -> None:
    model = miniature(row)
    alone = made(tmp_path / "alone.png", model, *asked)
    assert made(tmp_path / "ranks.png", model, *asked, "--devices", ranks) == alone
    tight = made(tmp_path / "tight.png", model, *asked, "--devices", ranks, "--strip-rows", "1", "--memory", "2GiB")
    assert tight == alone
    assert not list(tmp_path.glob("*.run"))


# Imported by every process as it starts: a state after each step, and time to end a rank in.
SLOW_STEPS = """
import time
from handscroll import pipeline
from handscroll.runtime import decode
from handscroll.runtime.sampling import schedule
schedule.SAVE_AFTER_SECONDS, schedule.SAVE_SHARE = 0, float("inf")
def slow(owner, name, seconds):
    run = getattr(owner, name)
    def slowed(*arguments, **options):
        time.sleep(seconds)
        return run(*arguments, **options)
    setattr(owner, name, slowed)
slow(pipeline, "encode_prompts", 2)
slow(schedule.SamplerRun, "step_done", 0.2)
slow(decode, "_Pixels", 1)
"""


@pytest.fixture
def slowly(tmp_path: Path) -> dict[str, str]:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW_STEPS)
    return {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}


def started(path: Path, model: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    line, env = command("generate", "a lake", "--model", str(model), "-o", str(path), *ASKED, *arguments, **environ)
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes of a launcher, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != launcher:
                continue
            environ = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        found |= {int(entry[5:]): int(folder.name) for entry in environ if entry.startswith(b"RANK=")}
    return found


def until(path: Path) -> None:
    """Waits for a file of a run."""
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def is_there(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(
    ("rank", "by", "said"),
    [
        (1, signal.SIGKILL, "rank 1 (cpu, process"),
        pytest.param(0, signal.SIGKILL, "SIGKILL", marks=pytest.mark.thorough),
        pytest.param(1, signal.SIGSTOP, "does not answer any more", marks=pytest.mark.thorough),
        pytest.param(0, signal.SIGSTOP, "does not answer any more", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "sign",
    [
        "state-1.safetensors",  # denoising
        pytest.param("job.json", marks=pytest.mark.slow),  # the prompt
        pytest.param("latent-1.safetensors", marks=pytest.mark.slow),  # decoding
    ],
)
def test_a_rank_that_ends_or_hangs_ends_all(
    miniature: Miniature, tmp_path: Path, slowly: dict[str, str], sign: str, rank: int, by: signal.Signals, said: str
) -> None:
    model, asked = miniature("1.6b"), ["--size", "160x96", "--steps", "20"]
    alone = made(tmp_path / "alone.png", model, *asked)
    path = tmp_path / "ranks.png"
    with started(path, model, *asked, "--devices", "cpu:2", "--json", **slowly) as launched:
        until(tmp_path / "ranks.png.run" / sign)
        ranks = ranks_of(launched.pid)
        os.kill(ranks[rank], by)
        at = time.monotonic()
        printed, errors = launched.communicate(timeout=60)
        assert time.monotonic() - at < SOON_S
    assert launched.returncode == 1
    assert said in errors, errors
    assert json.loads(printed)["error"]["code"] == "rank_failed"
    assert "handscroll resume" in errors.splitlines()[-1]
    assert not any(map(is_there, ranks.values()))
    if sign == "job.json":
        return
    assert (tmp_path / "ranks.png.run" / sign).exists()
    again = run("resume", str(path), *(["--devices", "cpu:3"] if rank else []), "--quiet", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_from_step"]
    assert path.read_bytes() == alone


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_before_all_are_there(miniature: Miniature, tmp_path: Path, rank: int) -> None:
    with started(tmp_path / "a.png", miniature("1.6b"), "--size", "64", "--devices", "cpu:2") as launched:
        while rank not in (ranks := ranks_of(launched.pid)):
            time.sleep(0.05)
        os.kill(ranks[rank], signal.SIGKILL)
        at = time.monotonic()
        _, errors = launched.communicate(timeout=60)
        assert time.monotonic() - at < SOON_S
    assert launched.returncode == 1
    assert f"rank {rank} (process" in errors
    assert "SIGKILL" in errors
    assert not any(map(is_there, ranks_of(launched.pid).values()))


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_process_that_started_them(
    miniature: Miniature, tmp_path: Path, slowly: dict[str, str], by: signal.Signals
) -> None:
    path = tmp_path / "ranks.png"
    with started(path, miniature("1.6b"), "--size", "96", "--steps", "40", "--devices", "cpu:2", **slowly) as launched:
        until(tmp_path / "ranks.png.run" / "state-1.safetensors")
        ranks = ranks_of(launched.pid)
        launched.send_signal(by)
        at = time.monotonic()
        _, errors = launched.communicate(timeout=60)
        while any(map(is_there, ranks.values())):
            assert time.monotonic() - at < SOON_S
            time.sleep(0.1)
    if by == signal.SIGINT:
        assert launched.returncode == 130
        assert "interrupted" in errors.splitlines()[-1]
        assert "handscroll resume" in errors.splitlines()[-1]
    assert (tmp_path / "ranks.png.run" / "state-1.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "cpu,cuda:0"], "cannot be mixed"),
        (["--devices", "cuda:0,cuda:0"], "names cuda:0 twice"),
        (["--devices", "0"], "is not known"),
        (["--devices", "cpu:2", "--device", "cpu"], "leave one of them out"),
        (["--devices", "cpu:2", "--decode", "tiled"], "decodes by rows alone"),
    ],
)
def test_devices_that_cannot_be(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("generate", "a lake", "-o", str(tmp_path / "a.png"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_ranks_than_rows(miniature: Miniature, tmp_path: Path) -> None:
    asked = ["generate", "a lake", "--model", str(miniature("1.6b")), "-o", str(tmp_path / "a.png"), "--size", "64"]
    done = run(*asked, "--devices", "cpu:3", "--json")
    assert done.returncode == 2
    assert "3 devices cannot share a picture of 64 pixels" in done.stderr
    assert "--devices 2 or fewer" in done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["error"]["code"] == "bad_usage"


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run("generate", "a lake", "-o", str(tmp_path / "a.png"), HANDSCROLL_JOIN_S="3", **ranks)
    assert done.returncode == 1
    assert "does not reach the others at 127.0.0.1:1 within 3 s" in done.stderr
    assert done.stderr.count("\n") == 1


def test_devices_that_cannot_be_and_a_prompt_on_stdin(tmp_path: Path) -> None:
    done = run("generate", "-", "--devices", "cpu,cuda:0", "-o", str(tmp_path / "a.png"))
    assert done.returncode == 2
    assert "cannot be mixed" in done.stderr
    done = run("generate", "a lake", "--devices", "cpu:1000", "--size", "65536", "-o", str(tmp_path / "a.png"))
    assert done.returncode == 2
    assert "1000 processes are too many" in done.stderr


def as_ranks(
    tmp_path: Path, port: int, *models: Path, asked: tuple[str, ...] = ()
) -> list[subprocess.CompletedProcess[str]]:
    """A rank for each model, as torchrun starts them on hosts of their own."""
    with ThreadPoolExecutor(len(models)) as pool:

        def rank(number: int) -> subprocess.CompletedProcess[str]:
            line = ["generate", "a lake", "--model", str(models[number]), "-o", str(tmp_path / "a.png"), *asked]
            place = {"RANK": str(number), "WORLD_SIZE": str(len(models)), "LOCAL_RANK": str(number)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return run(*line, "--size", "64", "--quiet", *ASKED, HANDSCROLL_JOIN_S="30", **place)

        return list(pool.map(rank, range(len(models))))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_ranks_of_torchrun_with_different_checkpoints(miniature: Miniature, tmp_path: Path) -> None:
    for done in as_ranks(tmp_path, free_port(), miniature("1.6b"), miniature("0.6b")):
        assert done.returncode == 2
        assert "the checkpoint (a digest of its files) is" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_ranks_of_torchrun_with_different_versions(miniature: Miniature, tmp_path: Path) -> None:
    older = "import sys, handscroll.version as v; v.__version__ = '0.0.9'; from handscroll.cli.main import main; main()"
    line = ["generate", "a lake", "--model", str(miniature("1.6b")), "-o", str(tmp_path / "a.png"), "--size", "64"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HANDSCROLL_JOIN_S": "30"}
    _, environ = command(**place, RANK="1", LOCAL_RANK="1")
    second = subprocess.Popen([sys.executable, "-c", older, *line], env=environ, stderr=subprocess.PIPE, text=True)
    first = run(*line, **place, RANK="0", LOCAL_RANK="0")
    _, said = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (2, 2)
    for told in (first.stderr, said):
        assert "handscroll is 0.0.9 on rank 1" in told
        assert told.count("\n") == 1


@pytest.mark.thorough
def test_ranks_of_torchrun_decode_by_rows_alone(miniature: Miniature, tmp_path: Path) -> None:
    model = miniature("1.6b")
    first, _ = as_ranks(tmp_path, free_port(), model, model, asked=("--decode", "tiled"))
    assert first.returncode == 2
    assert "several devices decode by rows alone" in first.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.thorough
def test_ranks_of_torchrun_make_the_same_file(miniature: Miniature, tmp_path: Path) -> None:
    model = miniature("1.6b")
    first, second = as_ranks(tmp_path, free_port(), model, model)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (tmp_path / "a.png").read_bytes() == made(tmp_path / "alone.png", model, "--size", "64")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(taken.getsockname()[1])
        done = run("generate", "a lake", "-o", str(tmp_path / "a.png"), HANDSCROLL_JOIN_S="3", **place)
    assert done.returncode == 1
    assert f"port 127.0.0.1:{place['MASTER_PORT']} is in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_others_are_told_of_the_leaders_scratch_folder(miniature: Miniature, tmp_path: Path) -> None:
    team = Team(ProcessRanks(group=None, rank=0, size=2), "cpu")
    Session(CheckpointSpec.from_folder(miniature("1.6b")), scratch=tmp_path, team=team)
    assert team.scratch == tmp_path


def test_they_are_told_of_the_folder_of_every_job(miniature: Miniature, tmp_path: Path) -> None:
    team = Team(ProcessRanks(group=None, rank=0, size=2), "cpu")
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    plan = make_plan(spec, Request("a lake", seed=1), PlanInputs(Hardware("cpu"), tokens=5), 1)
    with Keeping().opened(spec, plan, tmp_path, ignore, team) as session:
        assert team.scratch == session.scratch == tmp_path


PIPELINE = """
import sys
import torch
import torch.distributed as dist
from diffusers import AutoencoderDC
import handscroll

torch.set_num_threads(1)
folder, out = sys.argv[1:]
autoencoder = AutoencoderDC.from_pretrained(folder, subfolder="vae").eval()
dist.init_process_group("gloo")
handscroll.attach(autoencoder, group=True)
draw = torch.Generator().manual_seed(3)
latent = torch.randn(2, autoencoder.config.latent_channels, 5, 3, generator=draw)
with torch.no_grad():
    picture = autoencoder.decode(latent).sample
    again = autoencoder.encode(picture).latent
    handscroll.attach(autoencoder)
    assert torch.equal(autoencoder.decode(latent).sample, picture)
    assert torch.equal(autoencoder.encode(picture).latent, again)
open(f"{out}/{dist.get_rank()}", "w").write("the same bits")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_an_attached_autoencoder_under_torchrun(miniature: Miniature, tmp_path: Path, ranks: int) -> None:
    (tmp_path / "script.py").write_text(PIPELINE)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    line += [str(tmp_path / "script.py"), str(miniature("1.6b")), str(tmp_path)]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("[0-9]")) == [str(rank) for rank in range(ranks)]


def test_a_plan_tells_of_every_rank() -> None:
    done = run("plan", "--model", "sana-1.6b-4k", "--size", "4096x4000", "--devices", "cpu:3", "--json", "--quiet")
    found = json.loads(done.stdout)
    ranks = found["ranks"]
    assert [each["rank"] for each in ranks] == [0, 1, 2]
    assert [each["first_row"] for each in ranks] == [0, *(each["stop_row"] for each in ranks[:-1])]
    assert ranks[-1]["stop_row"] == 4000
    assert 1 <= sum(each["step_part"] for each in ranks) <= 3 * max(each["step_part"] for each in ranks) <= 1.05
    assert max(each["step_sent_bytes"] for each in ranks) == found["shares"][0]["sent_bytes"]
    table = run("plan", "--model", "sana-1.6b-4k", "--size", "4096", "--devices", "cuda:0,cuda:1", "--quiet")
    if table.returncode:  # where those are not
        assert "is not here" in table.stderr
    else:
        assert "1     cuda:1" in table.stdout
