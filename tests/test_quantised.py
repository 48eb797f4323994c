"""Weights in 8 and 4 bits: their bytes, their numbers, the layers that use them, and the folders that hold them."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from handscroll import Handscroll, Request, generate
from handscroll.banded import quantised as products
from handscroll.banded.transformer import predict
from handscroll.cli.main import run as handscroll
from handscroll.errors import OutputError, UsageError
from handscroll.events import Progress
from handscroll.files import write_whole
from handscroll.models.autoencoder import F32C32_SANA
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.quantisation import STORAGES, Quantisation, form_of, weight_cost
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.precision import Precision, precisions_before, resolve_precision
from handscroll.runtime import device, quantising
from handscroll.runtime.modules import open_module
from handscroll.runtime.quantising import REPORT, quantise_folder
from handscroll.weights.forms import GROUPS, Form, packed_bytes, parts_of
from handscroll.weights.header import read_header
from handscroll.weights.quantised import pack, unpack, views
from handscroll.weights.sources import Source
from handscroll.weights.stream import WeightStream
from quantised_cases import branches_of, packed_of, refused, true_text, true_transformer, widened

Miniature = Callable[..., Path]
FORMS = [Form("int8"), Form("fp8"), *(Form("int4", group) for group in GROUPS)]
CPU_STORAGES = [storage for storage in STORAGES if storage != "fp8"]


# Numbers and bytes


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FORMS), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_a_matrix_errs_by_less_than_its_steps(form: Form, rows: int, groups: int, seed: int, size: float) -> None:
    columns = groups * (form.group or 8)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    packed = packed_of(form, weight)
    made = widened(form, (rows, columns), packed)
    scale = views(form, (rows, columns), packed)["weight_scale"].float().abs()
    step = scale.repeat_interleave(columns // scale.shape[1], dim=1)
    if form.storage == "int8":
        assert ((made - weight).abs() <= 0.5001 * step).all()
    elif form.storage == "fp8":
        assert ((made - weight).abs() <= weight.abs() / 15.9 + step / 500).all()
    else:
        # A scale that leaves the largest out errs less over the group.
        assert float((made - weight).square().sum()) <= float((0.51 * step).square().sum()) + 1e-30
    assert float((made - weight).norm() / weight.norm()) < {"int8": 0.012, "fp8": 0.035, "int4": 0.14}[form.storage]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_are_quantised_each_by_itself(form: Form) -> None:
    weight = torch.randn(7, 256)
    together = views(form, (7, 256), packed_of(form, weight))
    for row in range(7):
        alone = views(form, (1, 256), packed_of(form, weight[row : row + 1]))
        for suffix, part in alone.items():
            assert torch.equal(part.view(torch.uint8), together[suffix][row : row + 1].view(torch.uint8))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros(form: Form) -> None:
    packed = packed_of(form, torch.zeros(3, 128))
    assert not widened(form, (3, 128), packed).any()
    assert views(form, (3, 128), packed)["weight_scale"].all()


def test_numbers_of_4_bits_lie_as_compressed_tensors_reads_them() -> None:
    numbers = torch.randint(0, 16, (5, 64), dtype=torch.int8)
    packed = pack(numbers)
    assert packed.dtype == torch.int32
    for place in range(8):  # the first of eight is lowest
        assert torch.equal((packed >> (4 * place)) & 15, numbers[:, place::8].int())
    assert torch.equal(unpack(packed), numbers - 8)


@given(st.sampled_from(FORMS), st.integers(1, 40), st.integers(1, 20))
def test_bytes_are_the_closed_form(form: Form, rows: int, groups: int) -> None:
    columns = groups * (form.group or 16)
    numbers, scale = parts_of(form, (rows, columns))
    scales = rows * columns // form.group * 2 if form.group else rows * 4
    assert numbers.n_bytes == rows * columns // (2 if form.group else 1)
    assert scale.n_bytes == scales
    assert packed_bytes(form, (rows, columns)) - numbers.n_bytes - scales in range(8)


def test_rows_that_no_group_divides_are_refused_or_left() -> None:
    with pytest.raises(ValueError, match="rows of 80 numbers cannot be cut into groups of 32"):
        parts_of(Form("int4", 32), (4, 80))
    name = "transformer_blocks.3.ff.conv_point.weight"
    assert form_of("transformer", "int4", name, (32, 80, 1, 1)) is None
    assert form_of("transformer", "int4", name, (32, 96, 1, 1)) == Form("int4", 32, 8)
    assert form_of("transformer", "int8", name, (32, 80, 1, 1)) == Form("int8")


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.proj.weight",
        "proj_out.weight",
        "time_embed.linear.weight",
        "transformer_blocks.0.ff.conv_depth.weight",
        "transformer_blocks.0.attn1.norm_q.weight",
        "transformer_blocks.0.scale_shift_table",
        "transformer_blocks.0.ff.conv_inverted.bias",
        "caption_projection.linear_1.weight",
    ],
)
def test_what_pictures_are_sensitive_to_stays(name: str) -> None:
    assert all(form_of("transformer", storage, name, (64, 64)) is None for storage in STORAGES)


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outs", "channels"), [(24, 40), (33, 2240), (16, 5600)])
def test_sums_of_int8_are_exact(outs: int, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randint(-127, 128, (50, channels), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outs, channels), dtype=torch.int8)
    numbers[0], weight[0] = 127, -127  # the largest sum that there is
    exact = (numbers.double() @ weight.t().double()).long()
    assert torch.equal(products.sums_by_fp32(numbers, weight).long(), exact)
    assert torch.equal(torch._int_mm(numbers, weight.t()).long(), exact)
    row_block, scale, bias = torch.randn(2, 5, 5, channels, dtype=dtype), torch.rand(outs, 1), torch.randn(outs)
    outcomes = []
    for fast in (True, False):
        monkeypatch.setattr(products, "_multiplies_int8", lambda fast=fast: fast)
        outcomes.append(products.matrix(weight, scale, bias.to(dtype), silu=True)(row_block))
    outcomes.append(products.matrix(weight, scale, bias.to(dtype), silu=True, plain=True)(row_block))
    assert all(torch.equal(outcomes[0], each) for each in outcomes)
    for rows in (1, 2, 4):  # and the same for row blocks of any height
        parts = [
            products.matrix(weight, scale, bias.to(dtype), silu=True)(part) for part in row_block.split(rows, dim=1)
        ]
        assert torch.equal(torch.cat(parts, dim=1), outcomes[0])


def test_positions_of_zeros_and_of_infinities() -> None:
    weight, scale = torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8, 1)
    row_block = torch.zeros(1, 1, 3, 16)
    row_block[0, 0, 1, 3] = torch.inf
    row_block[0, 0, 2, 3] = torch.nan
    out = products.matrix(weight, scale, None)(row_block)
    assert not out[0, 0, 0].any()
    assert not out[0, 0, 1:].isfinite().any()  # not hidden by a cast to whole numbers


@pytest.mark.parametrize("storage", CPU_STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", ["1.6b", "1.5-1.6b", "sprint-1.6b"])
def test_a_transformer_predicts_the_same_bits_however_it_is_run(
    miniature: Miniature, storage: str, dtype: torch.dtype, row: str
) -> None:
    spec = CheckpointSpec.from_folder(miniature(row))
    resident: Any
    passing: Any
    plain: Any
    resident, stream = open_module(
        spec, "transformer", dtype=dtype, device="cpu", leave={"patch_embed.pos_embed"}, storage=storage
    )
    stream.make_resident(resident)
    passing, other = open_module(
        spec, "transformer", dtype=dtype, device="cpu", leave={"patch_embed.pos_embed"}, storage=storage
    )
    blocks: Any = passing.transformer_blocks
    other.make_resident(passing, but=blocks)
    given = branches_of(resident, dtype)
    kept: Any = resident.transformer_blocks

    def of_resident(index: int) -> Any:
        return materialized(stream, kept[index])

    def of_passing(index: int) -> Any:
        return materialized(other, blocks[index])

    expected = predict(resident, given, layer=of_resident, band_rows=4)
    for rows in (1, 3, None):
        for model, layer in ((resident, of_resident), (passing, of_passing)):
            for lay_out in (False, True):
                made = predict(model, given, layer=layer, band_rows=rows, lay_out=lay_out)
                assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    plain, plain_stream = open_module(spec, "transformer", dtype=dtype, device="cpu", leave={"patch_embed.pos_embed"})
    plain_stream.make_resident(plain)
    for ours, theirs in zip(expected, predict(plain, given), strict=True):
        off = float((ours - theirs).norm() / theirs.norm())
        assert 0 < off < (0.15 if storage == "int4" else 0.03)
    for block in blocks:
        assert block.attn1.to_q.weight.is_meta
        assert not hasattr(block.attn1.to_q, "weight_scale")


@contextmanager
def materialized(stream: WeightStream, block: Any) -> Iterator[Any]:
    """A layer for as long as it is used."""
    with stream.materialize(block):
        yield block


# What is held


@pytest.mark.parametrize("storage", ["", *CPU_STORAGES])
def test_plan_and_stream_count_the_same_bytes(miniature: Miniature, storage: str) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    module, stream = open_module(spec, "transformer", dtype=torch.bfloat16, device="cpu", storage=storage)
    blocks: Any = module.transformer_blocks
    cost = weight_cost(
        "transformer", storage, spec.transformer.block_matrices(), spec.transformer.block_parameter_count, 2
    )
    assert stream.bytes_of(blocks[0]) == cost.working_bytes
    assert stream.sent_bytes_of(blocks[0]) == cost.resident_bytes
    stream.make_resident(blocks[1])
    assert stream.held_bytes == cost.resident_bytes
    text, text_stream = open_module(spec, "text_encoder", dtype=torch.bfloat16, device="cpu", storage=storage)
    layers: Any = text.layers
    matrices, parameters = spec.text_encoder.layer_matrices(), spec.text_encoder.layer_parameter_count
    of_text = weight_cost("text_encoder", "int8-weights" if storage == "int8" else storage, matrices, parameters, 2)
    assert text_stream.sent_bytes_of(layers[0]) == of_text.resident_bytes
    assert text_stream.bytes_of(layers[0]) == of_text.working_bytes


def test_sizes_of_the_official_models() -> None:
    small, large, text = true_transformer("sana-1.6b-4k"), true_transformer("sana-1.5-4.8b"), true_text()

    def whole(spec: TransformerSpec, storage: str) -> float:
        layer = weight_cost("transformer", storage, spec.block_matrices(), spec.block_parameter_count, 2)
        rest = (spec.parameter_count - spec.num_layers * spec.block_parameter_count) * 2
        return (rest + spec.num_layers * layer.resident_bytes) / 2**30

    def of_text(spec: TextEncoderSpec, storage: str) -> float:
        layer = weight_cost("text_encoder", storage, spec.layer_matrices(), spec.layer_parameter_count, 2)
        return spec.num_hidden_layers * layer.resident_bytes / 2**30

    assert whole(small, "int4") <= 0.95
    assert of_text(text, "int4") + 300 * 2304 * 2 / 2**30 <= 1.0
    assert whole(small, "int8") == pytest.approx(1.55, abs=0.02)
    assert whole(large, "int4") == pytest.approx(2.65, abs=0.01)
    assert F32C32_SANA.latent_channels == 32


# Folders


def parts_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("storage", CPU_STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_a_folder_gives_the_bytes_of_quantising_while_reading(
    miniature: Miniature, tmp_path: Path, storage: str, dtype: torch.dtype, shard: str | None
) -> None:
    options: dict[str, Any] = {} if shard is None else {"max_shard_size": shard}
    model = miniature("1.6b", dtype=dtype, **options)
    text = "int4" if storage == "int4" else "int8-weights"
    report = quantise_folder(
        CheckpointSpec.from_folder(model), {"transformer": storage, "text_encoder": text}, tmp_path / "small"
    )
    assert not (tmp_path / "small.part").exists()
    spec = CheckpointSpec.from_folder(tmp_path / "small")
    found = spec.quantisation_of("transformer")
    assert found is not None
    expected = Quantisation(storage, "fp32" if dtype == torch.float32 else "bf16", corrected=storage == "int4")
    assert dataclasses.replace(found, layers=()) == expected
    assert len(found.layers) == 1
    assert spec.n_bytes == report.bytes_after < report.bytes_before
    assert json.loads((tmp_path / "small" / REPORT).read_text())["bytes_after"] == report.bytes_after
    assert not list((tmp_path / "small").rglob("*.report.json"))
    asked: dict[str, Any] = {"width": 96, "height": 64, "steps": 2, "seed": 1, "device": "cpu"}
    (reading,) = generate(
        Request("a lake", model=str(model), **{**asked, "precision": storage, "text_precision": text}),
        tmp_path / "reading.png",
    )
    (stored,) = generate(Request("a lake", model=str(tmp_path / "small"), **asked), tmp_path / "stored.png")
    pixels = [scroll_pixels(path) for path in (reading.path, stored.path)]
    assert np.array_equal(*pixels)
    assert reading.exact is stored.exact is False
    assert reading.precision == stored.precision
    assert f"transformer {storage}+" in reading.precision


def scroll_pixels(path: Path) -> Any:
    import pyvips

    return pyvips.Image.new_from_file(str(path)).numpy()


def test_budgets_strips_and_resuming_change_no_bit(miniature: Miniature, tmp_path: Path) -> None:
    model = str(miniature("1.6b", transformer={"num_layers": 4}))
    for storage in CPU_STORAGES:
        asked: dict[str, Any] = {
            "width": 160,
            "height": 96,
            "steps": 3,
            "seed": 5,
            "device": "cpu",
            "precision": storage,
        }
        request = Request("a lake", model=model, **asked)
        (whole,) = generate(request, tmp_path / f"{storage}.png")

        def interrupt(event: Progress) -> None:
            if event.stage == "denoise" and event.done > 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(request, tmp_path / f"{storage}-2.png", on_event=interrupt)
        (again,) = generate(request, tmp_path / f"{storage}-2.png")
        assert whole.path.read_bytes() == again.path.read_bytes()
        strip = Request("a lake", model=model, strip_rows=1, memory_bytes=2**31, **asked)
        (tight,) = generate(strip, tmp_path / f"{storage}-3.png")
        assert np.array_equal(scroll_pixels(tight.path), scroll_pixels(whole.path))


def test_a_python_class_takes_both_precisions(miniature: Miniature) -> None:
    model = miniature("1.6b")
    scroll = Handscroll.from_pretrained(model, device="cpu", precision="int8", text_precision="int4")
    picture = scroll("a lake", width=64, height=64, steps=1, seed=1)
    assert picture.plan.precision.transformer_storage == "int8"
    assert picture.plan.precision.text_encoder_storage == "int4"
    assert not picture.plan.exact


def test_what_weights_are_kept_in_and_what_is_computed_in_are_two_things(miniature: Miniature) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    for asked, told in (
        ("int8", "text encoder fp32, transformer int8+fp32, autoencoder fp32"),
        ("int8+bf16", "text encoder bf16, transformer int8+bf16, autoencoder bf16"),
        ("int4+fp16", "text encoder bf16, transformer int4+fp16, autoencoder bf16"),
    ):
        assert str(resolve_precision(spec, asked, "cpu", bf16_is_faster=False)) == told


def test_precisions_are_told_and_read_again() -> None:
    precision = Precision("bf16", "bf16", "fp32", "", "int4", "int8")
    assert str(precision) == "text encoder int4+bf16, transformer int8+bf16, autoencoder fp32"
    assert precisions_before(str(precision)) == ("int4+bf16", "int8+bf16")
    assert Precision("fp32", "fp32", "fp32").after(str(precision)) == precision
    assert precisions_before("text encoder int3+bf16, transformer int8+bf16, autoencoder fp32") is None


# What cannot be


def test_what_is_quantised_is_not_quantised_again(small: Path, tmp_path: Path) -> None:
    spec = CheckpointSpec.from_folder(small)
    with pytest.raises(UsageError, match="its transformer is stored in int4 already and cannot be made int8"):
        quantise_folder(spec, {"transformer": "int8"}, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert "is stored in int4 already" in refused(small, precision="int8")


def test_other_things_that_are_there_are_left(miniature: Miniature, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        quantise_folder(CheckpointSpec.from_folder(miniature("1.6b")), {"transformer": "int8"}, tmp_path / "there")


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_scales_that_are_none(miniature: Miniature, tmp_path: Path, value: float, storage: str) -> None:
    folder = tmp_path / "small"
    quantise_folder(CheckpointSpec.from_folder(miniature("1.6b")), {"transformer": storage}, folder)
    tensors = parts_in(folder)
    tensors["transformer_blocks.1.attn1.to_v.weight_scale"][3] = value
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    said = refused(folder)
    assert "transformer_blocks.1.attn1.to_v.weight_scale" in said
    assert "a scale of zero, NaN or infinity" in said


def test_groups_that_do_not_divide(small: Path) -> None:
    tensors = parts_in(small)
    name = "transformer_blocks.0.attn1.to_q.weight_scale"
    tensors[name] = torch.ones(32, 3, dtype=torch.bfloat16)
    save_file(tensors, small / "transformer" / "diffusion_pytorch_model.safetensors")
    assert "has 3 scales for rows of 32; handscroll reads groups of 128, 64, 32" in refused(small)


@pytest.mark.parametrize("gone", ["weight_scale", "weight_packed"])
def test_parts_that_are_missing(small: Path, gone: str) -> None:
    tensors = parts_in(small)
    del tensors[f"transformer_blocks.0.attn1.to_q.{gone}"]
    save_file(tensors, small / "transformer" / "diffusion_pytorch_model.safetensors")
    said = refused(small)
    assert "attn1.to_q" in said
    assert "missing" in said


@pytest.mark.parametrize(
    "change",
    [
        {"format": "marlin-24"},
        {"config_groups": {}},
        {"config_groups": {"a": 3}},
        {"config_groups": None},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": [], "symmetric": True}}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 3, "type": "int", "symmetric": True}}}},
        {"handscroll": {"dtype": "fp64"}},
        {"quant_method": "bitsandbytes"},
        {"quant_method": 7},
    ],
)
def test_metadata_that_is_not_read(small: Path, change: dict[str, Any]) -> None:
    file = small / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    said = refused(small)
    assert said.startswith(str(file))


def test_weights_that_are_not_what_the_config_says(small: Path) -> None:
    file = small / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    assert "compressed-tensors" in refused(small)


def test_fp8_needs_a_device_that_has_it(miniature: Miniature) -> None:
    said = refused(miniature("1.6b"), precision="fp8")
    assert "fp8" in said
    assert "int8" in said


def test_a_full_disk_leaves_no_folder_and_the_next_run_goes_on(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = miniature("1.6b", max_shard_size="20KB")
    spec = CheckpointSpec.from_folder(model)
    assert len(spec.transformer_weights.files) > 2
    write, written = write_whole, []

    def fails_at_third(path: Path, pieces: Any, **options: Any) -> None:
        if path.suffix == ".safetensors" and "transformer" in path.parts:
            written.append(path)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, pieces, **options)

    monkeypatch.setattr(quantising, "write_whole", fails_at_third)
    with pytest.raises(OutputError, match=r"No space left on device; .*small\.part keeps what is whole"):
        quantise_folder(spec, {"transformer": "int8"}, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    done = {path: path.stat().st_mtime_ns for path in written[:2]}
    quantise_folder(spec, {"transformer": "int8"}, tmp_path / "small")
    for path, modified in done.items():
        assert (tmp_path / "small" / "transformer" / path.name).stat().st_mtime_ns == modified
    quantise_folder(spec, {"transformer": "int8"}, tmp_path / "other")
    for file in sorted((tmp_path / "other").rglob("*")):
        if file.is_file() and file.name != REPORT:
            assert file.read_bytes() == (tmp_path / "small" / file.relative_to(tmp_path / "other")).read_bytes()


def test_no_room_is_said_before_anything_is_made(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 7))
    with pytest.raises(OutputError, match=r"needs .* and 7 bytes are free"):
        quantise_folder(CheckpointSpec.from_folder(miniature("1.6b")), {"transformer": "int8"}, tmp_path / "small")


def test_the_command(miniature: Miniature, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = str(miniature("1.6b")), str(tmp_path / "small")
    assert handscroll(["quantize", model, "--precision", "int8", "--text-precision", "int4", "-o", folder]) == 0
    said = capsys.readouterr()
    assert "transformer: ff.conv_inverted" in said.out
    assert f"{folder}: " in said.out
    assert handscroll(["quantize", model, "--precision", "int8", "-o", f"{folder}2", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["precisions"] == {"transformer": "int8"}
    assert 0 < max(matrix["error"] for matrix in found["matrices"]) < 0.02
    for arguments in (["--precision", "int3"], ["--text-precision", "fp8"], []):
        assert handscroll(["quantize", model, *arguments, "-o", f"{folder}3"]) == 2
        assert not Path(f"{folder}3").exists()
    said = capsys.readouterr()
    assert said.err.count("error:") == 3


def test_info_says_how_a_folder_is_stored(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert handscroll(["info", str(small)]) == 0
    assert "int4+fp32" in capsys.readouterr().out


def test_a_budget_that_is_too_small_names_what_would_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By known figures, without a file of the model. And it is true."""
    monkeypatch.setattr(device, "resident_bytes", lambda: 2**29)  # what this process holds counts, and changes
    asked = ["plan", "a", "--model", "sana-1.6b-4k", "--size", "4096", "--device", "cpu", "--json"]
    least = {}
    for precision in ("fp32", "int8"):
        assert handscroll([*asked, "--precision", precision, "--memory", "1MiB"]) == 3
        least[precision] = json.loads(capsys.readouterr().out)["error"]["minimum_bytes"]
    assert least["int8"] < least["fp32"]
    for budget_bytes, fits in ((least["int8"], True), (least["int8"] - 2**26, False)):
        assert handscroll([*asked, "--precision", "fp32", "--memory", str(budget_bytes)]) == 3
        assert ("it fits with --precision int8" in capsys.readouterr().out) == fits
        assert handscroll([*asked, "--precision", "int8", "--memory", str(budget_bytes)]) == (0 if fits else 3)
        capsys.readouterr()


def test_a_plan_says_what_smaller_weights_would_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "resident_bytes", lambda: 2**29)
    asked = ["plan", "a", "--model", "sana-1.6b-4k", "--size", "2048", "--device", "cpu"]
    assert handscroll([*asked, "--precision", "fp32", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert [each["precision"] for each in plain["smaller_weights"]] == ["int8+fp32", "int4+fp32"]
    for each in plain["smaller_weights"]:
        assert each["planned_peak_bytes"] < plain["memory"]["planned_peak_bytes"]
        assert handscroll([*asked, "--precision", each["precision"], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["memory"]["planned_peak_bytes"] == each["planned_peak_bytes"]
        assert found["smaller_weights"] == []
    assert handscroll([*asked, "--precision", "fp32"]) == 0
    assert "with --precision int8+fp32, close to this picture: peak" in capsys.readouterr().out
    assert handscroll(["plan", "a", "--size", "64", "--device", "cpu"]) == 0
    assert "with --precision" not in capsys.readouterr().out


def test_sources_count_what_they_read(tmp_path: Path) -> None:
    weight = torch.randn(6, 64)
    save_file({"weight": weight}, tmp_path / "w.safetensors")
    (entry,) = read_header(tmp_path / "w.safetensors")
    plain = Source.plain(entry)
    assert plain.stored_bytes == weight.nbytes
    assert plain.wide_bytes(torch.bfloat16) == weight.nbytes // 2
    assert plain.packed_bytes == 0
