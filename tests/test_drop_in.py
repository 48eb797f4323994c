"""The drop-in on diffusers' own objects: the same results, everything else undisturbed, undone without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import handscroll
from handscroll.errors import BudgetError, UsageError

Miniature = Callable[..., Path]


@pytest.fixture
def vae() -> Any:
    import miniatures

    torch.manual_seed(1)
    return miniatures.make_autoencoder().eval()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    return (one.float() - other.float()).abs().max().item()


@pytest.mark.parametrize("strip_rows", [None, 1, 3])
def test_decode_and_encode_stream_and_are_undone(vae: Any, strip_rows: int | None) -> None:
    z, x = torch.randn(2, 32, 5, 3), torch.randn(2, 3, 96, 64)
    before, decoded, encoded = dict(vae.__dict__), vae.decode(z).sample, vae.encode(x).latent
    assert handscroll.attach(vae, strip_rows=strip_rows) is vae
    assert difference(vae.decode(z).sample, decoded) <= 2e-5
    assert difference(vae.decode(z, return_dict=False)[0], decoded) <= 2e-5
    assert difference(vae.encode(x).latent, encoded) <= 2e-5
    assert difference(vae(x).sample, vae.decode(encoded).sample) <= 2e-5
    handscroll.detach(vae)
    assert vae.__dict__ == before
    assert torch.equal(vae.decode(z).sample, decoded)
    handscroll.detach(vae)


def test_slicing_stays_in_charge_of_batches(vae: Any) -> None:
    z = torch.randn(3, 32, 2, 4)
    whole = vae.decode(z).sample
    vae.enable_slicing()
    handscroll.attach(vae)
    assert difference(vae.decode(z).sample, whole) <= 2e-5
    assert difference(vae.decode(z[:1]).sample, whole[:1]) <= 2e-5


def test_tiling_gives_way_to_exactness(vae: Any) -> None:
    z = torch.randn(1, 32, 18, 17)
    whole = vae.decode(z).sample
    vae.enable_tiling()
    assert difference(vae.decode(z).sample, whole) > 1e-3
    handscroll.attach(vae)
    assert difference(vae.decode(z).sample, whole) <= 2e-5
    assert vae.use_tiling


def test_the_input_is_brought_to_the_autoencoders_dtype(vae: Any) -> None:
    vae.to(torch.bfloat16)
    z = torch.randn(1, 32, 4, 4)
    whole = vae.decode(z.to(torch.bfloat16)).sample
    handscroll.attach(vae)
    out = vae.decode(z).sample
    assert out.dtype == torch.bfloat16
    assert difference(out, whole) <= 0.1 * whole.abs().max().item()


def test_weights_changed_after_attaching_are_used(vae: Any) -> None:
    handscroll.attach(vae)
    z = torch.randn(1, 32, 3, 3)
    before = vae.decode(z).sample
    vae.decoder.conv_in.weight.mul_(1.5)
    after = vae.decode(z).sample
    handscroll.detach(vae)
    assert not torch.equal(before, after)
    assert difference(after, vae.decode(z).sample) <= 2e-5


def test_a_pipeline_paints_the_same_picture_with_callbacks(miniature: Miniature) -> None:
    from diffusers import SanaPipeline

    pipe = SanaPipeline.from_pretrained(miniature("1.6b"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen: list[int] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    def paint() -> np.ndarray:
        return pipe(
            "a lake",
            width=96,
            height=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3),
            use_resolution_binning=False,
            complex_human_instruction=None,
            callback_on_step_end=on_step_end,
            output_type="np",
        ).images[0]

    whole = paint()
    assert handscroll.attach(pipe, strip_rows=2) is pipe
    assert np.abs(paint() - whole).max() <= 2e-5
    assert seen == [0, 1, 0, 1]
    # The autoencoder may sit in another dtype than the rest: the pipeline casts, and so do we.
    pipe.vae.to(torch.bfloat16)
    assert np.isfinite(paint()).all()
    handscroll.detach(pipe)
    assert "_decode" not in pipe.vae.__dict__


def test_memory_sets_the_strip_height_or_is_refused(vae: Any) -> None:
    z = torch.randn(1, 32, 6, 9)
    whole = vae.decode(z).sample
    handscroll.attach(vae, memory="200MiB")
    assert difference(vae.decode(z).sample, whole) <= 2e-5
    handscroll.attach(vae, memory=1000)
    with pytest.raises(BudgetError) as refused:
        vae.decode(z)
    handscroll.attach(vae, memory=refused.value.minimum_bytes)
    assert difference(vae.decode(z).sample, whole) <= 2e-5


def test_memory_is_planned_for_encoding_too_or_refused(vae: Any) -> None:
    pixels = torch.rand(2, 3, 192, 288) * 2 - 1
    whole = vae.encode(pixels).latent
    handscroll.attach(vae)
    by_rows = vae.encode(pixels).latent
    assert difference(by_rows, whole) <= 2e-5 * whole.abs().max()
    handscroll.attach(vae, memory="200MiB")
    assert torch.equal(vae.encode(pixels).latent, by_rows)
    handscroll.attach(vae, memory=1000)
    with pytest.raises(BudgetError, match="288x192") as refused:
        vae.encode(pixels)
    handscroll.attach(vae, memory=refused.value.minimum_bytes)
    assert torch.equal(vae.encode(pixels).latent, by_rows)


def test_what_cannot_be_attached_says_so(vae: Any) -> None:
    with pytest.raises(UsageError, match="AutoencoderDC"):
        handscroll.attach(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="exclude"):
        handscroll.attach(vae, strip_rows=1, memory="1GiB")
    with pytest.raises(UsageError, match="out of range"):
        handscroll.attach(vae, strip_rows=0)
    with pytest.raises(UsageError, match="6GiB"):
        handscroll.attach(vae, memory="lots")
    assert "_decode" not in vae.__dict__
