"""The memory benchmarks measure what they say, on miniatures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import torch

from handscroll.plan.inputs import Rates
from handscroll.runtime import rates

BENCH = Path(__file__).parents[2] / "bench"
MIB = 2**20
Miniature = Callable[..., Path]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/memory.py as a module."""
    monkeypatch.syspath_prepend(BENCH)
    import memory

    return memory


@pytest.fixture
def gpu_bench(bench: Any) -> Any:
    import gpu_memory

    return gpu_memory


@pytest.fixture
def in_this_process(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """What would be children runs here, which is quicker; gives their commands. Peaks are the stages'."""
    commands: list[list[str]] = []
    monkeypatch.setattr(rates, "measure_rates", lambda device: Rates())

    def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Any:
        commands.append(list(map(str, command)))
        first, second = commands[-1][1:3]
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), monkeypatch.context() as patch:
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            exit_code = run_here(patch, first, second, commands[-1])
        done = bench.child.Child(exit_code, 0, 0.1, stdout.getvalue(), stderr.getvalue())
        stages = done.answer.get("memory", {}).get("stages", {}) if isinstance(done.answer, dict) else {}
        done.peak_bytes = max((stage["measured_bytes"] for stage in stages.values()), default=MIB)
        return done

    def run_here(patch: pytest.MonkeyPatch, first: str, second: str, command: list[str]) -> int:
        if (first, second) == ("-m", "handscroll"):
            from handscroll.cli import main as cli

            return cli.run(command[3:])
        patch.setattr(sys, "argv", command[1:])
        if Path(first).name == "memory.py":
            bench.main()
        else:
            import tiled_decode

            patch.setattr(tiled_decode, "reset_peak", lambda: False)
            tiled_decode.main()
        return 0

    monkeypatch.setattr(bench.child, "run", run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield commands
    torch.set_num_threads(threads)


def report_of(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert "/" not in json.dumps(report["machine"])
    return report, printed.err


# One process a measurement


def test_a_child_is_measured_without_its_parents_memory(bench: Any) -> None:
    ours = torch.ones(300 * MIB // 4)
    code = "import os, sys; held = b'1' * (80 << 20); print(1); print(os.environ['HS']); sys.exit(5)"
    done = bench.child.run([sys.executable, "-c", code], {"HS": "[7]"})
    assert done.exit_code == 5
    assert 80 * MIB < done.peak_bytes < 150 * MIB < ours.nbytes
    assert done.answer == [7]
    assert done.seconds > 0
    assert done.why == "exit code 5"


def test_a_child_that_is_no_program(bench: Any) -> None:
    with pytest.raises(bench.child.ChildError, match="could not be started"):
        bench.child.run(["/nowhere/at/all"])


@pytest.mark.thorough
def test_the_least_budget_is_kept_by_a_process_of_its_own(miniature: Miniature, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "memory.py"), "generate", str(miniature("1.6b")), "--size", "128"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--budgets", "least", "--scratch", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    (run,) = report["runs"]
    assert run["kept"]
    assert run["budget_bytes"] == report["minimum_bytes"]
    assert 100 * MIB < run["peak_bytes"] <= run["planned_bytes"] <= run["budget_bytes"]
    assert set(run["seconds"]) == {"text", "denoise", "decode", "total"}
    assert "least" in finished.stderr
    assert not list(tmp_path.iterdir())


# The reports


def test_one_picture_under_several_budgets(
    bench: Any, in_this_process: Any, miniature: Miniature, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    options = ("--size", "128x64", "--budgets", "none,8GiB,2MiB", "--scratch", tmp_path)
    report, printed = report_of(bench.main, monkeypatch, capsys, "generate", miniature("1.6b"), *options)
    free, ample, small = report["runs"]
    assert report["size_px"] == [128, 64]
    assert report["model"] == "1.6b"
    assert free["kept"] is None
    assert ample["kept"]
    assert ample["difference"] == {"differing": 0, "largest": 0, "mean": 0, "same": True}
    assert set(ample["stages"]) == {"text", "denoise", "decode"}
    assert "at least" in small["failed"]
    assert not report["kept"]
    assert "2MiB failed" in printed


def test_decoding_beside_tiles(
    bench: Any, in_this_process: Any, miniature: Miniature, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.child, "least_bytes", lambda *_: 8 * 2**30)
    arguments = ("decode", miniature("1.6b"), "--sizes", "544", "--plan-sizes", "8192", "--scratch", tmp_path)
    report, printed = report_of(bench.main, monkeypatch, capsys, *arguments)
    (at,) = report["sizes"]
    assert at["unlimited"]["seconds"]["decode"] > 0
    assert at["least"]["budget_bytes"] == 8 * 2**30
    assert at["difference"]["same"]
    assert at["seconds_over_unlimited"] > 0
    assert at["tiled"]["seconds"] > 0
    assert not at["below_tiled"]
    (planned,) = report["planned"]
    assert planned["size_px"] == [8192, 8192]
    assert planned["least"]["planned_bytes"] <= planned["minimum_bytes"] < planned["unlimited"]["planned_bytes"]
    assert planned["least"]["seconds"] >= planned["unlimited"]["seconds"]
    assert "planned alone" in printed


def test_random_jobs(bench: Any, in_this_process: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    arguments = ("draws", "--count", 2, "--seed", 3, "--largest", 128, "--scratch", tmp_path)
    report, printed = report_of(bench.main, monkeypatch, capsys, *arguments)
    assert report["count"] == 2
    assert report["failed"] == 0
    assert 0 < report["lowest"] <= report["median"] <= report["highest"]
    for run in report["draws"]:
        assert (run["width"], run["height"]) == (128, 128)
        assert run["planned_bytes"] <= run["budget_bytes"]
    assert "2 draws" in printed


def test_draws_repeat_and_are_summed_up(bench: Any) -> None:
    import random

    first, second = (
        [bench.draw(rng, ["1.6b", "0.6b"], 2048) for _ in range(50)] for rng in (random.Random(5), random.Random(5))
    )
    assert first == second
    assert {job["model"] for job in first} == {"1.6b", "0.6b", "tiny-landscape"}
    assert all(job["budget_bytes"] or job["over_minimum"] >= 1 for job in first)
    assert {(job["steps"], job["compose_px"]) for job in first} == set(bench.DRAWN_WAYS)
    runs = [{"planned_over_measured": ratio, "kept": ratio >= 1} for ratio in (1.2, 0.9, 1.1, 1.05)]
    found = bench.summary([*runs, {"failed": "killed"}])
    assert found["lowest"] == 0.9
    assert found["median"] == pytest.approx(1.075)
    assert found["highest"] == 1.2
    assert (found["below_1"], found["above_1_15"], found["over_budget"], found["failed"]) == (1, 1, 1, 1)
    assert bench.summary([{"failed": "killed"}])["median"] is None


def test_how_two_pictures_differ(bench: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (150, 40, 3), dtype=np.uint8)
    changed = pixels.copy()
    changed[149, 39, 2] += 3
    for name, array in (("a.png", pixels), ("b.tif", changed)):
        pyvips.Image.new_from_array(array).write_to_file(str(tmp_path / name))
    apart = bench.difference(tmp_path / "a.png", tmp_path / "b.tif")
    assert apart["differing"] == 1 / pixels.size
    assert apart["largest"] == 3
    assert not apart["same"]
    assert bench.difference(tmp_path / "b.tif", tmp_path / "b.tif")["same"]


def test_a_new_cache_knows_the_machine_and_no_prompt(bench: Any, tmp_path: Path) -> None:
    first = Path(bench.fresh_cache(tmp_path)["HANDSCROLL_CACHE"])
    assert not list(first.iterdir())
    (first / "devices.json").write_text("{}")
    (first / "text").mkdir()
    second = Path(bench.fresh_cache(tmp_path)["HANDSCROLL_CACHE"])
    assert [path.name for path in second.iterdir()] == ["devices.json"]


def test_tiles_that_the_peak_does_not_need_are_left_out(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import miniatures
    import tiled_decode

    monkeypatch.setattr(tiled_decode, "TILE_PX", 128)
    monkeypatch.setattr(tiled_decode, "TILE_STRIDE_PX", 96)
    model = miniatures.make_autoencoder()
    model.enable_tiling(128, 128, 96, 96)
    decoded: list[torch.Size] = []
    model.decoder.conv_in.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0].shape[2:]))
    tiled_decode.skip_tiles(model, 8, 5)
    with torch.no_grad():
        picture = model.decode(torch.randn(1, 32, 8, 5), return_dict=False)[0]
    assert picture.shape == (1, 3, 256, 160)
    assert decoded == [(4, 4), (4, 4)]
    assert (picture[:, :, 10:90, 130:] == 0.5).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x", "--budgets", "least,lots"),
        ("generate", "x", "--size", "12"),
        ("decode", "x", "--sizes", "1000"),
        ("decode", "x", "--sizes", "1024,"),
        (),
    ],
)
def test_what_cannot_be_meant_is_refused(bench: Any, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)


# On a GPU, and without one


def test_the_gpu_benchmark_on_a_miniature(
    gpu_bench: Any, in_this_process: Any, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_bench.child, "least_bytes", lambda *_: 8 * 2**30)
    arguments = ("--miniature", "--repeats", 2, "--scratch", tmp_path)
    report, printed = report_of(gpu_bench.main, monkeypatch, capsys, *arguments)
    picture = report["picture"]
    assert report["measured"]
    assert len(picture["limited"]["seconds_each"]) == 2
    assert picture["limited"]["kept"]
    assert picture["difference"]["same"]
    assert picture["seconds_over_unlimited"] > 0
    assert report["large"]["limited"]["kept"]
    assert "times as long" in printed
    outputs = [command[command.index("-o") + 1] for command in in_this_process]
    assert sum(output.endswith(".tif") for output in outputs) == 1


def test_a_run_that_fails_is_reported(gpu_bench: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    def handscroll(command: Sequence[str | Path], environment: object) -> Any:
        failed = "--memory" in command
        answer = {"memory": {"planned_peak_bytes": 1, "measured_peak_bytes": 1, "stages": {}}}
        answer["seconds"] = {"decode": 1.0, "total": 1.0}
        return gpu_bench.child.Child(int(failed), 1, 1.0, json.dumps(answer), "error: out of memory")

    monkeypatch.setattr(gpu_bench.child, "handscroll", handscroll)
    monkeypatch.setattr(gpu_bench.child, "least_bytes", lambda *_: 1)
    report, printed = report_of(gpu_bench.main, monkeypatch, capsys, "--miniature", "--quick", "--scratch", tmp_path)
    assert report["picture"]["limited"]["failed"] == "error: out of memory"
    assert "large" not in report
    assert "failed: error: out of memory" in printed


def test_without_a_device_there_are_plans(
    gpu_bench: Any, miniature: Miniature, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = (miniature("1.6b-4k", dtype=torch.bfloat16), "--budget", "400MiB", "--large-budget", "1MiB", "--save")
    monkeypatch.setattr(gpu_bench.report, "RESULTS", tmp_path)
    report, printed = report_of(gpu_bench.main, monkeypatch, capsys, *arguments)
    assert not report["measured"]
    free, limited, refused = report["plans"]
    assert (free["width"], free["steps"], free["device"], free["precision"]) == (4096, 20, "cuda:0", "bf16")
    assert limited["memory"]["planned_peak_bytes"] <= limited["memory"]["budget_bytes"] == 400 * MIB
    assert "needs at least" in refused["failed"]
    assert "nothing was measured" in printed
    assert not list(tmp_path.iterdir())


def test_a_saved_report_names_what_and_where(bench: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path / "results")
    found = bench.report.dated(threads=3)
    assert found["machine"]["threads"] == 3
    bench.report.print_and_save(found, ["a table"], "memory-draws-2")
    printed = capsys.readouterr()
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == f"{found['date']}-memory-draws-2-{bench.report.machine.slug(found['machine'])}.json"
    assert json.loads(path.read_text()) == json.loads(printed.out) == found
    assert "a table" in printed.err
