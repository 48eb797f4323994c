"""What a machine is measured to be, and what a stage is measured to take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handscroll.errors import UsageError
from handscroll.runtime.device import find_hardware
from handscroll.runtime.memory import Meter, release
from handscroll.runtime.rates import remembered
from handscroll.system import peak_resident_bytes


def test_a_measurement_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    answers = iter([True, False])
    assert remembered("thing", lambda: next(answers)) is True
    assert remembered("thing", lambda: next(answers)) is True
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text("not json")
    assert remembered("thing", lambda: next(answers)) is False


def test_without_a_cache_folder_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "file" / "cache"))
    assert remembered("thing", lambda: True) is True


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_hardware("cpu").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_hardware("auto").device == "cpu"
    with pytest.raises(UsageError, match="--device cpu"):
        find_hardware("cuda:1")


def test_a_stage_is_measured_by_itself() -> None:
    meter = Meter("cpu")
    with meter.stage("large"):
        block = torch.ones(64 * 2**20)
        large_bytes = block.nbytes
        del block
    release("cpu")
    with meter.stage("small"):
        pass
    assert meter.stage_peak_bytes["large"] >= large_bytes
    assert meter.stage_peak_bytes["small"] <= meter.stage_peak_bytes["large"] - large_bytes // 2
    assert meter.peak_bytes is not None
    assert meter.peak_bytes >= meter.stage_peak_bytes["large"]
    forked = meter.fork()
    with forked.stage("other"):
        pass
    assert "other" not in meter.seconds


def test_what_the_starting_process_held_is_not_counted() -> None:
    ours = torch.ones(600 * 2**20, dtype=torch.uint8)
    code = "from handscroll.system import peak_resident_bytes; print(peak_resident_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = peak_resident_bytes()
    assert peak is not None
    assert 10 * 2**20 < int(child.stdout) < ours.nbytes < peak
