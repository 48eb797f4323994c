"""What only a CUDA device can show: `pytest -m gpu`."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import handscroll
from handscroll import Handscroll, Request, decode_latent, generate, resume
from handscroll.banded import backend
from handscroll.banded.autoencoder import decode_rows, encode
from handscroll.errors import BudgetError
from handscroll.events import Progress
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.pipeline import plan_of
from handscroll.plan.plan import Plan
from handscroll.plan.store import Store
from handscroll.runtime import decode, device, maps, session
from handscroll.runtime.arithmetic import full_fp32
from handscroll.runtime.memory import empty_pinned_cache, release

Miniature = Callable[..., Path]
MIB = 2**20
PROMPT = "a lake at noon"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def devices() -> list[str]:
    return [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]


@pytest.fixture(params=["cuda:0", "cuda:1"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of two devices, of which the other one is current; all of it empty."""
    if request.param not in devices():
        pytest.skip("no second CUDA device")
    other = devices()[0] if request.param == devices()[-1] else devices()[-1]
    gc.collect()
    torch.cuda.empty_cache()
    with torch.cuda.device(other):
        yield request.param
    release(request.param)


@pytest.fixture(scope="module")
def model(miniature: Miniature) -> str:
    return str(miniature("1.6b"))


def asked(model: str, place: str, **options: Any) -> Request:
    options = {"width": 128, "height": 96, "steps": 3, "seed": 1, "precision": "fp32", **options}
    return Request(PROMPT, model=model, device=place, **options)


def pixels_of(path: Path) -> np.ndarray:
    import pyvips

    return pyvips.Image.new_from_file(str(path)).numpy()


def far(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two pictures, in steps of 8 bits."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# Rows against the whole


@pytest.mark.parametrize("strip_rows", [1, 3, None])
def test_rows_are_the_whole_decode(place: str, strip_rows: int | None) -> None:
    import miniatures

    torch.manual_seed(0)
    model = miniatures.make_autoencoder().eval().to(place)
    latent = torch.randn(2, 32, 5, 7, device=place)
    with torch.no_grad(), full_fp32(place):
        whole = model.decoder(latent)
        rows = torch.cat(list(decode_rows(model.decoder, latent, strip_rows)), dim=2)
        assert (rows - whole).abs().max().item() <= 1e-4
        assert (encode(model.encoder, whole, strip_rows) - model.encoder(whole)).abs().max().item() <= 1e-3


def test_bf16_rows_err_no_more_than_the_whole_decode(place: str) -> None:
    import miniatures

    ours = theirs = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        decoder = miniatures.make_autoencoder().eval().decoder
        latent = torch.randn(1, 32, 6, 6)
        with torch.no_grad():
            reference = decoder(latent)
            half, half_latent = decoder.to(place).bfloat16(), latent.to(place).bfloat16()
            theirs += (half(half_latent).float().cpu() - reference).abs().mean().item()
            rows = torch.cat(list(decode_rows(half, half_latent, 2)), dim=2)
            ours += (rows.float().cpu() - reference).abs().mean().item()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("row", ["1.6b", "sprint-1.6b"])
def test_a_picture_is_made_on_the_device(miniature: Miniature, row: str, place: str, tmp_path: Path) -> None:
    (result,) = generate(asked(str(miniature(row)), place, steps=2), tmp_path / "p.png")
    assert result.path.stat().st_size > 1000
    assert 0 < result.memory["measured_peak_bytes"] < 2**30


def test_fp32_on_a_device_is_fp32_on_a_cpu(model: str, place: str, tmp_path: Path) -> None:
    """Noise is drawn on the CPU, so that the two pictures are the same but for the order of sums."""
    (here,) = generate(asked(model, "cpu"), tmp_path / "cpu.png")
    (there,) = generate(asked(model, place), tmp_path / "cuda.png")
    assert far(pixels_of(here.path), pixels_of(there.path)) <= 1


def test_other_devices_are_left_alone(model: str, place: str, tmp_path: Path) -> None:
    before = {other: torch.cuda.memory_reserved(other) for other in devices() if other != place}
    current = torch.cuda.current_device()
    generate(asked(model, place), tmp_path / "p.png")
    assert torch.cuda.current_device() == current
    assert {other: torch.cuda.memory_reserved(other) for other in before} == before


# TF32


def flags() -> list[object]:
    torch_c: Any = torch._C
    return [torch_c._get_fp32_precision_getter("cuda", operator) for operator in ("matmul", "conv", "rnn", "all")] + [
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    ]


@pytest.mark.parametrize("allowed", [False, True])
def test_no_job_computes_in_tf32_and_flags_are_put_back(
    model: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    before = flags()
    seen: list[str] = []
    conv = backend.Conv.__call__

    def watched(self: Any, row_block: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._get_fp32_precision_getter("cuda", "conv"))
        return conv(self, row_block)

    monkeypatch.setattr(backend.Conv, "__call__", watched)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        set_to = flags()
        latent = tmp_path / "l.safetensors"
        generate(asked(model, place), tmp_path / "p.png", save_latent=latent)
        decode_latent(latent, tmp_path / "q.png", device=place)
        picture = Handscroll.from_pretrained(model, device=place)(PROMPT, width=64, height=64, steps=1)
        for _ in picture.rows():
            assert flags() == set_to
        assert flags() == set_to
        assert set(seen) == {"ieee"}
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[-2:]  # type: ignore[assignment]


def test_a_convolution_in_full_fp32_is_nearer_than_in_tf32(place: str) -> None:
    if torch.cuda.get_device_capability(place) < (8, 0):
        pytest.skip("this device has no TF32")
    torch.manual_seed(0)
    image, weight = torch.randn(1, 256, 64, 64), torch.randn(256, 256, 3, 3)
    truth = torch.conv2d(image.double(), weight.double(), padding=1)

    def error() -> float:
        return (torch.conv2d(image.to(place), weight.to(place), padding=1).cpu() - truth).abs().max().item()

    with full_fp32(place):
        full = error()
    assert full < 0.02


# Budgets and what is kept


def planned(model: str, place: str, **options: Any) -> tuple[CheckpointSpec, Plan, int | None]:
    return plan_of(asked(model, place, **options))


def test_a_budget_is_kept_or_refused(model: str, place: str, tmp_path: Path) -> None:
    _, _, least_bytes = planned(model, place, width=1024, height=1024)
    assert least_bytes is not None
    with pytest.raises(BudgetError):
        generate(asked(model, place, width=1024, height=1024, memory_bytes=least_bytes // 2), tmp_path / "p.png")
    pictures = []
    for budget_bytes in (least_bytes, 2 * least_bytes, None):
        request = asked(model, place, width=1024, height=1024, memory_bytes=budget_bytes)
        (result,) = generate(request, tmp_path / f"{budget_bytes}.png")
        if budget_bytes is not None:
            assert result.memory["measured_peak_bytes"] <= budget_bytes
        pictures.append(pixels_of(result.path))
    assert max(far(pictures[0], each) for each in pictures) <= 1


def test_the_share_of_the_device_is_put_back(model: str, place: str, tmp_path: Path) -> None:
    _, _, least_bytes = planned(model, place)
    torch.cuda.set_per_process_memory_fraction(0.5, place)
    try:
        generate(asked(model, place, memory_bytes=least_bytes), tmp_path / "p.png")
        assert torch.cuda.get_per_process_memory_fraction(place) == pytest.approx(0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place)


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_five_calls_have_one_plan_and_one_peak(model: str, place: str, budget: str | None) -> None:
    scroll = Handscroll.from_pretrained(model, device=place, precision="fp32", memory=budget)
    plans, peaks = [], []
    for seed in range(5):
        torch.cuda.reset_peak_memory_stats(place)
        picture = scroll(PROMPT, width=256, height=256, steps=2, seed=seed)
        picture.numpy()
        plans.append(dataclasses.replace(picture.plan, seeds=()))
        peaks.append(torch.cuda.max_memory_allocated(place))
    assert len(set(plans)) == 1
    assert max(peaks[1:]) - min(peaks[1:]) <= MIB
    assert max(peaks) <= plans[0].planned_peak_bytes  # type: ignore[operator]


def test_pinned_memory_is_given_back(place: str) -> None:
    with torch.cuda.device(place):
        held = torch.empty(100 * MIB, dtype=torch.uint8, pin_memory=True)
    del held
    empty_pinned_cache()
    stats = torch.cuda.host_memory_stats()
    assert stats["allocated_bytes.current"] < 64 * MIB


# Ways that only a tight device takes: the same picture by each of them


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], None]:
    """Has every stage put its maps somewhere, as on a device without room."""

    def put(store: Store) -> None:
        made = maps.new_map
        monkeypatch.setattr(session, "new_map", lambda _, height, scratch: made(store, height, scratch))
        monkeypatch.setattr(
            decode, "map_maker", lambda stage, scratch: lambda index, height: made(store, height, scratch)
        )

    return put


@pytest.mark.parametrize("store", ["host", "disk"])
def test_maps_elsewhere_change_no_bit(
    model: str, place: str, tmp_path: Path, spilling: Callable[[Store], None], store: Store
) -> None:
    (kept,) = generate(asked(model, place), tmp_path / "kept.png")
    spilling(store)
    (spilled,) = generate(asked(model, place), tmp_path / "spilled.png")
    assert kept.path.read_bytes() == spilled.path.read_bytes()


def test_layers_that_pass_through_pinned_memory_change_no_bit(
    miniature: Miniature, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = str(miniature("1.6b", transformer={"num_layers": 7}))
    (resident,) = generate(asked(deep, place), tmp_path / "resident.png")
    made = session.Session.open_transformer

    for host_layers in (0, 3, 7):

        def streamed(self: Any, plan: Plan, host_layers: int = host_layers) -> Any:
            assert plan.denoise is not None
            denoise = dataclasses.replace(plan.denoise, resident_layers=0, host_layers=host_layers)
            return made(self, dataclasses.replace(plan, denoise=denoise, kept=()))

        monkeypatch.setattr(session.Session, "open_transformer", streamed)
        (passed,) = generate(asked(deep, place), tmp_path / f"{host_layers}.png")
        assert passed.path.read_bytes() == resident.path.read_bytes()


# Growth, resuming, retrying, writing


def test_a_picture_grows_on_the_device_as_on_a_cpu(model: str, place: str, tmp_path: Path) -> None:
    grown = {"width": 256, "height": 256, "steps": 5, "compose_px": 128}
    (here,) = generate(asked(model, "cpu", **grown), tmp_path / "cpu.png")
    (there,) = generate(asked(model, place, **grown), tmp_path / "cuda.png")
    assert here.composed == there.composed == "128x128"
    assert far(pixels_of(here.path), pixels_of(there.path)) <= 2


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(model: str, place: str, tmp_path: Path, stage: str) -> None:
    (whole,) = generate(asked(model, place, steps=6), tmp_path / "whole.png")

    def stop(event: Progress) -> None:
        if event.stage == stage and event.done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(asked(model, place, steps=6), tmp_path / "p.png", on_event=stop)
    if (tmp_path / "p.png.run").exists():
        (result,) = resume(tmp_path / "p.png")
    else:  # too short for a state to have been worth saving
        (result,) = generate(asked(model, place, steps=6), tmp_path / "p.png")
    assert result.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_stage_that_ran_out_of_memory_is_tried_again(
    model: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    options = {"width": 512, "height": 512}
    (whole,) = generate(asked(model, place, **options), tmp_path / "whole.png")
    module: Any = session if stage == "denoise" else decode
    name = "predict" if stage == "denoise" else "decoder_rows"
    made, failures = getattr(module, name), iter([True])

    def runs_out_once(*given: Any, **more: Any) -> Any:
        if next(failures, False):
            torch.empty(2**50, dtype=torch.uint8, device=place)
        return made(*given, **more)

    monkeypatch.setattr(module, name, runs_out_once)
    notices: list[str] = []
    (again,) = generate(
        asked(model, place, **options),
        tmp_path / "again.png",
        on_event=lambda event: notices.append(event.detail) if event.stage == "notice" else None,
    )
    assert any("out of memory" in notice for notice in notices)
    assert far(pixels_of(again.path), pixels_of(whole.path)) <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_encoded_beside_the_device_it_is_the_file_that_is_encoded_afterwards(
    model: str, place: str, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handscroll import pipeline

    latent = tmp_path / "l.safetensors"
    (beside,) = generate(asked(model, place, height=160), tmp_path / f"beside{suffix}", save_latent=latent)
    from handscroll.pictures.writing import write_image as write

    monkeypatch.setattr(pipeline, "write_image", lambda *given, **more: write(*given, **{**more, "beside": False}))
    after = decode_latent(latent, tmp_path / f"after{suffix}", device=place)
    assert after.path.read_bytes() == beside.path.read_bytes()


# The drop-in


def test_an_attached_autoencoder_is_the_stock_one(place: str) -> None:
    import miniatures

    torch.manual_seed(0)
    stock = miniatures.make_autoencoder().eval().to(place)
    latent, image = torch.randn(1, 32, 6, 5, device=place), torch.rand(1, 3, 128, 96, device=place)
    with torch.no_grad():
        with full_fp32(place):
            picture, code = stock.decode(latent).sample, stock.encode(image).latent
        handscroll.attach(stock, memory="512MiB")
        before = flags()
        ours, our_code = stock.decode(latent).sample, stock.encode(image).latent
        assert flags() == before
    assert (ours - picture).abs().max().item() <= 1e-4
    assert (our_code - code).abs().max().item() <= 1e-3
    assert ours.device == torch.device(place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", [(256, 320), (640, 256)])
def test_an_attached_autoencoder_keeps_its_memory(place: str, dtype: torch.dtype, pixels: tuple[int, int]) -> None:
    from diffusers import AutoencoderDC

    from handscroll.models.autoencoder import F32C32_SANA

    torch.manual_seed(0)
    model = AutoencoderDC(**dataclasses.asdict(F32C32_SANA)).eval().requires_grad_(False).to(place, dtype)
    latent = torch.randn(1, 32, pixels[0] // 32, pixels[1] // 32, device=place, dtype=dtype)
    image = torch.rand(1, 3, *pixels, device=place, dtype=dtype)
    allowed_bytes = 450 * MIB
    fraction = torch.cuda.get_per_process_memory_fraction(place)
    handscroll.attach(model, memory=allowed_bytes)
    for call, given in ((model.decode, latent), (model.encode, image)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
        held_bytes = torch.cuda.memory_reserved(place)
        result = call(given, return_dict=False)[0]
        assert torch.cuda.max_memory_reserved(place) - held_bytes <= allowed_bytes + result.nbytes
        assert torch.cuda.get_per_process_memory_fraction(place) == pytest.approx(fraction)


def test_hardware_counts_what_this_process_reserves(place: str) -> None:
    free_bytes = device.find_hardware(place).free_bytes
    held = torch.empty(256 * MIB, dtype=torch.uint8, device=place)
    found = device.find_hardware(place)
    assert found.base_bytes is not None
    assert found.base_bytes >= held.nbytes
    assert free_bytes is not None
    assert found.free_bytes is not None
    assert abs(found.free_bytes - free_bytes) < 64 * MIB
