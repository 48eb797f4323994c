"""Whatever is asked for and not used is told: in a line, in the JSON, and in the picture where it is about it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from handscroll import Handscroll, decode_latent, generate
from handscroll.cli import main as cli
from handscroll.errors import UsageError
from handscroll.events import Progress
from handscroll.jobs.result import Result
from handscroll.pictures.metadata import read_parameters
from handscroll.pipeline import plan_of
from handscroll.request import Request

Miniature = Callable[..., Path]
LONG = 18 * "snowy mountains at dusk with a frozen lake, "  # 792 of the miniatures' tokens, which are bytes
READ = 298  # of an instruction's prompt, by SanaPipeline.encode_prompt; 299 without


@pytest.fixture
def model(miniature: Miniature) -> str:
    return str(miniature("1.6b"))


def asked(model: str, prompt: str = "a lake", **options: Any) -> Request:
    return Request.of(prompt, model=model, **{"size": 64, "steps": 2, "seed": 1, **options})


def made(request: Request, path: Path, **options: Any) -> tuple[Result, list[str]]:
    """The picture, and the lines that its user was told."""
    lines: list[str] = []

    def listen(event: Progress) -> None:
        if event.stage == "notice":
            lines.append(event.detail)

    (result,) = generate(request, path, on_event=listen, **options)
    assert list(result.notices) == lines
    assert result.as_dict()["notices"] == lines
    json.dumps(result.as_dict())
    return result, lines


# Prompts that are cut


def test_a_prompt_that_is_cut_is_told_everywhere(model: str, tmp_path: Path) -> None:
    result, (line,) = made(asked(model, LONG + "a red sun"), tmp_path / "a.png", save_latent=tmp_path / "a.safetensors")
    assert f"of {len(LONG) + 9} tokens the first {READ} are read" in line
    assert LONG[READ - 8 : READ].strip() in line
    assert result.as_dict()["prompt_tokens"] == {"tokens": len(LONG) + 9, "read": READ}
    assert f"Prompt read: {READ} of {len(LONG) + 9} tokens" in read_parameters(tmp_path / "a.png")

    again = decode_latent(tmp_path / "a.safetensors", tmp_path / "b.png")
    assert read_parameters(again.path) == read_parameters(result.path)
    plan = plan_of(asked(model, LONG + "a red sun"))[1]
    assert plan.notices == (line,)


def test_what_is_not_read_changes_nothing_and_what_is_read_does(model: str, tmp_path: Path) -> None:
    endings = {"sun": "a red sun", "bamboo": "green bamboo in ink"}
    pictures = {name: made(asked(model, LONG + end), tmp_path / f"{name}.png")[0].path for name, end in endings.items()}
    shown = {name: read_parameters(path) for name, path in pictures.items()}
    assert all("Prompt read: " in text for text in shown.values())
    exactly = LONG[:READ]
    result, lines = made(asked(model, exactly), tmp_path / "c.png")
    assert lines == []
    assert result.prompt_tokens == {"tokens": READ, "read": READ}
    assert "Prompt read" not in read_parameters(result.path)
    _, lines = made(asked(model, exactly + "x"), tmp_path / "d.png")
    assert len(lines) == 1


def test_a_negative_prompt_that_is_cut_is_told(model: str, tmp_path: Path) -> None:
    result, (line,) = made(asked(model, negative=LONG, guidance=3), tmp_path / "a.png")
    assert line.startswith("the negative prompt is longer")
    assert result.negative_tokens == {"tokens": len(LONG.strip()), "read": 299}
    assert "Negative prompt read: 299 of" in read_parameters(result.path)


def test_a_checkpoint_that_reads_less_says_so(miniature: Miniature, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("1.6b"), tmp_path / "short"))
    (folder / "handscroll.json").write_text('{"max_prompt_tokens": 10, "complex_human_instruction": null}')
    _, (line,) = made(asked(str(folder), "mountains at dusk"), tmp_path / "a.png")
    assert 'of 17 tokens the first 9 are read, up to "ountains"' in line


# Options that have no part


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"negative": "fog", "guidance": 1}, "negative prompt is not used: at guidance 1"),
        ({"negative": "fog", "guidance": 0}, "negative prompt is not used: at guidance 0"),
        ({"guidance": 0.5}, "guidance 0.5 acts as 1: only above 1 is there a second forward"),
        ({"patches": 8}, "patches 8 is not used"),
        ({"patches": 32}, "patches 32 is not used"),
        ({"patches": 8, "decode": "whole"}, "not --decode whole"),
        ({"strip_rows": 4, "decode": "whole"}, "strip rows 4 is not used"),
        ({"strip_rows": 4, "decode": "patch"}, "not --decode patch"),
        ({"compose": 512}, "compose 512 is not used: 64x64"),
    ],
    ids=str,
)
def test_an_option_without_a_part_is_told_once(model: str, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    result, (line,) = made(asked(model, **options), tmp_path / "a.png")
    assert says in line
    left = {k: v for k, v in options.items() if k in ("guidance", "decode")}
    left |= {"guidance": 1} if options.get("guidance") == 0.5 else {}
    plain, nothing = made(asked(model, **left), tmp_path / "b.png")
    assert nothing == []
    assert read_parameters(result.path) == read_parameters(plain.path)
    assert result.path.read_bytes() == plain.path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negative": "fog", "guidance": 3},
        {"patches": 8, "decode": "patch"},
        {"strip_rows": 4},
        {"compose": "off"},
        {"compose": 64, "size": 128},
        {"negative": " ", "guidance": 1},
        {"guidance": 0},
    ],
    ids=str,
)
def test_what_is_used_is_no_notice(model: str, options: dict[str, Any]) -> None:
    assert plan_of(asked(model, **options))[1].notices == ()


def test_a_few_step_model_refuses_a_negative_prompt_and_uses_its_guidance(miniature: Miniature, tmp_path: Path) -> None:
    model = str(miniature("sprint-1.6b"))
    with pytest.raises(UsageError, match="takes no negative prompt"):
        plan_of(asked(model, negative="fog"))
    result, lines = made(asked(model, guidance=2), tmp_path / "a.png")
    assert lines == []
    assert "CFG scale: 2" in read_parameters(result.path)


def test_a_model_that_takes_no_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    import miniatures

    miniatures.make_checkpoint(folder, row="sprint-1.6b", transformer={"guidance_embeds": False})
    result, (line,) = made(asked(str(folder), guidance=2), tmp_path / "a.png")
    assert "guidance 2 is not used" in line
    assert "CFG scale" not in read_parameters(result.path)
    assert "guidance" not in result.as_dict()
    assert cli.run(["plan", "--model", str(folder), "--size", "64"]) == 0
    assert "no guidance" in capsys.readouterr().out
    assert cli.run(["plan", "--model", str(folder), "--size", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guidance"] is None
    assert cli.run(["info", str(folder)]) == 0
    assert re.search(r"guidance +none", capsys.readouterr().out)


@pytest.mark.parametrize(("suffix", "cut"), [("jpg", True), ("webp", True), ("png", False), ("tif", False)])
def test_a_prompt_that_a_file_cannot_hold_is_told_and_its_settings_are_kept(
    model: str, tmp_path: Path, suffix: str, cut: bool
) -> None:
    request = asked(model, "🏔" * 19_000)  # two units of UTF-16 each
    result, lines = made(request, tmp_path / f"a.{suffix}", save_latent=tmp_path / "a.safetensors")
    told = [line for line in lines if "longer than a" in line and "file holds" in line]
    assert len(told) == cut
    text = read_parameters(result.path)
    assert text.startswith("🏔" * 15_000)
    assert re.search(r"\nSteps: 2, .*Seed: 1, .*Exact: true$", text)
    assert ("[...]" in text) == cut
    again = decode_latent(tmp_path / "a.safetensors", tmp_path / f"b.{suffix}")
    assert [line for line in again.notices if "file holds" in line] == told
    seen: list[Progress] = []
    picture = Handscroll.from_pretrained(model)(request.prompt, size=64, steps=2, seed=1, on_event=seen.append)
    picture.save(tmp_path / f"c.{suffix}")
    assert [event.detail for event in seen if "file holds" in event.detail] == told


@pytest.mark.parametrize(
    ("suffix", "used"), [("png", False), ("tif", False), ("jpg", True), ("webp", True), ("dzi", True)]
)
def test_a_quality_that_a_format_does_not_take(model: str, tmp_path: Path, suffix: str, used: bool) -> None:
    path = tmp_path / f"a.{suffix}"
    result, lines = made(asked(model), path, quality=70, save_latent=tmp_path / "a.safetensors")
    assert [line.startswith("quality 70 is not used") for line in lines] == ([] if used else [True])
    again = decode_latent(tmp_path / "a.safetensors", tmp_path / f"b.{suffix}", quality=70)
    assert again.notices == result.notices


@pytest.mark.parametrize("options", [{"patches": 8}, {"strip_rows": 4, "decode": "whole"}])
def test_decoding_tells_too(model: str, tmp_path: Path, options: dict[str, Any]) -> None:
    made(asked(model), tmp_path / "a.png", save_latent=tmp_path / "a.safetensors")
    assert len(decode_latent(tmp_path / "a.safetensors", tmp_path / "b.png", **options).notices) == 1


def test_half_precision_that_is_the_transformers_alone(model: str) -> None:
    (line,) = plan_of(asked(model, precision="fp16"))[1].notices
    assert "text encoder and autoencoder run in bf16" in line


# The class, and the command line


@contextmanager
def warned(says: str) -> Iterator[None]:
    """Not `pytest.warns`, which takes the libraries' own warnings, that are ignored, for errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    assert any(says in str(each.message) for each in caught)


def test_the_class_warns_who_does_not_listen(model: str, tmp_path: Path) -> None:
    scroll = Handscroll.from_pretrained(model)
    with warned("longer than the model reads"):
        picture = scroll(LONG, size=64, steps=1, seed=1)
    assert len(picture.notices) == 1
    with warned("quality 70 is not used"):
        picture.save(tmp_path / "a.png", quality=70)
    heard: list[Progress] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scroll(LONG, size=64, steps=1, seed=1, on_event=heard.append)
        scroll("a lake", size=64, steps=1, seed=1)
    assert [event.detail for event in heard if event.stage == "notice"] == list(picture.notices)


def test_the_command_line_tells_on_stderr_and_in_json(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", model, "--size", "64", "--steps", "1", "--seed", "1", "--patches", "8", "--quality", "3"]
    assert cli.run(["generate", LONG, *options, "-o", "a.png"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert ["longer than the model" in notes[0], "patches 8" in notes[1], "quality 3" in notes[2]] == [True] * 3
    assert cli.run(["generate", LONG, *options, "-o", "a.png", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [f"note: {line}" for line in json.loads(out)["notices"]] == notes
    assert cli.run(["plan", LONG, *options[:6], "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt_tokens"] == {"tokens": len(LONG.strip()), "read": READ}
    assert "longer than the model" in err


def test_a_plan_refuses_a_file_that_generate_refuses(model: str) -> None:
    with pytest.raises(UsageError, match=r"\.gif"):
        plan_of(asked(model), "a.gif")
    with pytest.raises(UsageError, match="16383"):
        plan_of(asked(model, size=20_000), "a.webp")
