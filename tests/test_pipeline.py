"""The whole way against diffusers' own pipelines, in the same process: same prompt, same seed, same picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import torch

import handscroll
from handscroll import Handscroll, Request, decode_latent, generate
from handscroll.errors import CheckpointError, PromptError, UsageError
from handscroll.events import Progress
from handscroll.models.opening import open_checkpoint
from handscroll.pictures.metadata import read_parameters
from handscroll.runtime.text import instruction_of

Miniature = Callable[..., Path]
BUILTIN = Path(handscroll.__file__).parent / "builtin" / "tiny-landscape"
PROMPT = "Snowy Mountains at dusk, a red sun"


def read_pixels(path: Path) -> np.ndarray:
    image = pyvips.Image.new_from_file(str(path))
    return np.ndarray(buffer=image.write_to_memory(), dtype=np.uint8, shape=(image.height, image.width, image.bands))


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The design's sense of equal: fewer than 0.1 % of uint8 samples differ, none by more than 1."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    assert theirs.std() > 5, "a flat picture would prove nothing"


def diffusers_picture(
    folder: Path, width: int, height: int, seed: int, steps: int, guidance: float, **options: Any
) -> np.ndarray:
    sprint = (folder / "model_index.json").read_text().find("SanaSprintPipeline") >= 0
    if sprint:
        from diffusers import SanaSprintPipeline as Pipeline
    else:
        from diffusers import SanaPipeline as Pipeline

        options.setdefault("negative_prompt", "")
    pipe = Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if sprint and steps != 2:
        options["intermediate_timesteps"] = None
    image = pipe(
        prompt=PROMPT,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        use_resolution_binning=False,
        output_type="np",
        **options,
    )[0][0]
    return (image * 255).round().astype(np.uint8)


@pytest.mark.parametrize("row", ["0.6b", "1.6b", "1.6b-2k", "1.6b-4k", "1.5-1.6b", "sprint-0.6b", "sprint-1.6b"])
def test_every_kind_of_transformer_paints_what_diffusers_paints(miniature: Miniature, row: str, tmp_path: Path) -> None:
    folder = miniature(row)
    steps = 2
    request = Request(PROMPT, model=str(folder), width=192, height=128, steps=steps, guidance=4.5, seed=11)
    (result,) = generate(request, tmp_path / "ours.png")
    spec = open_checkpoint(folder)
    # The reference gets the same instruction through its public argument; by default it would use its own text.
    options = {"complex_human_instruction": instruction_of(spec).split("\n") if spec.instruction else None}
    theirs = diffusers_picture(folder, 192, 128, 11, steps, 4.5, **options)
    assert_same_picture(read_pixels(result.path), theirs)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 4.5), (5, 1.0), (4, 7.0)])
def test_steps_and_guidance_are_diffusers(miniature: Miniature, steps: int, guidance: float, tmp_path: Path) -> None:
    folder = miniature("1.6b")
    request = Request(
        PROMPT, negative="fog", model=str(folder), width=128, height=128, steps=steps, guidance=guidance, seed=5
    )
    (result,) = generate(request, tmp_path / "ours.png")
    theirs = diffusers_picture(folder, 128, 128, 5, steps, guidance, negative_prompt="fog")
    assert_same_picture(read_pixels(result.path), theirs)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_sprint_steps_are_diffusers(miniature: Miniature, steps: int, tmp_path: Path) -> None:
    folder = miniature("sprint-1.6b")
    request = Request(PROMPT, model=str(folder), width=128, height=128, steps=steps, guidance=3.0, seed=5)
    (result,) = generate(request, tmp_path / "ours.png")
    assert_same_picture(read_pixels(result.path), diffusers_picture(folder, 128, 128, 5, steps, 3.0))


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 320)])
def test_the_built_in_model_paints_what_diffusers_paints(width: int, height: int, tmp_path: Path) -> None:
    request = Request(PROMPT, width=width, height=height, steps=4, guidance=4.5, seed=7)
    (result,) = generate(request, tmp_path / "ours.png")
    theirs = diffusers_picture(BUILTIN, width, height, 7, 4, 4.5, complex_human_instruction=None)
    assert_same_picture(read_pixels(result.path), theirs)


def test_every_exact_way_to_decode_gives_the_same_picture(miniature: Miniature, tmp_path: Path) -> None:
    model = str(miniature("1.6b"))
    pictures = {}
    for decode in ("rows", "whole", "patch", "tiled"):
        request = Request(PROMPT, model=model, width=640, height=608, steps=1, seed=2, decode=decode, patches=5)
        (result,) = generate(request, tmp_path / f"{decode}.png")
        assert result.exact is (decode != "tiled")
        assert f"Exact: {str(result.exact).lower()}" in read_parameters(result.path)
        assert "Precision: fp32" in read_parameters(result.path)
        pictures[decode] = read_pixels(result.path)
    assert_same_picture(pictures["rows"], pictures["whole"])
    assert_same_picture(pictures["patch"], pictures["whole"])
    assert np.abs(pictures["tiled"].astype(int) - pictures["whole"]).max() > 1, "tiling is expected to change pictures"


def test_a_saved_latent_decodes_to_the_same_file_again(miniature: Miniature, tmp_path: Path) -> None:
    request = Request(PROMPT, negative="rain", model=str(miniature("1.6b")), width=104, height=72, steps=1, seed=9)
    (made,) = generate(request, tmp_path / "a.png", save_latent=tmp_path / "a.safetensors")
    again = decode_latent(tmp_path / "a.safetensors", tmp_path / "b.png", strip_rows=1)
    assert_same_picture(read_pixels(again.path), read_pixels(made.path))
    assert read_parameters(again.path) == read_parameters(made.path)
    assert (again.width, again.height, again.seed) == (104, 72, 9)


def test_a_size_that_is_no_multiple_is_rendered_larger_and_cropped(miniature: Miniature, tmp_path: Path) -> None:
    model = str(miniature("1.6b"))
    (whole,) = generate(Request(PROMPT, model=model, width=128, height=96, steps=1, seed=3), tmp_path / "whole.png")
    (cropped,) = generate(Request(PROMPT, model=model, width=101, height=73, steps=1, seed=3), tmp_path / "crop.png")
    assert np.array_equal(read_pixels(cropped.path), read_pixels(whole.path)[:73, :101])


def test_many_pictures_are_those_of_consecutive_seeds(miniature: Miniature, tmp_path: Path) -> None:
    model = str(miniature("1.6b"))
    results = generate(Request(PROMPT, model=model, width=64, height=64, steps=1, seed=3, count=2), tmp_path / "p.png")
    assert [result.path.name for result in results] == ["p-1.png", "p-2.png"]
    assert [result.seed for result in results] == [3, 4]
    (second,) = generate(Request(PROMPT, model=model, width=64, height=64, steps=1, seed=4), tmp_path / "q.png")
    assert np.array_equal(read_pixels(results[1].path), read_pixels(second.path))
    assert not np.array_equal(read_pixels(results[0].path), read_pixels(second.path))


def test_the_class_makes_the_same_picture_and_keeps_its_modules(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature("1.6b")
    scroll = Handscroll.from_pretrained(folder)
    picture = scroll(PROMPT, width=96, height=64, steps=2, seed=1)
    saved = picture.save(tmp_path / "class.png")
    (result,) = generate(Request(PROMPT, model=str(folder), width=96, height=64, steps=2, seed=1), tmp_path / "g.png")
    assert np.array_equal(read_pixels(saved), read_pixels(result.path))
    assert np.array_equal(picture.numpy(), read_pixels(saved))
    kept = dict(scroll.session.opened)
    scroll(PROMPT, width=128, height=160, steps=1, seed=1).numpy()
    assert scroll.session.opened == kept


def test_tiling_once_does_not_stick(miniature: Miniature) -> None:
    scroll = Handscroll.from_pretrained(miniature("1.6b"))
    tiled = scroll(PROMPT, width=640, height=608, steps=1, seed=2, decode="tiled").numpy()
    whole = scroll(PROMPT, width=640, height=608, steps=1, seed=2, decode="whole").numpy()
    assert_same_picture(scroll(PROMPT, width=640, height=608, steps=1, seed=2).numpy(), whole)
    assert not np.array_equal(tiled, whole)


def test_rows_leave_the_callers_grad_mode_alone(miniature: Miniature) -> None:
    for _ in Handscroll.from_pretrained(miniature("1.6b"))(PROMPT, width=64, height=64, steps=1, seed=2).rows():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_a_prompt_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        Request("caf\udce9")


def test_many_steps_do_not_run_off_the_schedule(miniature: Miniature, tmp_path: Path) -> None:
    request = Request(PROMPT, model=str(miniature("1.6b-4k")), width=32, height=32, steps=600, guidance=1, seed=2)
    assert generate(request, tmp_path / "p.png")[0].steps == 600


def test_events_and_the_result_tell_the_whole_story(miniature: Miniature, tmp_path: Path) -> None:
    events: list[Progress] = []
    request = Request(PROMPT, model=str(miniature("1.6b")), width=64, height=96, steps=3, seed=1)
    (result,) = generate(request, tmp_path / "p.png", on_event=events.append)
    steps = [event.done for event in events if event.stage == "denoise"]
    assert steps == [0, 1, 2, 3]
    assert [event.done for event in events if event.stage == "decode"][-1] == 96
    facts = json.loads(json.dumps(result.as_dict()))
    assert set(facts) >= {
        "path",
        "width",
        "height",
        "seed",
        "steps",
        "model",
        "precision",
        "exact",
        "memory",
        "seconds",
    }
    assert set(facts["memory"]) == {"budget_bytes", "planned_peak_bytes", "measured_peak_bytes", "stages"}
    assert set(facts["memory"]["stages"]) == set(facts["seconds"]) - {"total"} == {"text", "denoise", "decode"}
    assert facts["memory"]["measured_peak_bytes"] > 50e6
    assert list(tmp_path.iterdir()) == [result.path]


def test_a_listener_that_raises_ends_the_run_and_loses_nothing(miniature: Miniature, tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "decode" and event.done:
            raise KeyboardInterrupt

    request = Request(PROMPT, model=str(miniature("1.6b")), width=64, height=64, steps=1)
    with pytest.raises(KeyboardInterrupt) as caught:
        generate(request, tmp_path / "p.png", on_event=stop)
    assert caught.value.__notes__ == [f"`handscroll resume {tmp_path}/p.png.run` goes on from the finished latent"]
    events: list[Progress] = []
    (result,) = generate(request, tmp_path / "p.png", on_event=events.append)
    assert {event.stage for event in events} - {"pulse"} == {"notice", "decode", "write"}
    assert (result.resumed_from_step, set(result.seconds)) == (1, {"decode", "total"})
    assert list(tmp_path.iterdir()) == [tmp_path / "p.png"]


def test_a_latent_of_another_model_is_refused(miniature: Miniature, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"latent": torch.zeros(1, 5, 2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="channels"):
        decode_latent(tmp_path / "odd.safetensors", tmp_path / "p.png", model=str(miniature("1.6b")))
    with pytest.raises(CheckpointError, match="which model"):
        decode_latent(tmp_path / "odd.safetensors", tmp_path / "p.png")


def test_sprint_refuses_what_it_cannot_do(miniature: Miniature, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="negative"):
        generate(Request(PROMPT, negative="fog", model=str(miniature("sprint-1.6b")), seed=1), tmp_path / "p.png")
