"""Prompts on the command line: those that begin with a dash, those of a file, and the names that are made of them."""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from handscroll import pipeline
from handscroll.cli import main as cli
from handscroll.jobs.result import Result
from handscroll.pictures.naming import NAME_BYTES, NAME_CHARACTERS, clusters, words_of
from handscroll.request import Request

Asked = list[tuple[Request, Path]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Requests that reached the pipeline, and the paths that they were for."""
    monkeypatch.chdir(tmp_path)
    calls: Asked = []

    def generate(request: Request, path: Path, **options: Any) -> list[Result]:
        calls.append((request, path))
        return []

    monkeypatch.setattr(pipeline, "generate", generate)
    monkeypatch.setattr("handscroll.cli.generate.print_results", lambda *arguments: None)
    return calls


# Dashes


@pytest.mark.parametrize(
    "arguments",
    [
        ["- a list"],
        ["- a list", "-o", "a.png"],
        ["-o", "a.png", "- a list"],
        ["--seed", "7", "- a list", "--json"],
        ["--seed=7", "- a list", "-q"],
        ["-o", "a.png", "--", "- a list"],
    ],
    ids=" ".join,
)
def test_a_prompt_may_begin_with_a_dash_and_a_blank(asked: Asked, arguments: list[str]) -> None:
    assert cli.run(["generate", *arguments]) == 0
    assert asked[0][0].prompt == "- a list"
    assert asked[0][0].seed == 7 or "7" not in " ".join(arguments)


@pytest.mark.parametrize(
    "prompt", ["-- two dashes", "-5 degrees, a frozen lake", "--\ta list", "- a = b", "-\n- x", "-5", "---", "-3.5x"]
)
def test_what_has_a_blank_or_is_a_number_is_no_option(asked: Asked, prompt: str) -> None:
    assert cli.run(["generate", prompt, "-o", "a.png"]) == 0
    assert asked[0][0].prompt == prompt


@pytest.mark.parametrize("prompt", ["-sunset", "--model", "-old castle", "-quiet lake", "--size=64", "-"])
def test_after_two_dashes_all_is_prompt(asked: Asked, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffa lake\r\n".encode())))
    assert cli.run(["generate", "-o", "a.png", "--", prompt]) == 0
    assert asked[0][0].prompt.strip() == (prompt if prompt != "-" else "a lake")


def test_an_options_value_is_no_prompt(asked: Asked) -> None:
    assert cli.run(["generate", "a lake", "--negative", "- fog", "-o", "my picture.png"]) == 0
    assert (asked[0][0].prompt, asked[0][0].negative, str(asked[0][1])) == ("a lake", "- fog", "my picture.png")
    assert cli.run(["generate", "- a lake", "--negative", "--", "-o", "my picture.png"]) == 0
    made = asked.pop()[0]
    assert (made.prompt, made.negative) == ("- a lake", "--")
    assert cli.run(["generate", "a lake", "-omy picture.png"]) == 0
    assert str(asked[1][1]) == "my picture.png"


@pytest.mark.parametrize("prompt", ["-sunset", "-old castle", "-quiet lake"])
def test_what_may_be_an_option_is_told_the_way_out(
    asked: Asked, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", prompt]) == 2
    line = capsys.readouterr().err
    assert line.endswith("; a prompt that begins with - goes last, after --\n")
    assert line.count("\n") == 1


def test_a_wrong_option_is_still_one(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "a lake", "--zoom"]) == 2
    assert "--zoom" in capsys.readouterr().err


def test_a_plan_takes_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def plans_of(request: Request, *arguments: Any) -> None:
        seen.append(request.prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "plans_of", plans_of)
    assert cli.run(["plan", "- a list", "--size", "64"]) == 130
    assert seen == ["- a list"]


def test_a_mark_at_the_beginning_of_a_file_is_no_prompt(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa quiet lake\r\n")))
    assert cli.run(["generate", "-", "--seed", "1"]) == 0
    assert asked[0][0].prompt.strip() == "a quiet lake"
    assert str(asked[0][1]) == "a-quiet-lake-1.png"


# Names


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("बर्फीले पहाड़ और लाल सूरज", "बर्फीले-पहाड़-और-लाल-सूरज"),
        ("ภูเขาหิมะ น้ำ", "ภูเขาหิมะ-น้ำ"),
        ("جَبَلٌ ثَلْجِيّ", "جَبَلٌ-ثَلْجِيّ"),
        ("பனி மலைகள்", "பனி-மலைகள்"),
        ("cafe\u0301 sur l'e\u0301te\u0301", "cafe\u0301-sur-l-e\u0301te\u0301"),
        ("می\u200cخواهم کوه", "می\u200cخواهم-کوه"),
        ("ක්\u200dෂණික", "ක්\u200dෂණික"),
        ("1\ufe0f\u20e3 lake", "1\ufe0f\u20e3-lake"),
        ("a red sun 👩\u200d🎨 and 🏔\ufe0f", "a-red-sun-and"),
        ("🇫🇷🇯🇵", ""),
        ("snow\u00admountains at\u2060dusk", "snowmountains-atdusk"),
        ("\ufeffa lake \u200f\u202bבערב\u202c", "a-lake-בערב"),
        ("ﾌｼﾞｻﾝ と ﾊﾟｰｸ", "ﾌｼﾞｻﾝ-と-ﾊﾟｰｸ"),
        ("\u0301 lake", "lake"),
        ("雪山 と 湖", "雪山-と-湖"),
        ("한글 산", "한글-산"),
    ],
)
def test_a_name_keeps_words_whole_in_every_writing(prompt: str, name: str) -> None:
    assert words_of(prompt) == name


SCRIPTS = "aé e\u0301 कक्ष बर्फ़ ภูเขา น้ำ جَبَل தமிழ் 한글 \u1100\u1161\u11a8 👩\u200d🎨 🏔\ufe0f 🇫🇷 ക്ഷ \u200c\u200d 雪-_!."


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(SCRIPTS), max_size=200) | st.text(max_size=80))
def test_a_name_is_never_cut_within_a_character_nor_too_long(prompt: str) -> None:
    name = words_of(prompt)
    assert len(name) <= NAME_CHARACTERS
    assert len(name.encode("utf-8", "surrogatepass")) <= NAME_BYTES
    assert not name.startswith("-")
    assert not name.endswith("-")
    assert not any(unicodedata.category(part[0]).startswith("M") for part in name.split("-") if part)
    # Whole characters, as Unicode's own rules see them in the prompt.
    whole = regex.findall(r"\X", prompt.lower())
    starts = {sum(map(len, whole[:index])) for index in range(len(whole) + 1)}
    position = 0
    for cluster in clusters(prompt.lower()):
        position = prompt.lower().index(cluster, position)
        position += len(cluster)
        if position not in starts:  # annex 29 joins more than names need only around control characters
            assert unicodedata.category(prompt.lower()[position]) not in ("Mn", "Mc", "Me")


@pytest.mark.parametrize("prompt", ["क्षि" * 200, "e\u0301" * 200, "👩\u200d🎨" * 50, "a" + "\u0301" * 300, "雪" * 300])
def test_a_file_of_any_prompt_can_be_written(asked: Asked, prompt: str) -> None:
    assert cli.run(["generate", prompt, "--seed", str(2**64 - 1), "--count", "1"]) == 0
    path = asked[0][1]
    path.touch()
    assert path.exists()
    assert len(path.name.encode()) < 143
    assert regex.findall(r"\X", prompt)[0] in path.name or path.name.startswith("picture-")


def test_the_rules_are_those_of_annex_29_where_words_are() -> None:
    for text in (
        "बर्फीले",
        "ภูเขา",
        "น้ำ",
        "தமிழ்",
        "한글",
        "\u1100\u1161\u11a8",
        "👩\u200d🎨",
        "🇫🇷🇯🇵",
        "e\u0301a",
        "1\ufe0f\u20e3",
    ):
        assert list(clusters(text)) == regex.findall(r"\X", text)
