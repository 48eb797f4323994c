"""What the drop-in refuses, and when: settings at `attach`, sizes before a pipeline's first step, in the same words."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SanaPipeline

import handscroll
from handscroll.errors import BudgetError, UsageError
from handscroll.events import Progress
from handscroll.units import parse_bytes

Miniature = Callable[..., Path]


@pytest.fixture
def pipe(miniature: Miniature) -> Any:
    pipe = SanaPipeline.from_pretrained(miniature("1.6b"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Steps:
    """Counts the transformer's calls."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        pipe.transformer.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def paint(pipe: Any, **options: Any) -> Any:
    asked = {"width": 96, "height": 64, "num_inference_steps": 1, "use_resolution_binning": False}
    asked |= {"output_type": "np", "complex_human_instruction": None} | options
    prompt = asked.pop("prompt", "a lake")
    return pipe(prompt, generator=torch.Generator().manual_seed(3), **asked).images


def needed_bytes(vae: Any, half: str, given: torch.Tensor) -> int:
    handscroll.attach(vae, memory=1)
    with pytest.raises(BudgetError) as refused, torch.no_grad():
        getattr(vae, half)(given)
    return refused.value.minimum_bytes


# Settings


@pytest.mark.parametrize(
    "memory",
    [
        -1,
        0,
        math.nan,
        math.inf,
        1.5,
        2e9,
        True,
        False,
        "",
        " ",
        "0",
        "0MiB",
        "-1MiB",
        "lots",
        [],
        b"1GiB",
        1j,
        pytest.param(object(), id="object"),
    ],
    ids=str,
)
def test_memory_that_is_no_amount_is_refused_at_once(vae: Any, memory: Any) -> None:
    with pytest.raises(UsageError, match=r"^memory [^\n]*$"):
        handscroll.attach(vae, memory=memory)
    assert "_decode" not in vars(vae)


@pytest.mark.parametrize("strip_rows", [0, -1, 1.0, math.nan, True, "4", [4]], ids=str)
def test_strip_rows_that_are_no_number_of_rows_are_refused_at_once(vae: Any, strip_rows: Any) -> None:
    with pytest.raises(UsageError, match=r"^strip_rows [^\n]*$"):
        handscroll.attach(vae, strip_rows=strip_rows)
    assert "_decode" not in vars(vae)


def test_whole_numbers_of_other_libraries_are_taken(vae: Any) -> None:
    memory, strip_rows = np.int64(2**28), np.int32(2)
    handscroll.attach(vae, memory=memory)  # type: ignore[arg-type]
    handscroll.attach(vae, strip_rows=strip_rows)  # type: ignore[arg-type]
    handscroll.attach(vae, memory="256 MiB")


def test_a_listener_that_cannot_be_called_is_refused(vae: Any) -> None:
    with pytest.raises(UsageError, match="on_event"):
        handscroll.attach(vae, on_event="yes")  # type: ignore[arg-type]


def test_what_holds_no_autoencoder_of_this_kind_is_named(vae: Any, pipe: Any) -> None:
    other = AutoencoderKL(block_out_channels=(32,))
    for target, named in ((None, "NoneType"), (other, "AutoencoderKL"), (torch.compile(other), "OptimizedModule")):
        with pytest.raises(UsageError, match=named):
            handscroll.attach(target)
    pipe.vae = other
    with pytest.raises(UsageError, match="SanaPipeline with a AutoencoderKL"):
        handscroll.attach(pipe)
    pipe.vae = None
    with pytest.raises(UsageError, match="SanaPipeline without an autoencoder"):
        handscroll.attach(pipe)


# Messages


@pytest.mark.parametrize(("half", "given"), [("decode", (2, 32, 3, 5)), ("encode", (2, 3, 96, 160))])
def test_both_ways_speak_of_pixels_width_first_in_the_same_words(vae: Any, half: str, given: tuple[int, ...]) -> None:
    given_tensor = torch.randn(given)
    least_bytes = needed_bytes(vae, half, given_tensor)
    for memory in (1, 1000, 2**20, least_bytes // 2, least_bytes - 1):
        handscroll.attach(vae, memory=memory)
        with pytest.raises(BudgetError) as refused, torch.no_grad():
            getattr(vae, half)(given_tensor)
        line = str(refused.value)
        found = re.fullmatch(
            f"to {half}"
            r" 2 pictures of 160x96 in fp32 needs at least (\w+) above weights, input and result; "
            r"([\w ]+) were allowed",
            line,
        )
        assert found is not None, line
        assert parse_bytes(found[1]) >= least_bytes
        allowed = int(found[2].split()[0]) if "bytes" in found[2] else parse_bytes(found[2])
        assert allowed <= memory
        assert found[1] != found[2]
        handscroll.attach(vae, memory=found[1])
        with torch.no_grad():
            getattr(vae, half)(given_tensor)
    handscroll.attach(vae, memory=least_bytes)
    with torch.no_grad():
        getattr(vae, half)(given_tensor)


# Pipelines


def test_a_size_that_does_not_fit_is_refused_before_the_first_step(pipe: Any) -> None:
    least_bytes = needed_bytes(pipe.vae, "decode", torch.randn(1, 32, 2, 3))
    handscroll.attach(pipe, memory=least_bytes)
    steps = Steps(pipe)
    assert paint(pipe).shape == (1, 64, 96, 3)
    steps.count = 0
    for too_much in (
        {"width": 640, "height": 512},
        {"prompt": ["a lake"] * 40},
        {"num_images_per_prompt": 40},
        {"latents": torch.randn(1, 32, 20, 20)},
    ):
        with pytest.raises(BudgetError, match="to decode"):
            paint(pipe, **too_much)
    assert not steps.count
    # What is not decoded here needs no memory here.
    assert paint(pipe, width=640, height=512, output_type="latent").shape == (1, 32, 16, 20)
    # Slice by slice the layers take no more, but each result is held twice until they are put together.
    handscroll.attach(pipe, memory=least_bytes + 2**21)
    pipe.vae.enable_slicing()
    assert paint(pipe, num_images_per_prompt=5).shape == (5, 64, 96, 3)
    with pytest.raises(BudgetError, match="to decode"):
        paint(pipe, num_images_per_prompt=60)


def test_the_size_that_a_pipeline_really_renders_is_looked_at(pipe: Any) -> None:
    pipe.transformer.register_to_config(sample_size=16)  # whose bins are of about 512x512
    least_bytes = needed_bytes(pipe.vae, "decode", torch.randn(1, 32, 4, 4))
    handscroll.attach(pipe, memory=least_bytes)
    paint(pipe, width=128, height=128)
    with pytest.raises(BudgetError, match="512x512"):
        paint(pipe, width=128, height=128, use_resolution_binning=True)


def test_a_memory_in_which_nothing_fits_is_refused_when_a_pipeline_is_attached(pipe: Any) -> None:
    with pytest.raises(BudgetError, match="needs at least"):
        handscroll.attach(pipe, memory=1000)
    assert "_decode" not in vars(pipe.vae)
    assert "check_inputs" not in vars(pipe)


def test_what_rows_cannot_run_through_is_refused_before_the_first_step(pipe: Any) -> None:
    handscroll.attach(pipe, memory="300MiB")
    steps = Steps(pipe)
    pipe.vae.decoder.conv_out.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match=r"decoder\.conv_out has hooks"):
        paint(pipe)
    assert not steps.count
    with pytest.raises(UsageError, match=r"decoder\.conv_out has hooks"):
        handscroll.attach(pipe, memory="200MiB")


def test_the_pipelines_own_check_comes_first_and_is_undone(pipe: Any) -> None:
    before = dict(vars(pipe))
    handscroll.attach(pipe)
    with pytest.raises(ValueError, match="divisible by 32"):
        paint(pipe, width=100)
    handscroll.detach(pipe)
    assert vars(pipe) == before


def test_a_pipeline_whose_autoencoder_is_replaced_or_compiled_later(pipe: Any, vae: Any) -> None:
    handscroll.attach(pipe, memory=needed_bytes(pipe.vae, "decode", torch.randn(1, 32, 2, 3)))
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    paint(pipe)
    with pytest.raises(BudgetError):
        paint(pipe, width=640, height=512)
    pipe.vae = vae
    paint(pipe, width=320, height=320)


def test_pipelines_are_copied_with_what_was_attached(pipe: Any) -> None:
    handscroll.attach(pipe, memory="300MiB")
    again = copy.deepcopy(vars(pipe)["check_inputs"])
    assert pickle.loads(pickle.dumps(again)) is not None


# Progress


def test_a_listener_hears_of_every_sweep(vae: Any) -> None:
    heard: list[Progress] = []
    handscroll.attach(vae, on_event=heard.append)
    vae.encode(vae.decode(torch.randn(1, 32, 3, 3)).sample)
    for stage in ("decode", "encode"):
        events = [event for event in heard if event.stage == stage]
        assert [event.done for event in events] == list(range(1, len(events) + 1))
        assert {event.total for event in events} == {len(events)}
        assert len(events) > 3
    handscroll.attach(vae)
    heard.clear()
    vae.decode(torch.randn(1, 32, 3, 3))
    assert not heard


def test_a_listener_can_end_it(vae: Any) -> None:
    class Enough(Exception):
        pass

    def listen(event: Progress) -> None:
        raise Enough

    handscroll.attach(vae, on_event=listen)
    with pytest.raises(Enough):
        vae.decode(torch.randn(1, 32, 3, 3))
    handscroll.attach(vae)
    vae.decode(torch.randn(1, 32, 3, 3))


@pytest.mark.parametrize("disabled", [False, True])
def test_a_pipeline_shows_its_own_bar(pipe: Any, disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    shown: list[bool] = []
    plain = type(pipe).progress_bar

    def bar(self: Any, *given: Any, **named: Any) -> Any:
        made.append(plain(self, *given, **named))
        shown.append(not made[-1].disable)
        return made[-1]

    monkeypatch.setattr(type(pipe), "progress_bar", bar)
    handscroll.attach(pipe)
    pipe.set_progress_bar_config(disable=disabled, leave=False)
    paint(pipe)
    steps, sweeps = made
    assert shown == [not disabled] * 2
    assert (steps.total, sweeps.n) == (1, 0 if disabled else sweeps.total)
