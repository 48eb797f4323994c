"""Decisions before a weight is read: pure functions, tested over their combinations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handscroll.errors import SizeError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import Hardware, PlanInputs
from handscroll.plan.precision import Precision, resolve_precision
from handscroll.plan.search import make_plan
from handscroll.request import MAX_SEED, Request
from handscroll.units import parse_bytes, parse_size

Miniature = Callable[..., Path]
CPU = PlanInputs(Hardware("cpu"), tokens=20)


@pytest.fixture
def spec(miniature: Miniature) -> CheckpointSpec:
    return CheckpointSpec.from_folder(miniature("1.6b"))


def published(spec: CheckpointSpec, dtype: str, width_heads: int = 70) -> CheckpointSpec:
    """The spec as if its weights had been published in one dtype, and its transformer were wide."""
    files = {
        f"{name}_weights": dataclasses.replace(
            getattr(spec, f"{name}_weights"),
            tensors=tuple(
                dataclasses.replace(tensor, dtype=dtype) for tensor in getattr(spec, f"{name}_weights").tensors
            ),
        )
        for name in ("transformer", "autoencoder", "text_encoder")
    }
    transformer = dataclasses.replace(
        spec.transformer,
        num_attention_heads=width_heads,
        attention_head_dim=32,
        cross_attention_dim=width_heads * 32,
        num_cross_attention_heads=width_heads,
        cross_attention_head_dim=32,
    )
    return dataclasses.replace(spec, transformer=transformer, **files)


@pytest.mark.parametrize(
    ("dtype", "requested", "device", "bf16_is_faster", "expected"),
    [
        ("bf16", "auto", "cuda:0", False, "bf16 bf16 bf16"),
        ("fp16", "auto", "cuda:0", False, "bf16 fp16 bf16"),
        ("fp32", "auto", "cuda:0", False, "fp32 fp32 fp32"),
        ("bf16", "auto", "cpu", False, "fp32 fp32 fp32"),
        ("bf16", "auto", "cpu", True, "bf16 bf16 bf16"),
        ("fp16", "auto", "cpu", True, "fp32 fp32 fp32"),
        ("bf16", "fp16", "cuda:0", False, "bf16 fp16 bf16"),
        ("fp16", "bf16", "cuda:0", False, "bf16 bf16 bf16"),
        ("bf16", "fp32", "cuda:0", True, "fp32 fp32 fp32"),
    ],
)
def test_precision(
    spec: CheckpointSpec, dtype: str, requested: str, device: str, bf16_is_faster: bool, expected: str
) -> None:
    found = resolve_precision(published(spec, dtype), requested, device, bf16_is_faster)
    assert f"{found.text_encoder} {found.transformer} {found.autoencoder}" == expected
    assert bool(found.note) is (dtype == "fp16" and requested == "bf16")


@pytest.mark.parametrize(
    ("text_encoder", "transformer", "autoencoder", "recommended", "cuda", "fast_cpu"),
    [
        ("bf16", "bf16", "fp32", None, "bf16 bf16 bf16", "bf16 bf16 bf16"),
        ("bf16", "fp16", "fp32", None, "bf16 fp16 bf16", "bf16 fp32 fp32"),
        ("bf16", "fp32", "fp32", None, "bf16 fp32 fp32", "bf16 fp32 fp32"),
        ("fp32", "fp32", "bf16", None, "fp32 fp32 bf16", "fp32 fp32 bf16"),
        ("bf16", "fp32", "fp32", "fp16", "bf16 fp16 bf16", "bf16 fp32 fp32"),
        ("bf16", "fp32", "fp32", "bf16", "bf16 bf16 bf16", "bf16 bf16 bf16"),
    ],
)
def test_precision_of_what_is_stored_in_several(
    spec: CheckpointSpec,
    text_encoder: str,
    transformer: str,
    autoencoder: str,
    recommended: str | None,
    cuda: str,
    fast_cpu: str,
) -> None:
    stored = {"text_encoder": text_encoder, "transformer": transformer, "autoencoder": autoencoder}
    fields = {f"{name}_weights": dtype for name, dtype in stored.items()}
    of = {field: getattr(published(spec, dtype), field) for field, dtype in fields.items()}
    mixed = dataclasses.replace(published(spec, "fp32"), recommended=recommended, **of)
    for device, fast, expected in (("cuda:0", False, cuda), ("cpu", True, fast_cpu), ("cpu", False, "fp32 fp32 fp32")):
        found = resolve_precision(mixed, "auto", device, fast)
        assert f"{found.text_encoder} {found.transformer} {found.autoencoder}" == expected


def test_a_decoder_follows_what_the_latent_was_made_in() -> None:
    plain, mixed = Precision("bf16", "bf16", "bf16", "a note"), Precision("bf16", "fp32", "bf16")
    assert plain.after("fp32") == Precision("fp32", "fp32", "bf16", "a note")
    assert plain.after(str(mixed)) == dataclasses.replace(mixed, note="a note")
    for unknown in ("", "auto", "fp8, fp8", "text encoder bf16", "transformer bf16, autoencoder bf16"):
        assert plain.after(unknown) == plain


def test_narrow_models_gain_nothing_from_bf16_on_a_cpu(spec: CheckpointSpec) -> None:
    assert str(resolve_precision(published(spec, "bf16", width_heads=6), "auto", "cpu", True)) == "fp32"


def test_defaults_come_from_the_checkpoint(spec: CheckpointSpec) -> None:
    plan = make_plan(spec, Request("a lake"), CPU, seed=12)
    assert (plan.width, plan.height) == (spec.native_px, spec.native_px)
    assert (plan.steps, plan.guidance, plan.seeds) == (20, 4.5, (12,))
    assert make_plan(spec, Request("a lake", width=96), CPU, seed=0).height == 96


@settings(deadline=None, max_examples=40)
@given(st.integers(32, 5000), st.integers(32, 5000))
def test_the_latent_holds_the_picture_and_no_more(width: int, height: int) -> None:
    folder = Path(__file__).parents[2] / "src" / "handscroll" / "builtin" / "tiny-landscape"
    plan = make_plan(CheckpointSpec.from_folder(folder), Request("a lake", width=width, height=height), CPU, 0)
    assert (plan.width, plan.height) == (width, height)
    assert 0 <= plan.latent_width * 32 - width < 32
    assert 0 <= plan.latent_height * 32 - height < 32


@pytest.mark.parametrize(
    "options",
    [
        {"width": 31},
        {"height": 1_000_000},
        {"steps": 0},
        {"guidance": float("nan")},
        {"count": 0},
        {"seed": -2},
        {"seed": MAX_SEED, "count": 2},
        {"precision": "fp7"},
        {"text_precision": "fp8"},
        {"device": "tpu"},
        {"decode": "magic"},
        {"strip_rows": 0},
        {"memory_bytes": 0},
        {"memory_bytes": 2**30, "decode": "tiled"},
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        Request("a lake", **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "size"), [("4096", (4096, 4096)), ("64x128", (64, 128)), (" 64 X 96 ", (64, 96))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "31", "1000000", "abc", "", "64x", "-64", "64x64x64", "1e3", "64.5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SizeError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("6GiB", 6 * 2**30), ("800 MiB", 800 * 2**20), ("1.5GB", 1_500_000_000), ("123456", 123456), ("2kb", 2000)],
)
def test_amounts_of_memory(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["lots", "", "-1GiB", "6 G", "GiB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)
