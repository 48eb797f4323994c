"""`--memory` on the command line: what is refused, what is kept, and that the picture is the same at every budget.

On a CPU the budget is of the whole process, and this one holds the other tests too: every budget is computed from what
a refusal states, none is a constant.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from handscroll import Handscroll, Request, generate
from handscroll.banded.backend import has_onednn
from handscroll.cli import main as cli
from handscroll.events import Progress
from handscroll.plan.inputs import MIB

Miniature = Callable[..., Path]
TOO_SMALL = "1MiB"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    import diffusers

    assert diffusers.AutoencoderDC
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Ran:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Shell = Callable[..., Ran]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`shell("generate", "a lake", ...)` in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        exit_code = cli.run([str(argument) for argument in arguments])
        return Ran(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny(miniature: Miniature) -> tuple[object, ...]:
    """Options for the quickest real picture."""
    return ("--model", miniature(), "--size", "96x64", "--steps", 1, "--seed", 5)


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def minimum_of(shell: Shell, *arguments: object) -> int:
    """The budget that a refusal of the least budget states, which writes nothing and says so in one line."""
    before = files()
    ran = shell(*arguments, "--memory", TOO_SMALL, "--json")
    assert ran.exit_code == 3, ran
    assert re.fullmatch(r"error: [^\n]+ needs at least --memory \d+MiB, for [^\n]+; 1 MiB were allowed\n", ran.stderr)
    error = ran.json["error"]
    assert error.keys() == {"code", "message", "minimum_bytes"}
    assert error["code"] == "budget_too_small"
    assert f"--memory {error['minimum_bytes'] // MIB}MiB" in error["message"]
    assert files() == before
    return int(error["minimum_bytes"])


@pytest.mark.parametrize("amount", ["lots", "", "-1GiB", "0", "4 G", "nan", "1e9"])
@pytest.mark.parametrize("command", [("generate", "a lake", "-o", "a.png"), ("plan",)])
def test_what_is_no_amount_is_bad_usage(shell: Shell, command: tuple[str, ...], amount: str) -> None:
    ran = shell(*command, "--memory", amount)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: memory [^\n]+\n", ran.stderr), ran.stderr
    assert files() == []


@pytest.mark.parametrize("decode", ["tiled", "whole", "patch"])
def test_only_rows_keep_a_budget(shell: Shell, tiny: tuple[object, ...], decode: str) -> None:
    ran = shell("generate", "a lake", *tiny, "-o", "a.png", "--memory", "8GiB", "--decode", decode)
    assert ran.exit_code == 2
    assert "--decode rows" in ran.stderr
    assert f"--decode {decode}" in ran.stderr
    assert files() == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_budget_gives_the_same_picture(shell: Shell, tiny: tuple[object, ...], precision: str) -> None:
    if precision == "bf16" and not has_onednn(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("without oneDNN's bf16 nothing is promised to the bit")
    options = ("generate", "a lake", *tiny, "--precision", precision)
    assert shell(*options, "-o", "free.png", "--json").json["memory"]["budget_bytes"] is None
    minimum = minimum_of(shell, *options, "-o", "least.png")
    for name, budget_bytes in (("least", minimum), ("double", 2 * minimum)):
        ran = shell(*options, "-o", f"{name}.png", "--memory", f"{budget_bytes}B", "--json")
        assert ran.exit_code == 0, ran
        memory = ran.json["memory"]
        assert memory["budget_bytes"] == budget_bytes
        assert 0 < memory["planned_peak_bytes"] <= budget_bytes
        assert memory["measured_peak_bytes"] > 0
        for stage in ("text", "denoise", "decode"):
            assert 0 < memory["stages"][stage]["planned_bytes"] <= memory["planned_peak_bytes"]
            assert memory["stages"][stage]["measured_bytes"] > 0
        assert Path(f"{name}.png").read_bytes() == Path("free.png").read_bytes()
    assert files() == ["double.png", "free.png", "least.png"]


def test_the_last_line_shows_what_was_planned_and_allowed(shell: Shell, tiny: tuple[object, ...]) -> None:
    budget = f"{minimum_of(shell, 'generate', 'a lake', *tiny, '-o', 'a.png') // MIB + 512}MiB"
    ran = shell("generate", "a lake", *tiny, "-o", "a.png", "--memory", budget)
    assert (ran.exit_code, ran.stdout) == (0, "a.png\n")
    size = r"[\d.]+ [MG]iB"
    assert re.fullmatch(rf"96x64, [\d.]+ s, peak {size} \(planned {size}, budget {size}\), seed 5\n", ran.stderr)


def test_a_plan_is_a_table(shell: Shell, tiny: tuple[object, ...]) -> None:
    ran = shell("plan", "a lake", *tiny[:-2])
    assert (ran.exit_code, ran.stderr) == (0, "")
    heading, empty, titles, *stages, second_empty, last = ran.stdout.splitlines()
    assert re.fullmatch(r"1\.6b, 96x64, 1 steps, guidance 4\.5, \w+ on cpu, no budget", heading)
    assert empty == second_empty == ""
    assert titles.split() == ["STAGE", "PEAK", "ABOUT", "HOW"]
    assert [line.split()[0] for line in stages] == ["text", "denoise", "decode"]
    assert re.fullmatch(
        r"peak .*, about .* a picture; the least that would do is --memory \d+MiB(, of which .* Triton's, .*)?", last
    )
    assert ("Triton" in last) == ("triton" in sys.modules)
    assert files() == []


def test_a_plan_for_programs(shell: Shell, tiny: tuple[object, ...]) -> None:
    ran = shell("plan", "a lake", *tiny[:-2], "--json")
    assert (ran.exit_code, ran.stderr) == (0, "")
    found = ran.json
    assert (found["width"], found["height"], found["steps"], found["exact"]) == (96, 64, 1, True)
    assert found["memory"].keys() == {"budget_bytes", "minimum_bytes", "planned_peak_bytes"}
    assert found["stages"].keys() == {"text", "denoise", "decode"}
    for stage in found["stages"].values():
        assert stage["peak_bytes"] <= found["memory"]["planned_peak_bytes"]
        assert stage["seconds"] >= 0
    minimum = minimum_of(shell, "plan", "a lake", *tiny[:-2])
    assert abs(minimum - found["memory"]["minimum_bytes"]) <= 64 * MIB, "this process may have grown in between"
    budgeted = shell("plan", "a lake", *tiny[:-2], "--memory", f"{minimum}B", "--json").json
    assert budgeted["memory"]["planned_peak_bytes"] <= budgeted["memory"]["budget_bytes"] == minimum


def test_a_large_plan_is_made_without_a_weight(shell: Shell) -> None:
    minimum = minimum_of(shell, "plan", "--size", 16384)
    found = shell("plan", "--size", 16384, "--memory", f"{minimum}B", "--json").json
    assert found["memory"]["planned_peak_bytes"] <= minimum < 6 * 2**30
    free = shell("plan", "--size", 16384, "--memory", "200GiB", "--json").json
    assert free["seconds"] <= found["seconds"]


def test_a_kept_latent_is_decoded_within_a_budget(shell: Shell, tiny: tuple[object, ...]) -> None:
    assert shell("generate", "a lake", *tiny, "-o", "a.png", "--save-latent", "a.safetensors").exit_code == 0
    minimum = minimum_of(shell, "decode", "a.safetensors", "-o", "b.png")
    ran = shell("decode", "a.safetensors", "-o", "b.png", "--memory", f"{minimum}B", "--json")
    assert ran.exit_code == 0, ran
    assert ran.json["memory"]["budget_bytes"] == minimum
    assert ran.json["memory"]["stages"].keys() == {"decode"}
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()


def test_a_run_goes_on_within_another_budget(shell: Shell, tiny: tuple[object, ...], miniature: Miniature) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "decode" and event.done:
            raise KeyboardInterrupt

    request = Request("a lake", model=str(miniature()), width=96, height=64, steps=1, seed=5)
    with pytest.raises(KeyboardInterrupt):
        generate(request, Path("a.png").absolute(), on_event=stop)
    assert files() == ["a.png.run"]
    minimum = minimum_of(shell, "resume", "a.png.run")
    ran = shell("resume", "a.png.run", "--memory", f"{minimum}B", "--json")
    assert ran.exit_code == 0, ran
    assert (ran.json["memory"]["budget_bytes"], ran.json["resumed_from_step"]) == (minimum, 1)
    assert shell("generate", "a lake", *tiny, "-o", "b.png").exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert files() == ["a.png", "b.png"]


def test_the_class_keeps_a_budget_too(shell: Shell, tiny: tuple[object, ...], miniature: Miniature) -> None:
    assert shell("generate", "a lake", *tiny, "-o", "a.png").exit_code == 0
    minimum = minimum_of(shell, "generate", "a lake", *tiny, "-o", "b.png")
    scroll = Handscroll.from_pretrained(miniature(), memory=f"{minimum // MIB + 64}MiB")
    picture = scroll("a lake", width=96, height=64, steps=1, seed=5)
    assert not scroll.session.opened, "a budget keeps no module for the next picture"
    picture.save("b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
