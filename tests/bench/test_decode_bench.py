"""The decode benchmark measures what it says, on a miniature."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def decode_bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import decode

    return decode


def test_each_measurement_in_its_own_process() -> None:
    command = [sys.executable, BENCH / "decode.py", "256", "--miniature", "--strip-rows", "1", "--modes", "whole,rows"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    report = json.loads(finished.stdout.splitlines()[-1])
    assert "/" not in json.dumps(report["machine"])
    (at_size,) = report["sizes"]
    assert at_size["size_px"] == 256
    assert not at_size["failed"]
    assert list(at_size["modes"]) == ["whole", "rows"]
    for mode, found in at_size["modes"].items():
        assert found["seconds"] > 0
        assert found["gflops"] > 0
        assert mode in finished.stderr
        assert found["max_difference"] <= 2e-5


def test_only_tiles_are_another_picture(decode_bench: Any, tmp_path: Path) -> None:
    arguments = argparse.Namespace(miniature=True, strip_rows=4, reference=tmp_path / "whole.npy")
    for mode in decode_bench.MODES:
        found = decode_bench.measure(mode, 544, arguments)  # the smallest size that diffusers tiles
        assert found["seconds"] > 0
        assert (found["max_difference"] <= 1e-3) == (mode != "tiled")


def test_a_failed_mode_is_reported(decode_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_rows(mode: str, *_: object) -> dict[str, Any] | str:
        return "MemoryError" if mode == "rows" else {"seconds": 2.0, "peak_bytes": None, "max_difference": None}

    monkeypatch.setattr(decode_bench, "run_child", fail_rows)
    monkeypatch.setattr(sys, "argv", ["decode.py", "64", "--miniature", "--modes", "rows,whole", "--repeats", "2"])
    compared = decode_bench.compare(64, decode_bench.parse_arguments(), 100.0)
    assert compared["failed"] == {"rows": "MemoryError"}
    assert compared["modes"]["whole"]["seconds_each"] == [2.0, 2.0]
    assert compared["modes"]["whole"]["peak_bytes_over_whole"] is None


def test_medians_and_rates(decode_bench: Any) -> None:
    runs = [
        {"seconds": seconds, "peak_bytes": peak, "max_difference": difference}
        for seconds, peak, difference in ((1.0, 10, 0.1), (9.0, 30, 0.3), (2.0, 20, 0.2))
    ]
    found = decode_bench.summary(runs, flop=10**10, convolution_gflops=50.0)
    assert found["seconds"] == 2.0
    assert found["peak_bytes"] == 20
    assert found["max_difference"] == 0.3
    assert found["gflops"] == 5.0
    assert found["of_convolution_rate"] == 0.1


def test_the_work_of_the_official_decoder(decode_bench: Any) -> None:
    """Design and literature agree: 8.4 TFLOP at 1024 px, and it grows with the pixels."""
    assert decode_bench.decode_flop(1024, miniature=False) == pytest.approx(8.4e12, rel=0.02)
    assert decode_bench.decode_flop(2048, miniature=False) == pytest.approx(4 * 8.4e12, rel=0.02)


def test_the_peak_starts_again(decode_bench: Any) -> None:
    resident = decode_bench.reset_peak()
    if resident is None:
        pytest.skip("this system cannot reset the peak")
    size = 64 * 2**20
    torch.ones(size // 4)
    assert decode_bench.memory_status("VmHWM") - resident > 0.9 * size
    decode_bench.reset_peak()
    assert decode_bench.memory_status("VmHWM") - resident < 0.5 * size


@pytest.mark.parametrize("modes", ["rows,tiles", "", "whole,,rows"])
def test_unknown_modes_are_refused(decode_bench: Any, monkeypatch: pytest.MonkeyPatch, modes: str) -> None:
    monkeypatch.setattr(sys, "argv", ["decode.py", "--modes", modes])
    with pytest.raises(SystemExit):
        decode_bench.parse_arguments()


def test_a_file_name_of_a_machine(decode_bench: Any) -> None:
    description = {"processor": "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "cores": 2}
    assert decode_bench.machine.slug(description) == "intel-xeon-platinum-8488c-2-cores"
    assert decode_bench.machine.describe()["cores"] >= 1
