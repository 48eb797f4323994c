"""What the public functions are given: every number that can be meant, and one line for what cannot."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import handscroll
from handscroll import Handscroll, Request, decode_latent, generate, resume
from handscroll.cli import main as cli
from handscroll.errors import HandscrollError, PromptError, UsageError
from handscroll.events import ignore
from handscroll.options import options_of
from handscroll.pipeline import plan_of
from handscroll.request import BYTE_ORDER_MARK, MAX_SEED
from handscroll.runtime.sampling.noise import starting_noise

Miniature = Callable[..., Path]


class Hostile:
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


# Python's own values that people pass by mistake, other libraries' numbers, and worse.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 64, 2**31, 2**63, 2**64, -(2**70), 10**5000),
    *(0.0, 1.5, 64.0, -1.0, float("nan"), float("inf"), 1e300, 1j),
    *(
        "",
        " ",
        "-",
        "64",
        "64x64",
        "auto",
        "off",
        "rows",
        "cpu",
        "2GiB",
        "nan",
        "inf",
        "1e999",
        "\ufeff",
        "\0",
        "\udcff",
    ),
    *("x" * 30_000, "9" * 5000, "~nobody-of-that-name/x", "a" * 5000 + "/b", "line\nbreak"),
    *(b"", b"64", bytearray(b"x"), Path(), Path("a.png"), Path("\0"), [], [64], [64, 64], (64, 64), (64, 64, 64)),
    *({}, {"a": 1}, {1, 2}, object(), Hostile(), len, int, lambda: 1, iter([1]), range(2), slice(1)),
    *(np.int64(64), np.uint64(2**63), np.float32(64), np.float64("nan"), np.bool_(True), np.str_("64")),
    *(np.array(64), np.array([64, 64]), np.array([]), np.arange(5000)),
    *(torch.tensor(64), torch.tensor([64, 64]), torch.Generator(), torch.float32, torch.device("cpu")),
    *(decimal.Decimal(64), fractions.Fraction(64), fractions.Fraction(1, 3), 10**400),
)


def complaint(call: Callable[[], Any]) -> str:
    """What an error of ours says, empty where there is none. Any other error goes through."""
    try:
        call()
    except HandscrollError as error:
        return str(error)
    return ""


def only_ours(call: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Whatever it is given, an error is one of ours, in one line."""
    assert "\n" not in complaint(partial(call, *given, **options))


def as_json(make: Callable[..., Request], *given: Any, **options: Any) -> None:
    json.dumps(dataclasses.asdict(make(*given, **options)))


@pytest.mark.parametrize("name", sorted({f for each in options_of(Request) for f in (each.name, *each.fields)}))
def test_any_value_of_any_option_is_taken_or_refused_in_one_line(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(Request)}
    for value in VALUES:
        if name.startswith("memory") and isinstance(value, str) and len(value) > 100:
            continue
        only_ours(as_json, Request.of, "a lake", **{name: value})
        assert len(complaint(partial(Request.of, "a lake", **{name: value}))) < 1000
        if name in fields:
            only_ours(as_json, Request, "a lake", **{name: value})


def test_any_prompt_is_taken_or_refused_in_one_line() -> None:
    for value in VALUES:
        only_ours(as_json, Request, value)
        only_ours(as_json, Request.of, value)


@pytest.fixture
def model(miniature: Miniature) -> str:
    return str(miniature("1.6b"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted goes no further than a plan."""

    class Planned(HandscrollError):
        pass

    def stop(*arguments: Any, **options: Any) -> None:
        raise Planned("planned")

    monkeypatch.setattr("handscroll.pipeline.job_settings", stop)
    monkeypatch.setattr("handscroll.api.job_settings", stop)


@pytest.mark.usefixtures("no_work")
def test_the_class_is_given_anything(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scroll = Handscroll.from_pretrained(model)
    rng = random.Random(4)
    taken = [each.name for each in options_of(Request) if each.is_for("scroll")]
    for value in VALUES:
        only_ours(Handscroll.from_pretrained, value)
        only_ours(Handscroll, value)
        for option in ("device", "precision", "memory_bytes", "on_event"):
            only_ours(Handscroll.from_pretrained, model, **{option: value})
        only_ours(Handscroll, scroll.spec, value, value, value)
        only_ours(scroll, value, size=64, steps=1, on_event=ignore)
        only_ours(scroll, "a lake", on_event=ignore, **{rng.choice(taken): value})
        only_ours(scroll, "a lake", size=64, on_event=value)


@pytest.mark.usefixtures("no_work")
def test_the_functions_are_given_anything(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("a lake", model=model, width=64, height=64, steps=1)
    for value in VALUES:
        only_ours(generate, value, "a.png")
        only_ours(generate, request, value)
        only_ours(generate, request, "a.png", save_latent=value)
        only_ours(generate, request, "a.jpg", quality=value)
        only_ours(generate, request, "a.png", on_event=value)
        only_ours(decode_latent, value, "a.png")
        only_ours(decode_latent, "a.safetensors", value)
        only_ours(decode_latent, "a.safetensors", "a.jpg", quality=value)
        only_ours(decode_latent, "a.safetensors", "a.png", on_event=value)
        only_ours(decode_latent, "a.safetensors", "a.png", model=value)
        only_ours(resume, value)
        only_ours(plan_of, request, value)


def test_a_picture_is_saved_anywhere_that_can_be_meant(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = Handscroll.from_pretrained(model)("a lake", size=64, steps=1, seed=1)
    for value in VALUES:
        only_ours(picture.save, value)
        if value is not None and not isinstance(value, int | np.integer):
            with pytest.raises(UsageError):
                picture.save("a.jpg", quality=value)
    assert picture.save(np.str_("b.png")) == picture.save(Path("b.png")) == Path("b.png")
    quality: Any = np.int64(70)
    assert picture.save("b.jpg", quality=quality) == Path("b.jpg")


# What can be meant


def test_other_libraries_numbers_are_numbers() -> None:
    given: dict[str, Any] = {"steps": np.int64(3), "guidance": np.float32(2.5), "seed": np.uint64(2**63)}
    made = Request("a lake", width=np.int32(64), **given)  # type: ignore[arg-type]
    assert made == Request("a lake", steps=3, guidance=2.5, seed=2**63, width=64)
    assert {type(value) for value in (made.steps, made.seed, made.width)} == {int}
    assert type(made.guidance) is float
    json.dumps(dataclasses.asdict(made))


def test_none_is_left_out() -> None:
    assert Request.of("a lake", negative=None, seed=None, size=None) == Request("a lake")
    assert Request("a lake", negative=None).negative == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [["a lake"], ["a lake", "a sea"], ("a lake",), []], ids=str)
def test_a_list_of_prompts_is_told_what_to_do(prompts: Any) -> None:
    with pytest.raises(PromptError, match=rf"list of {len(prompts)}; .* call Handscroll, which takes a list"):
        Request.of(prompts)


def test_a_list_of_prompts_gives_what_each_gives(model: str) -> None:
    scroll = Handscroll.from_pretrained(model)
    pictures = scroll(["a lake", "a sea"], size=64, steps=1, seed=3, negative=["fog", ""], guidance=2)
    alone = [
        scroll("a lake", size=64, steps=1, seed=3, negative="fog", guidance=2),
        scroll("a sea", size=64, steps=1, seed=3, guidance=2),
    ]
    assert [picture.seed for picture in pictures] == [3, 3]
    assert all(torch.equal(one.latent, other.latent) for one, other in zip(pictures, alone, strict=True))
    (single,) = scroll(("a lake",), size=64, steps=1, seed=[np.int64(4)])
    assert single.seed == 4


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, "the list of prompts is empty"),
        (["a lake", ""], {}, "the prompt is empty"),
        (["a lake", 5], {}, "is not text"),
        (["a lake", ["a sea"]], {}, "is a list"),
        (["a lake", "a sea"], {"seed": [1]}, "2 prompts and 1 of seed; give one of it, or one for each prompt"),
        (["a lake"], {"negative": ("fog", "rain")}, "1 prompts and 2 of negative"),
        (["a lake"], {"steps": [1]}, "steps [1] is not a whole number"),
    ],
    ids=str,
)
def test_a_list_that_cannot_be_meant_is_refused_before_any_work(
    model: str, prompts: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Handscroll.from_pretrained(model)(prompts, size=64, **options)
    assert says in str(caught.value)


def test_a_fresh_generator_is_its_seed() -> None:
    for seed in (0, 7, 2**32 + 5, 2**63, 2**64 - 1):
        generator = torch.Generator().manual_seed(seed if seed < 2**63 else seed - 2**64)
        before = generator.get_state()
        assert Request.of("a lake", seed=generator).seed == Request("a lake", seed=generator).seed == seed  # type: ignore[arg-type]
        assert torch.equal(generator.get_state(), before)


def test_a_generator_that_has_drawn_is_told_what_to_give() -> None:
    generator = torch.Generator().manual_seed(7)
    torch.randn(1, generator=generator)
    with pytest.raises(UsageError, match=r"generator\.initial_seed\(\)"):
        Request.of("a lake", seed=generator)
    assert Request.of("a lake", seed=generator.initial_seed()).seed == 7


@pytest.mark.parametrize("option", ["memory_bytes", "device", "model", "save_latent"])
def test_going_on_is_given_anything(model: str, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a.png"

    def stop(event: handscroll.Progress) -> None:
        if event.stage == "denoise":
            raise handscroll.Cancelled

    with pytest.raises(handscroll.Cancelled):
        generate(Request.of("a lake", model=model, size=64, steps=1, seed=1), picture, on_event=stop)
    monkeypatch.setattr("handscroll.pipeline.Job.of", lambda *given: 1 / 0)
    for value in VALUES:
        try:
            only_ours(resume, picture, **{option: value})
        except ZeroDivisionError:
            continue


# Seeds


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_has_the_noise_of_diffusers(seed: int) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    expected = randn_tensor((1, 4, 5, 6), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
    noise, generator = starting_noise(4, 5, 6, Request("a lake", seed=seed).seed or 0)
    assert torch.equal(noise, expected)
    assert generator.initial_seed() == seed


def test_minus_one_is_random(model: str) -> None:
    assert Request("a lake", seed=-1) == Request.of("a lake", seed="-1") == Request("a lake")
    picture = Handscroll.from_pretrained(model)("a lake", size=64, steps=1, seed=-1)
    assert 0 <= picture.seed < 2**32
    with pytest.raises(UsageError, match=f"use 0 to {MAX_SEED}, or -1 for a random one"):
        Request("a lake", seed=-2)


def test_the_last_seed_does_not_wrap() -> None:
    assert Request("a lake", seed=MAX_SEED - 2, count=3).seed == MAX_SEED - 2
    with pytest.raises(UsageError, match="the last picture's seed"):
        Request("a lake", seed=MAX_SEED - 2, count=4)


def test_a_picture_of_the_largest_seed_goes_through_the_command_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", model, "--size", "64", "--steps", "1", "--json"]
    assert cli.run(["generate", "a lake", *options, "--seed", str(MAX_SEED), "--save-latent", "a.safetensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seed"], found["path"]) == (MAX_SEED, f"a-lake-{MAX_SEED}.png")
    assert decode_latent("a.safetensors", "b.png").seed == MAX_SEED
    assert cli.run(["generate", "a lake", *options, "--seed", "-1"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["seed"] < 2**32


# Texts


def test_a_byte_order_mark_is_no_part_of_a_prompt() -> None:
    made = Request(f"{BYTE_ORDER_MARK}a lake", negative=f"{BYTE_ORDER_MARK}fog")
    assert (made.prompt, made.negative) == ("a lake", "fog")
    with pytest.raises(PromptError, match="empty"):
        Request(f"{BYTE_ORDER_MARK} ")


def test_everything_public_is_there() -> None:
    for name in handscroll.__all__:
        assert getattr(handscroll, name) is not None
