"""Each Triton kernel against the operators that it stands for.

Without a device the kernels run in Triton's interpreter, which must be asked for before Triton is imported: an ordinary
run of the tests starts another of this file, with TRITON_INTERPRET=1. There the tests below are collected for the CPU,
elsewhere for CUDA devices (`-m gpu`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handscroll.banded import backend, triton_kernels

IMPORTED_TRITON = "triton" in sys.modules
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES: list[Any] = ["cpu"]
if not INTERPRETS:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    DEVICES = [pytest.param("cuda", marks=[pytest.mark.gpu, absent])]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
on_devices = pytest.mark.parametrize("device", DEVICES)
of_all_types = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _mended_interpreter() -> Iterator[None]:
    """What Triton's interpreter does otherwise than devices, and in old versions not with a new numpy.

    It cuts off what devices round to bf16, and multiplies matrices of bf16 as if they were integers. Until Triton 3.7
    it takes a loop's bounds from arrays in a way that numpy 2.4 refuses.
    """
    if not INTERPRETS:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch_tensor, cast, dot = (
        interpreter._patch_lang_tensor,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
    )

    def patch_tensor_mended(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def widened(data: np.ndarray) -> np.ndarray:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)

    def cast_mended(self: Any, source: Any, target_type: Any) -> Any:
        types = (source.dtype.scalar, target_type.scalar)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target_type)

    def dot_mended(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(widened(each.data), tl.float32) if each.dtype.scalar == tl.bfloat16 else each
            for each in (a, b)
        )
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_mended)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_mended)
        patch.setattr(InterpreterBuilder, "create_dot", dot_mended)
        yield


def drawn(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


def some_rows(strip: Tensor) -> Tensor:
    """The same strip as part of a taller one, whose rows of one batch do not follow those of another."""
    return F.pad(strip, (0, 0, 0, 0, 1, 2))[:, 1 : 1 + strip.shape[1]]


def some_channels(strip: Tensor) -> Tensor:
    return F.pad(strip, (8, 16))[..., 8 : 8 + strip.shape[-1]]


def assert_rounds_as(ours: Tensor, reference: Tensor) -> None:
    """Equal but for the last bit, and that seldom: where the order of a sum made the difference before rounding."""
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    else:
        # Two roundings, of which the first went the other way, are up to four steps of the smaller result.
        step = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, reference, rtol=2 * step, atol=2 * step)
        assert (ours != reference).float().mean().item() <= 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Norms


@on_devices
@of_all_types
@pytest.mark.parametrize(
    ("channels", "rows", "activation", "adds"),
    [
        (24, 3, None, True),
        (24, 1, "silu", False),
        (128, 7, "relu", True),
        (1152, 1, None, True),
        (2240, 1, "silu", True),
        (6000, 1, None, False),
    ],
)
def test_rms_norm(
    device: str, dtype: torch.dtype, channels: int, rows: int, activation: str | None, adds: bool
) -> None:
    width = 5 if channels < 1000 else 2
    strip = drawn(2, rows, width, channels, dtype=dtype, device=device, scale=3.0)
    weight, bias = (drawn(channels, dtype=dtype, device=device) for _ in range(2))
    residual = drawn(2, rows, width, channels, dtype=dtype, device=device) if adds else None
    expected = backend.rms_norm_(strip.clone(), weight, bias, 1e-5)
    if activation is not None:
        expected = getattr(F, activation)(expected)
    if residual is not None:
        expected = expected + residual
    given = some_rows(strip)
    before = given.clone()
    residual = None if residual is None else some_rows(residual)
    assert_rounds_as(triton_kernels.rms_norm(given, weight, bias, 1e-5, residual, activation), expected)
    assert torch.equal(given, before)
    in_place = triton_kernels.rms_norm(given, weight, bias, 1e-5, residual, activation, out=given)
    assert in_place is given
    assert_rounds_as(given, expected)


@on_devices
def test_rms_norm_without_weights_of_some_channels(device: str) -> None:
    strip = drawn(2, 3, 5, 24, dtype=torch.float32, device=device)
    expected = backend.rms_norm_(strip.clone(), None, None, 1e-2)
    assert_rounds_as(triton_kernels.rms_norm(some_channels(strip), None, None, 1e-2), expected)


@on_devices
@of_all_types
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_norms_pass_on_what_is_not_finite(device: str, dtype: torch.dtype) -> None:
    strip = drawn(1, 1, 3, 24, dtype=dtype, device=device)
    strip[0, 0, 1, 5] = torch.nan
    strip[0, 0, 2, 5] = torch.inf
    modulation = drawn(1, 1, 1, 24, dtype=dtype, device=device)
    for normed in (
        triton_kernels.rms_norm(strip, None, None, 1e-5, activation="relu"),
        triton_kernels.rms_norm(strip, None, None, 1e-5, activation="silu"),
        triton_kernels.layer_norm_modulate(strip, modulation, modulation, 1e-6),
    ):
        assert normed[0, 0, 0].isfinite().all()
        assert normed[0, 0, 1].isnan().all()
        assert normed[0, 0, 2, 5].isnan()


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows"), [(24, 3), (128, 7), (1152, 1), (2240, 1)])
def test_layer_norm_modulate(device: str, dtype: torch.dtype, channels: int, rows: int) -> None:
    # Sana's residual stream is far from centred.
    width = 5 if channels < 1000 else 2
    strip = drawn(2, rows, width, channels, dtype=dtype, device=device, scale=3.0) + 7
    modulation = drawn(2, 6, 1, 1, channels, dtype=dtype, device=device)
    shift, scale = modulation.unbind(1)[1], 1 + modulation.unbind(1)[2]
    expected = F.layer_norm(strip, (channels,), eps=1e-6).mul_(scale).add_(shift)
    given = some_rows(strip)
    assert_rounds_as(triton_kernels.layer_norm_modulate(given, shift, scale, 1e-6), expected)
    assert torch.equal(given, strip)
    assert triton_kernels.layer_norm_modulate(given, shift, scale, 1e-6, out=given) is given
    assert_rounds_as(given, expected)


@on_devices
def test_a_pixel_has_the_same_bits_in_every_strip(device: str) -> None:
    strip = drawn(1, 3, 5, 2240, dtype=torch.bfloat16, device=device)
    modulation = drawn(1, 1, 1, 2240, dtype=torch.bfloat16, device=device)
    for run in (
        lambda rows: triton_kernels.rms_norm(rows, None, None, 1e-6),
        lambda rows: triton_kernels.layer_norm_modulate(rows, modulation, modulation, 1e-6),
    ):
        assert torch.equal(run(strip)[:, 1:2], run(strip[:, 1:2]))


# ---------------------------------------------------------------------------------------------------------------------
# Gates


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows"), [(24, 3), (1152, 2), (2240, 1)])
def test_gate_add(device: str, dtype: torch.dtype, channels: int, rows: int) -> None:
    out, residual = (drawn(2, rows, 5, channels, dtype=dtype, device=device) for _ in range(2))
    gate = drawn(2, 6, 1, 1, channels, dtype=dtype, device=device).unbind(1)[2]
    for limit in (None, 0.5):
        expected = (out if limit is None else out.clamp(-limit, limit)) * gate + residual
        ours = some_rows(out)
        assert triton_kernels.gate_add_(ours, gate, some_rows(residual), limit) is ours
        # The same roundings of the same two operations: the same bits.
        assert torch.equal(ours, expected)


@on_devices
@of_all_types
def test_a_limit_passes_on_nan(device: str, dtype: torch.dtype) -> None:
    out = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device, dtype=dtype).view(1, 1, 1, 4)
    one = torch.ones(1, 1, 1, 4, device=device, dtype=dtype)
    triton_kernels.gate_add_(out, one, torch.zeros_like(out), 65504.0)
    assert out[..., 0].isnan().all()
    assert out[..., 1:].isfinite().all()


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "rows", "width"), [(24, 1, 1), (24, 9, 7), (64, 2, 8), (80, 1, 9)])
def test_depthwise_gate(device: str, dtype: torch.dtype, channels: int, rows: int, width: int) -> None:
    strip = drawn(2, rows + 2, width, 2 * channels, dtype=dtype, device=device)
    weight = drawn(2 * channels, 1, 3, 3, dtype=dtype, device=device)
    bias = drawn(2 * channels, dtype=dtype, device=device)

    def expected(bias: Tensor | None) -> Tensor:
        image = strip.float().permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(allow_tf32=False):
            convolved = F.conv2d(image, weight.float(), bias, padding=(0, 1), groups=2 * channels)
        return backend.gate_(convolved.to(dtype).permute(0, 2, 3, 1).contiguous())

    # Values and gates in one strip, as the decoder has them, and each in its own, as the transformer has.
    ours = triton_kernels.depthwise_gate(*some_rows(strip).chunk(2, dim=-1), weight.chunk(2), bias.chunk(2))
    assert_rounds_as(ours, expected(bias.float()))
    out = some_channels(torch.zeros_like(strip[:, 2:, :, :channels]))
    values, gates = (half.contiguous() for half in strip.chunk(2, dim=-1))
    assert triton_kernels.depthwise_gate(values, gates, weight.chunk(2), (None, None), out) is out
    assert_rounds_as(out, expected(None))


@on_devices
def test_depthwise_gate_has_the_same_bits_at_every_height(device: str) -> None:
    strip = drawn(1, 9, 5, 48, dtype=torch.bfloat16, device=device)
    weight = drawn(48, 1, 3, 3, dtype=torch.bfloat16, device=device)

    def gated(strip: Tensor) -> Tensor:
        return triton_kernels.depthwise_gate(*strip.chunk(2, dim=-1), weight.chunk(2), (None, None))

    rows = [gated(strip[:, row : row + 3]) for row in range(7)]
    assert torch.equal(torch.cat(rows, dim=1), gated(strip))


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention

HEADS = [
    # heads, channels of keys, of values, rows, width
    (3, 32, 32, 2, 70),
    (2, 8, 8, 3, 7),
    (1, 4, 4, 1, 1),
    (2, 24, 40, 2, 33),
    (1, 112, 112, 1, 19),
]


def exact_sums(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    positive = keys.double().relu()
    return torch.einsum("bnwhk,bnwhv->bhkv", positive, values.double()), positive.sum(dim=(1, 2))


@on_devices
@of_all_types
@pytest.mark.parametrize(("heads", "key_dim", "value_dim", "rows", "width"), HEADS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_sums(
    device: str,
    dtype: torch.dtype,
    heads: int,
    key_dim: int,
    value_dim: int,
    rows: int,
    width: int,
    interleaved: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_kernels, "SUM_PROGRAMS", 4 * heads)  # two parts for each head, where there are pixels
    if interleaved:  # as the autoencoder's: a head's keys and values side by side, in some rows of a taller strip
        both = some_rows(drawn(2, rows, width, heads * (key_dim + value_dim), dtype=dtype, device=device))
        keys, values = both.unflatten(-1, (heads, -1)).split([key_dim, value_dim], dim=-1)
    else:
        keys = drawn(2, rows, width, heads, key_dim, dtype=dtype, device=device)
        values = drawn(2, rows, width, heads, value_dim, dtype=dtype, device=device)
    start = drawn(2, heads, key_dim, value_dim, dtype=torch.float32, device=device)
    start_keys = drawn(2, heads, key_dim, dtype=torch.float32, device=device)
    products, normaliser = start.clone(), start_keys.clone()
    triton_kernels.attention_sums(keys, values, products, normaliser)
    exact, exact_keys = exact_sums(keys, values)
    torch.testing.assert_close(products.double(), exact + start, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normaliser.double(), exact_keys + start_keys, rtol=1e-5, atol=1e-5)

    if device == "cpu":
        return  # one program after another
    again, again_normaliser = start.clone(), start_keys.clone()
    triton_kernels.attention_sums(keys, values, again, again_normaliser)
    assert torch.equal(again, products)
    assert torch.equal(again_normaliser, normaliser)


@on_devices
@of_all_types
@pytest.mark.parametrize(("heads", "key_dim", "value_dim", "rows", "width"), HEADS)
def test_attention_apply(
    device: str, dtype: torch.dtype, heads: int, key_dim: int, value_dim: int, rows: int, width: int
) -> None:
    queries = drawn(2, rows, width, 2, heads, key_dim, dtype=dtype, device=device)[:, :, :, 1]
    queries[0, 0, 0] = -1.0  # nothing is asked for: only eps is left to divide by
    sums = backend.LinearAttentionSums()
    sums.add(queries.flip(2), drawn(2, rows, width, heads, value_dim, dtype=dtype, device=device))
    assert sums.products is not None
    assert sums.keys is not None
    expected = sums.apply_(queries.clone(), 1e-15)
    ours = triton_kernels.attention_apply(queries, sums.products, sums.keys, 1e-15)
    assert_rounds_as(ours, expected)
    if key_dim == value_dim:
        written = triton_kernels.attention_apply(queries, sums.products, sums.keys, 1e-15, out=queries)
        assert written is queries
        assert torch.equal(queries, ours)


@on_devices
@of_all_types
def test_attention_passes_on_nan(device: str, dtype: torch.dtype) -> None:
    keys = drawn(1, 2, 5, 2, 8, dtype=dtype, device=device)
    keys[0, 1, 3, 1, 2] = torch.nan
    products, normaliser = torch.zeros(1, 2, 8, 8, device=device), torch.zeros(1, 2, 8, device=device)
    triton_kernels.attention_sums(keys, keys.abs().nan_to_num(), products, normaliser)
    assert products[0, 0].isfinite().all()
    assert products[0, 1, 2].isnan().all()
    assert normaliser[0, 1, 2].isnan()
    applied = triton_kernels.attention_apply(keys, products, normaliser)
    assert applied[..., 0, :].isfinite().all()
    assert applied[..., 1, :].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Upsampling


@on_devices
@of_all_types
@pytest.mark.parametrize(("channels", "repeats"), [(24, 2), (24, 4), (24, 1), (40, 8), (136, None)])
def test_upsample_row_phase(device: str, dtype: torch.dtype, channels: int, repeats: int | None) -> None:
    batch, rows, width = 2, 3, 19
    pairs = [drawn(batch, rows, width + 1, 2 * channels, dtype=dtype, device=device) for _ in range(2)]
    source = None
    expected = torch.empty(batch, rows, 2, width, 2, channels, dtype=dtype, device=device)
    for row_phase, pair in enumerate(pairs):
        expected[:, :, row_phase, :, 0] = pair[:, :, :-1, :channels]
        expected[:, :, row_phase, :, 1] = pair[:, :, 1:, channels:]
    expected = expected.view(batch, 2 * rows, 2 * width, channels)
    if repeats is not None:
        source = some_rows(drawn(batch, rows, width, 4 * channels // repeats, dtype=dtype, device=device))
        expected += backend.pixel_shuffle(source.repeat_interleave(repeats, dim=-1))
    out = torch.zeros_like(expected)
    for row_phase, pair in enumerate(pairs):
        triton_kernels.upsample_row_phase(pair, source, repeats or 1, row_phase, out)
    assert torch.equal(out, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The networks with them


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that the networks have called."""
    names: set[str] = set()
    launch = triton_kernels._Kernel.launch

    def noted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.add(kernel.function.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setenv("HANDSCROLL_TRITON", "1")
    monkeypatch.setattr(triton_kernels._Kernel, "launch", noted)
    return names


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ["1.6b", "1.5-1.6b"])
@torch.no_grad()
def test_the_transformer_predicts_the_same(device: str, dtype: torch.dtype, row: str, used: set[str]) -> None:
    import miniatures
    from handscroll.banded.dit import Branch, predict

    model = miniatures.make_transformer(row, num_layers=1).to(device, dtype)
    latent, text = drawn(1, 32, 4, 6, dtype=dtype, device=device), drawn(1, 5, 48, dtype=dtype, device=device)
    branch = Branch(latent, text[..., : model.config.caption_channels], None, torch.tensor([411.0], device=device))
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = model(latent, encoder_hidden_states=branch.text, timestep=branch.timestep, return_dict=False)[0]
    assert not used
    # The second slab and the last band are smaller than the others.
    out = predict(model, [branch], band_rows=3)[0]
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    assert used >= {"_layer_norm_modulate", "_gate_add", "_depthwise_gate", "_attention_sums", "_attention_apply"}
    assert ("_rms_norm" in used) == (model.transformer_blocks[0].attn1.norm_q is not None)


@on_devices
@torch.no_grad()
def test_the_decoder_gives_the_same_rows(device: str, used: set[str]) -> None:
    import miniatures
    from handscroll.banded.dcae import decode_rows

    decoder = miniatures.make_autoencoder().decoder.to(device)
    latent = drawn(1, 32, 3, 3, dtype=torch.float32, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decoder(latent)
        assert not used
        out = torch.cat(list(decode_rows(decoder, latent, 40)), dim=2)
    torch.testing.assert_close(out, expected, atol=2e-5 if device == "cpu" else 1e-4, rtol=0)
    assert used == {
        "_rms_norm",
        "_depthwise_gate",
        "_attention_sums",
        "_add_parts",
        "_attention_apply",
        "_upsample_row_phase",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Where they can run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_strips_may_have_more_elements_than_32_bits_count() -> None:
    strip = torch.zeros(1, 1, 2**20, 2240, dtype=torch.bfloat16, device="cuda")
    end = strip[:, :, -3:]
    end.copy_(torch.randn(end.shape))
    alone = end.clone()
    one = torch.ones(1, 1, 1, 2240, dtype=torch.bfloat16, device="cuda")
    for run in (
        lambda this: triton_kernels.rms_norm(this, None, None, 1e-6, out=this),
        lambda this: triton_kernels.layer_norm_modulate(this, one, one, 1e-6, out=this),
        lambda this: triton_kernels.gate_add_(this, one, this),
        lambda this: triton_kernels.attention_apply(
            this.unflatten(-1, (70, 32)),
            torch.ones(1, 70, 32, 32, device="cuda"),
            torch.ones(1, 70, 32, device="cuda"),
            out=this.unflatten(-1, (70, 32)),
        ),
    ):
        run(strip)
        run(alone)
        assert torch.equal(end, alone)


def test_what_is_available() -> None:
    strip = torch.zeros(1, 1, 1, 16)
    assert triton_kernels.available(strip) == (INTERPRETS and find_spec("triton") is not None)
    assert not triton_kernels.available(strip.double())
    assert not triton_kernels.available(strip.to("meta"))


if INTERPRETS:

    def test_importing_the_kernels_does_not_import_triton() -> None:
        assert not IMPORTED_TRITON

else:

    @needs_triton
    @of_all_types
    def test_kernels_compile_for_an_h100(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Triton's compiler refuses much that its interpreter runs. It needs no device."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        compiled = []

        def compile_only(
            kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, fuses: bool = False, **sizes: Any
        ) -> None:
            assert len(grid) <= 3
            assert all(1 <= count < 2**16 for count in grid[1:])
            signature, constants, attributes = dict.fromkeys(sizes, "constexpr"), dict(sizes), {}
            for index, (name, value) in enumerate(zip(kernel.jitted.arg_names, arguments, strict=False)):
                # As a launch would tell the compiler: what is 1, and what is a multiple of 16.
                is_count = name in triton_kernels._COUNTS
                if value is None or (type(value) is int and value == 1 and not is_count):
                    signature[name], constants[name] = "constexpr", value
                    continue
                kinds: dict[type, str] = {int: "i32", float: "fp32"}
                signature[name] = pointers[value.dtype] if isinstance(value, Tensor) else kinds[type(value)]
                if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not is_count):
                    attributes[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel.jitted, signature, constants, attributes)
            options = {"num_warps": num_warps, "enable_fp_fusion": fuses}
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert binary.metadata.shared <= 227 * 2**10
            compiled.append(kernel)

        monkeypatch.setattr(triton_kernels._Kernel, "launch", compile_only)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        # The shapes of Sana 1.6B at 4096x4096.
        band, channel = empty(2, 4, 128, 2240), empty(2, 1, 1, 2240)
        triton_kernels.rms_norm(band, empty(2240), empty(2240), 1e-5, band, "silu", band)
        triton_kernels.layer_norm_modulate(band, channel, channel, 1e-6)
        triton_kernels.gate_add_(band, channel, band, 65504.0)
        halves, weights = empty(2, 6, 128, 2240).chunk(2, dim=-1), empty(11200, 1, 3, 3)
        triton_kernels.depthwise_gate(*halves, (weights[:1120], weights[5600:6720]), empty(11200)[:2240].chunk(2))
        heads = band.unflatten(-1, (70, 32))
        products, normaliser = empty(2, 70, 32, 32, dtype=torch.float32), empty(2, 70, 32, dtype=torch.float32)
        triton_kernels.attention_sums(heads, heads, products, normaliser)
        triton_kernels.attention_apply(heads, products, normaliser, out=heads)
        triton_kernels.upsample_row_phase(empty(1, 4, 257, 512), empty(1, 4, 256, 512), 2, 1, empty(1, 8, 512, 256))
        every = {value for value in vars(triton_kernels).values() if isinstance(value, triton_kernels._Kernel)}
        assert set(compiled) == every

    @needs_triton
    def test_kernels_agree_in_the_interpreter() -> None:
        out = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert out.returncode == 0, out.stdout + out.stderr
