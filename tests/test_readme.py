"""The README's commands, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_are_two_commands_to_install_it_with() -> None:
    installs = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install")]
    assert len(installs) == 2
    assert installs[0].startswith("pip install . && handscroll generate ")
    assert installs[1] == "pip install -e '.[dev]' && pytest"
    assert "README.md" in (ROOT / ".ci" / "run").read_text(), "CI runs the second as it stands here"


def test_the_first_command_makes_a_picture(tmp_path: Path) -> None:
    command = next(line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install ."))
    arguments = shlex.split(command.partition("&& ")[2])
    assert arguments.pop(0) == "handscroll"
    done = subprocess.run(
        [sys.executable, "-m", "handscroll", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    picture = tmp_path / done.stdout.strip()
    image = pyvips.Image.new_from_file(str(picture))
    assert (image.width, image.height, image.bands) == (1024, 1024, 3)
    assert image.deviate() > 10
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.thorough
def test_the_commands_with_a_budget_run_within_it(tmp_path: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if " --memory " in line]
    assert [shlex.split(command)[:2] for command in commands] == [["handscroll", "plan"], ["handscroll", "generate"]]
    for command in commands:
        arguments = [*shlex.split(command)[1:], "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "handscroll", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        memory = json.loads(done.stdout)["memory"]
        assert memory["planned_peak_bytes"] <= memory["budget_bytes"]
    assert memory["measured_peak_bytes"] <= memory["budget_bytes"]


@pytest.mark.thorough
def test_a_sketch_shows_what_the_large_picture_is(tmp_path: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if " --seed 5 " in line]
    seen = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "handscroll", *shlex.split(command)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        picture = pyvips.Image.new_from_file(str(tmp_path / done.stdout.strip()))
        pixels = picture.thumbnail_image(64).numpy().astype(float)
        # What tells one place of a row from another: the red sun, not the gradient of any dusk.
        seen.append((pixels[..., 0] - pixels[..., 2]) - (pixels[..., 0] - pixels[..., 2]).mean(axis=1, keepdims=True))
    sketch, large = seen
    assert np.corrcoef(sketch.ravel(), large.ravel())[0, 1] > 0.75
    assert np.corrcoef(sketch[:, ::-1].ravel(), large.ravel())[0, 1] < 0.3


def test_the_python_example_runs(tmp_path: Path) -> None:
    (example,) = [block for block in blocks("python") if "Handscroll.from_pretrained" in block]
    # In a process of its own, since the budget is of the whole process.
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hills.png").stat().st_size > 10_000


def test_the_models_that_are_named_exist() -> None:
    from handscroll.models.registry import BY_HUB_ID, BY_NAME

    for name in re.findall(r"--model ([\w.-]+)", README):
        assert name in BY_NAME
    for hub_id in re.findall(r'from_pretrained\("(\S+/\S+)"\)', README):
        assert hub_id in BY_HUB_ID


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text()):
        assert (file.parent / link).exists(), f"{page} links to {link}"


def test_the_batch_makes_a_picture_of_every_line(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("sh") if "handscroll batch" in block]
    own = shlex.quote(sys.executable) + " -m handscroll batch"
    script = block.replace("handscroll batch", own).replace("--size 512", "--size 128 --steps 2")
    done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(list((tmp_path / "lakes").glob("*.png"))) == 2
