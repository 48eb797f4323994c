"""bench/gpu.sh goes its whole way on a CPU, and goes on when a step fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def run(*arguments: str, python: str = sys.executable, results: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), "--miniature", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.thorough
def test_the_steps_of_a_miniature(tmp_path: Path) -> None:
    done = run("--steps", "denoise,decode", results=tmp_path)
    assert done.returncode == 0, done.stderr
    _, _, summary = done.stderr.partition("== summary")
    assert re.findall(r"^(\S+) +\d+ s  (.+)$", summary, re.MULTILINE) == [("denoise", "done"), ("decode", "done")]
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert [report["stage"] for report in reports] == ["decode", "denoise"]
    for report in reports:
        (at_size,) = report["sizes"]
        assert not at_size["failed"]
        assert at_size["modes"]["rows"]["max_difference"] < 1e-3


def test_it_goes_on_when_steps_fail_and_says_so(tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text('#!/bin/sh\necho "$@" >> "$RESULTS/asked"\ncase "$*" in *"-m pytest"*) exit 0;; esac\nexit 7\n')
    failing.chmod(0o755)
    done = run("--memory", "folder", python=str(failing), results=tmp_path)
    assert done.returncode == 1
    steps = ["tests", "denoise", "decode", "curve", "large-denoise", "large-decode", "generate", "memory"]
    _, _, summary = done.stderr.partition("== summary")
    found = re.findall(r"^(\S+) +\d+ s  (.+)$", summary, re.MULTILINE)
    assert found == [(step, "done" if step == "tests" else "FAILED with exit code 7") for step in steps]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0].startswith("-m pytest -q -m gpu")
    assert "--model folder" in asked[6]


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    done = run("--fast", results=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
