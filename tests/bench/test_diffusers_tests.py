"""bench/diffusers_tests.py: what it makes of two runs of diffusers' tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a.Dc" name="test_one" />
<testcase classname="tests.a.Dc" name="test_two"><failure message="no">lines</failure></testcase>
<testcase classname="tests.a.Dc" name="test_three"><skipped message="gpu" /></testcase>
<testcase classname="tests.a.Dc" name="test_four"><error message="no">lines</error></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import diffusers_tests

    return diffusers_tests


def test_outcomes_are_read_from_pytests_report(bench: Any) -> None:
    found = bench.outcomes(REPORT)
    assert list(found.values()) == ["passed", "failed", "skipped", "error"]
    assert bench.counts_text(found) == "1 passed, 1 failed, 1 error, 1 skipped"
    assert bench.lost_tests(found, {}) == ["tests.a.Dc.test_one"]
    assert not bench.lost_tests(found, found)


@pytest.mark.parametrize(("outcome", "code"), [("passed", 0), ("failed", 1), ("skipped", 1)])
def test_a_test_that_fails_only_when_attached_is_told(
    bench: Any, outcome: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "tests/pipelines/sana").mkdir(parents=True)

    def run(checkout: Path, options: Sequence[str], attach: bool) -> dict[str, str]:
        assert list(options) == ["tests/pipelines/sana"]
        return {"test_one": outcome if attach else "passed"}

    monkeypatch.setattr(bench, "run", run)
    assert bench.main([str(tmp_path)]) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["lost"] == (["test_one"] if code else [])
    assert f"attached:    1 {outcome}" in said.err


def test_a_folder_that_is_no_checkout_is_named(bench: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench.main([str(tmp_path)])
    assert "no checkout of diffusers" in capsys.readouterr().err


def test_every_autoencoder_that_is_made_is_attached(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderDC

    import miniatures

    monkeypatch.setattr(AutoencoderDC, "__init__", AutoencoderDC.__init__)
    bench.attach_all()
    vae = AutoencoderDC(**miniatures.AUTOENCODER)
    assert "_decode" in vars(vae)
    assert vae.config["latent_channels"] == 32
    assert AutoencoderDC.from_config(vae.config).decode(torch.randn(1, 32, 1, 2)).sample.shape == (1, 3, 32, 64)
