"""Two pictures against each other."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from handscroll import pipeline
from handscroll.cli.main import run as handscroll
from handscroll.errors import FormatError, SizeError
from handscroll.events import Progress
from handscroll.pictures.comparing import compare_pictures
from handscroll.pictures.metadata import read_parameters


def picture(path: Path, samples: Any) -> Path:
    pyvips.Image.new_from_array(np.asarray(samples, dtype=np.uint8)).write_to_file(str(path))
    return path


@pytest.fixture
def noise() -> Any:
    return np.random.default_rng(1).integers(20, 230, (48, 64, 3))


def test_a_picture_is_equal_to_itself_in_any_lossless_format(tmp_path: Path, noise: Any) -> None:
    found = compare_pictures(picture(tmp_path / "a.png", noise), picture(tmp_path / "b.tif", noise))
    assert (found.psnr, found.ssim, found.largest, found.differing) == (math.inf, 1.0, 0, 0.0)
    assert found.as_dict()["psnr"] is None


def test_figures_are_those_of_their_definitions(tmp_path: Path, noise: Any) -> None:
    other = noise.copy()
    other[::2, :, 1] += 9
    other[3, 5, 0] -= 20
    found = compare_pictures(picture(tmp_path / "a.png", noise), picture(tmp_path / "b.png", other))
    difference = np.abs(noise - other)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / np.square(difference).mean()))
    assert found.largest == 20
    assert found.differing == pytest.approx((difference > 0).mean())
    assert 0.9 < found.ssim < 1


def test_ssim_falls_with_structure_and_not_with_light(tmp_path: Path, noise: Any) -> None:
    first = picture(tmp_path / "a.png", noise)
    lighter = compare_pictures(first, picture(tmp_path / "b.png", noise + 20))
    shuffled = compare_pictures(first, picture(tmp_path / "c.png", noise[::-1]))
    assert lighter.ssim > 0.95
    assert abs(shuffled.ssim) < 0.15


def test_grey_and_transparent_pictures_are_compared_as_they_look(tmp_path: Path) -> None:
    grey = np.full((8, 8), 90)
    coloured = np.full((8, 8, 3), 90)
    transparent = np.dstack([coloured, np.full((8, 8), 255)])
    first = picture(tmp_path / "a.png", coloured)
    for name, samples in (("b.png", grey), ("c.png", transparent)):
        assert compare_pictures(first, picture(tmp_path / name, samples)).largest == 0


def test_what_cannot_be_compared(tmp_path: Path, noise: Any) -> None:
    first = picture(tmp_path / "a.png", noise)
    with pytest.raises(SizeError, match=r"64x48 and .* 63x48"):
        compare_pictures(first, picture(tmp_path / "b.png", noise[:, :63]))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FormatError, match=r"text\.png: no picture that can be compared"):
        compare_pictures(first, tmp_path / "text.png")
    with pytest.raises(FormatError, match=r"gone\.png: no picture that can be compared: is not there"):
        compare_pictures(first, tmp_path / "gone.png")


def test_the_command_and_its_page(tmp_path: Path, noise: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(picture(tmp_path / "a <b>.png", noise))
    second, page = str(picture(tmp_path / "b.png", noise + 1)), tmp_path / "page.html"
    assert handscroll(["compare", first, second, "-o", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest"] == 1
    assert found["page"] == str(page)
    text = page.read_text()
    assert "a &lt;b&gt;.png" in text
    assert "<b>" not in text
    pictures = [base64.b64decode(each) for each in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    shown = [pyvips.Image.new_from_buffer(each, "").numpy() for each in pictures]
    assert np.array_equal(shown[0], noise)
    assert np.array_equal(shown[1], noise + 1)
    assert shown[2].min() == 255  # the difference, made as bright as it can be
    assert "http" not in text.replace("<!doctype html>", "")
    assert handscroll(["compare", first, second]) == 0
    assert "PSNR 48.13 dB" in capsys.readouterr().out
    assert handscroll(["compare", first, first]) == 0
    assert "equal in every sample" in capsys.readouterr().out


def test_one_prompt_under_two_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["compare", "a quiet lake", "--size", "64", "--steps", "2", "--seed", "7", "--device", "cpu"]
    settings = ["--with", "precision=fp32", "--with", "precision=int8, text-precision=int4"]
    assert handscroll([*asked, *settings, "-o", "page.html", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["a-quiet-lake-7-precision-fp32.png", "a-quiet-lake-7-precision-int8-text-precision-int4.png"]
    assert found["pictures"] == names
    assert 20 < found["psnr"] < 100
    assert "Precision: fp32" in read_parameters(tmp_path / names[0])
    assert "int8+fp32" in read_parameters(tmp_path / names[1])
    assert names[1] in (tmp_path / "page.html").read_text()
    before = (tmp_path / names[0]).read_bytes()
    assert handscroll([*asked, *settings, "--quiet"]) == 0  # a second run takes other names
    assert (tmp_path / names[0]).read_bytes() == before
    assert (tmp_path / "a-quiet-lake-7-precision-fp32-2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a"], "two pictures, or a prompt and --with twice"),
        (["a.png", "b.png", "--steps", "3"], "--steps is for what is painted"),
        (["a", "b.png", "--with", "steps=1", "--with", "steps=2"], "no second picture"),
        (["a", "--with", "steps=1"], "given 1 times"),
        (["a", "--with", "steps=1", "--with", "steps=1"], "ask for the same"),
        (["a", "--with", "steps", "--with", "steps=1"], "is not understood"),
        (["a", "--with", "steps=1,steps=2", "--with", "steps=1"], "says steps twice"),
        (["a", "--with", "speed=1", "--with", "steps=1"], "'speed' is no option of compare"),
        (["a", "--with", "size=64", "--with", "size=96"], "of one size"),
        (["a", "--with", "count=2", "--with", "steps=1"], "'count' is no option of compare"),
        (["a", "--with", "prompt=b", "--with", "steps=1"], "'prompt' is no option of compare"),
        (["a", "--with", "cls=b", "--with", "steps=1"], "'cls' is no option of compare"),
        (["a", "--with", "seed=1", "--with", "seed=2"], "one seed"),
        (["a", "--with", "steps=1", "--with", "memory=1MiB"], "needs at least"),
        (["a", "--with", "precision=int3", "--with", "steps=1"], "'int3' is not known"),
    ],
)
def test_settings_that_cannot_be_compared(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert handscroll(["compare", *arguments, "--quiet"]) in (2, 3)
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_was_interrupted_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["compare", "a lake", "--size", "64", "--steps", "3", "--seed", "7", "--device", "cpu", "--quiet"]
    asked += ["--with", "precision=fp32", "--with", "precision=int8"]
    second = tmp_path / "a-lake-7-precision-int8.png"
    generate = pipeline.generate
    painted: list[str] = []

    def interrupted(request: Any, path: Path, **options: Any) -> Any:
        def listen(event: Progress) -> None:
            if path.name == second.name and event.stage == "denoise" and event.done > 1 and len(painted) < 3:
                raise KeyboardInterrupt

        painted.append(path.name)
        return generate(request, path, on_event=listen)

    monkeypatch.setattr(pipeline, "generate", interrupted)
    assert handscroll(asked) == 130
    assert not second.exists()
    assert painted == ["a-lake-7-precision-fp32.png", second.name]
    painted.append("again")
    assert handscroll(asked) == 0
    assert painted[3:] == [second.name]
    assert second.exists()
    assert not list(tmp_path.glob("*.run"))


def test_a_page_never_takes_the_place_of_a_picture(
    tmp_path: Path, noise: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = picture(tmp_path / "a.png", noise)
    before = first.read_bytes()
    assert handscroll(["compare", str(first), str(first), "-o", str(first)]) == 2
    assert first.read_bytes() == before
    assert "ends in .html" in capsys.readouterr().err


def test_large_pictures_are_shown_smaller(tmp_path: Path) -> None:
    samples = np.zeros((16, 3000, 3))
    first, page = picture(tmp_path / "a.png", samples), tmp_path / "page.html"
    assert handscroll(["compare", str(first), str(first), "-o", str(page)]) == 0
    assert "shown at 2048x11 of 3000x16" in page.read_text()
