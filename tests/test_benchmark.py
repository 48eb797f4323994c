"""`handscroll bench`, on a miniature."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from handscroll.cli import main as cli
from handscroll.cli.bench import benchmark_text
from handscroll.events import Progress, ignore
from handscroll.plan.inputs import Rates
from handscroll.runtime import benchmark, rates

Miniature = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(benchmark, "RATE_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(rates, "measure_rates", lambda device: Rates())
    for name in ("convolution_rate", "matrix_rate"):
        monkeypatch.setattr(benchmark, name, lambda dtype, device: 100.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", ["1.6b-4k", "sprint-0.6b"])
def test_both_ways_of_every_stage_agree(miniature: Miniature, row: str) -> None:
    events: list[Progress] = []
    found = benchmark.measure(str(miniature(row)), width=100, height=64, device="cpu", on_event=events.append)
    assert (found.width, found.height, found.precision, found.device) == (128, 64, "fp32", "cpu")
    assert [stage.stage for stage in found.stages] == ["text", "denoise", "decode"]
    for stage in found.stages:
        assert not stage.note
        assert stage.handscroll is not None
        assert stage.whole is not None
        assert stage.handscroll.seconds > 0
        assert stage.handscroll.peak_bytes >= 0
        assert stage.seconds_over_whole is not None
        assert stage.seconds_over_whole > 0
        assert stage.max_difference is not None
        assert stage.max_difference < 1e-3
    decoding = found.stages[-1].handscroll
    assert decoding is not None
    assert found.decode_seconds_per_megapixel == pytest.approx(decoding.seconds / 0.008192)
    assert [(event.stage, event.done, event.total) for event in events[:3]] == [
        ("text", 0, 2),
        ("text", 1, 2),
        ("text", 2, 2),
    ]


def test_what_would_not_fit_is_left_out(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 3 * 2**20)
    found = benchmark.measure(str(miniature()), width=256, height=256, device="cpu")
    decoding = found.stages[-1]
    assert decoding.handscroll is not None
    assert decoding.whole is None
    assert decoding.max_difference is None
    assert decoding.note.startswith("whole needs about")
    assert "whole needs about" in benchmark_text(found)
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 1000)
    found = benchmark.measure(str(miniature()), width=64, height=64, device="cpu")
    assert all(stage.handscroll is None and "needs about" in stage.note for stage in found.stages)
    assert found.decode_seconds_per_megapixel is None
    assert "per megapixel" not in benchmark_text(found)


def test_the_command_prints_a_table_or_json(miniature: Miniature, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = ["bench", "--model", str(miniature()), "--size", "64", "--device", "cpu"]
    measure = functools.cache(functools.partial(benchmark.measure, on_event=ignore))
    monkeypatch.setattr(benchmark, "measure", lambda *of, on_event, **options: measure(*of, **options))
    assert cli.run(command) == 0
    table = capsys.readouterr().out
    for word in ("64x64", "convolution 100 GFLOP/s", "text", "denoise", "decode", "per megapixel"):
        assert word in table
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matrix_gflops"] == 100
    assert found["stages"][2]["whole"]["seconds"] > 0
    assert found["decode_bytes_per_pixel"] is not None


@pytest.mark.parametrize(
    "options", [["--size", "x"], ["--precision", "int8"], ["--device", "tpu"], ["--model", "no such"]]
)
def test_what_cannot_be_is_refused(options: list[str], capsys: Any) -> None:
    assert cli.run(["bench", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_rate_is_the_best_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.75, 99.0])  # a first run, then one of 0.5 s and one of 0.25 s
    monkeypatch.setattr(benchmark, "RATE_SECONDS", 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert benchmark.best_gflops(lambda: None, 10**9, "cpu") == 4.0
