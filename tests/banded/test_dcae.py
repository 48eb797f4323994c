"""Streaming gives what diffusers' own forward gives, for every configuration, strip height and size."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, EfficientViTBlock, ResBlock
from torch import Tensor, nn

from handscroll.banded import dcae
from handscroll.banded.rows import RowMap
from handscroll.runtime.maps import DiskMap, HostMap

EXACT = 2e-5
STRIP_ROWS = (1, 2, 3, 7, None)
# height x width of the latent. With head_dim 4, 1x1 and 2x2 attend quadratically at the deepest stage, 1x9 does not.
SIZES = ((1, 1), (1, 9), (9, 1), (2, 2), (5, 7))
R, E = "ResBlock", "EfficientViTBlock"

F32 = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": (R, R, R, E, E, E),
    "decoder_block_types": (R, R, R, E, E, E),
    "encoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "decoder_block_out_channels": (8, 8, 8, 8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 2, 1, 1),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}


def stages(
    count: int,
    channels: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    scales: tuple[int, ...] = (5,),
) -> dict[str, Any]:
    """Three stages of ResBlocks, then attention, as the deeper published models have them."""
    types, multiscales = (R,) * 3 + (E,) * (count - 3), ((),) * 3 + (scales,) * (count - 3)
    return {
        "encoder_block_types": types,
        "decoder_block_types": types,
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": encoder_layers,
        "decoder_layers_per_block": decoder_layers,
        "encoder_qkv_multiscales": multiscales,
        "decoder_qkv_multiscales": multiscales,
    }


SHUFFLE = {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
BATCH_NORM = {
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}


@dataclass(frozen=True)
class Case:
    """A configuration as its difference from `F32`."""

    config: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = SIZES


CASES = {
    "f32": Case(),
    "f32 by shuffling": Case(SHUFFLE),
    "f32 with batch norm and relu": Case(BATCH_NORM | SHUFFLE),
    "batch norm in attention": Case({"decoder_norm_types": "batch_norm", "decoder_conv_act_fn": "silu"}),
    "f64": Case(
        stages(7, (8, 8, 8, 8, 16, 16, 16), (0, 1, 1, 1, 1, 1, 1), (0, 2, 1, 1, 1, 1, 1)) | SHUFFLE,
        ((1, 1), (1, 3), (2, 2), (3, 2)),
    ),
    "f128": Case(
        stages(8, (8, 8, 8, 8, 8, 16, 16, 16), (0, 1, 1, 1, 1, 1, 1, 1), (0, 1, 2, 1, 1, 1, 1, 1)),
        ((1, 1), (1, 3), (3, 1)),
    ),
    "no layers in the first stage": Case(
        {"encoder_layers_per_block": (0, 1, 1, 1, 1, 1), "decoder_layers_per_block": (0, 1, 1, 1, 1, 1)}
    ),
    "no layers in a middle stage": Case(
        stages(6, (8, 8, 8, 8, 8, 16), (1, 1, 0, 1, 1, 1), (1, 1, 0, 1, 1, 1)) | SHUFFLE, ((1, 1), (2, 2), (5, 7))
    ),
    "no layers in the last stage": Case(stages(4, (8, 8, 8, 8), (1, 1, 1, 0), (1, 1, 1, 0)), ((1, 1), (4, 9), (9, 4))),
    "without shortcuts": Case({"encoder_out_shortcut": False, "decoder_in_shortcut": False}),
    "one scale": Case(stages(6, (8, 8, 8, 8, 16, 16), (1,) * 6, (1,) * 6, scales=())),
    "three scales": Case(stages(6, (8, 8, 8, 8, 16, 16), (1,) * 6, (1,) * 6, scales=(3, 5))),
    "ResBlocks only": Case({"encoder_block_types": R, "decoder_block_types": R}),
    "mixed stages": Case(
        {
            "encoder_block_types": (E, R, E, R, E, R),
            "decoder_block_types": (R, E, R, E, R, E),
            "encoder_qkv_multiscales": ((3,), (), (), (), (5,), ()),
            "decoder_qkv_multiscales": ((), (5,), (), (), (), (3,)),
        },
        ((1, 1), (1, 3), (2, 2)),
    ),
    "heads of eight": Case({"attention_head_dim": 8}),
    "heads of sixteen, in a stage of 24 channels": Case(
        stages(5, (6, 12, 24, 24, 24), (1,) * 5, (1,) * 5) | {"attention_head_dim": 16}, ((1, 1), (4, 4), (3, 6))
    ),
    "channels that grow by odd ratios": Case(
        {"decoder_block_out_channels": (12, 16, 16, 16, 8, 16), "encoder_block_out_channels": (8, 32, 16, 8, 8, 16)}
    ),
}


@functools.cache
def autoencoder(name: str, seed: int = 0) -> AutoencoderDC:
    torch.manual_seed(seed)
    model = AutoencoderDC(**{**F32, **CASES[name].config})
    return as_if_trained(model)


def as_if_trained(module: nn.Module) -> Any:
    """Norms, biases and statistics as a training might leave them rather than as they start."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def latent_of(model: AutoencoderDC, height: int, width: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.latent_channels, height, width, generator=generator)


def through(op: dcae.RowOp, strips: list[Tensor]) -> list[Tensor]:
    ready = [op.push(strip, last=strip is strips[-1]) for strip in strips]
    return [strip for strip in ready if strip is not None]


def streamed(decoder: nn.Module, latent: Tensor, strip_rows: int | None = None, **options: Any) -> Tensor:
    return torch.cat(list(dcae.decode_rows(decoder, latent, strip_rows, **options)), dim=2)


def decode(model: AutoencoderDC, latent: Tensor, strip_rows: int | None = None, **options: Any) -> Tensor:
    return streamed(model.decoder, latent, strip_rows, **options)


EACH = [
    pytest.param(name, height, width, id=f"{name}-{height}x{width}")
    for name, case in CASES.items()
    for height, width in case.sizes
]


@pytest.mark.parametrize(("name", "height", "width"), EACH)
def test_decode_is_the_whole_decode(name: str, height: int, width: int) -> None:
    model = autoencoder(name)
    latent = latent_of(model, height, width)
    given = latent.clone()
    whole = model.decoder(latent)
    assert whole.std() > 1e-2
    # Some of these random networks amplify rounding, so that the whole decode itself is further from the truth.
    rounding = (whole - copy.deepcopy(model.decoder).double()(latent.double())).abs().max()
    bound = max(EXACT, 2 * rounding)
    results = [decode(model, latent, strip_rows) for strip_rows in STRIP_ROWS]
    for strip_rows, result in zip(STRIP_ROWS, results, strict=True):
        assert result.shape == whole.shape
        assert torch.equal(result, results[0]), strip_rows
    assert (results[0] - whole).abs().max() <= bound
    assert (decode(model, latent, 3, plain=True) - whole).abs().max() <= bound
    assert torch.equal(latent, given)


@pytest.mark.parametrize(("name", "height", "width"), EACH)
def test_encode_is_the_whole_encode(name: str, height: int, width: int) -> None:
    model = autoencoder(name)
    scale = model.decoder(latent_of(model, 1, 1, batch=1)).shape[-1]
    image = torch.randn(2, 3, height * scale, width * scale, generator=torch.Generator().manual_seed(2))
    given = image.clone()
    whole = model.encoder(image)
    assert whole.std() > 1e-2
    results = [dcae.encode(model.encoder, image, strip_rows) for strip_rows in (2, None)]
    results.append(dcae.encode(model.encoder, image, 3, plain=True))
    for result in results:
        assert result.shape == whole.shape
        assert (result - whole).abs().max() <= EXACT
        assert (result - results[0]).abs().max() <= EXACT
    assert torch.equal(image, given)


# Configurations that have every kind of unit between them.
ROUTED = (
    "f32",
    "f32 with batch norm and relu",
    "no layers in the last stage",
    "without shortcuts",
    "mixed stages",
    "three scales",
    "ResBlocks only",
)
DTYPES = (torch.float32, torch.bfloat16)


def every_start(count: int) -> list[list[int]]:
    """For each sweep every map that it could start from."""
    return [list(starts) for starts in itertools.product(*(range(index + 1) for index in range(count)))]


@functools.cache
def in_dtype(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(autoencoder(name).decoder).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTED)
def test_every_route_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    decoder, latent = in_dtype(name, dtype), latent_of(autoencoder(name), 3, 4).to(dtype)
    expected = streamed(decoder, latent)
    routes = every_start(len(dcae.cut_at_barriers(dcae.decoder_units(decoder), 3, 4)))
    chosen = random.Random(0)
    for starts in routes if len(routes) <= 12 else [routes[0], *chosen.sample(routes, 10), routes[-1]]:
        heights = [chosen.choice((1, 2, 3, 7, 50)) for _ in starts]
        assert torch.equal(streamed(decoder, latent, heights=heights, starts=starts), expected), (starts, heights)


class Counted(RowMap):
    """Knows what is open."""

    opened: ClassVar[dict[int, Counted]] = {}

    def __init__(self, sweep: int, height: int) -> None:
        super().__init__(height, chunk_bytes=1000)
        self.sweep, self.reads = sweep, 0
        assert sweep not in self.opened
        self.opened[sweep] = self

    def strips(self, strip_rows: int, keep: bool = False) -> Iterator[Tensor]:
        self.reads += 1
        return super().strips(strip_rows, keep)

    def close(self) -> None:
        super().close()
        self.opened.pop(self.sweep, None)


@pytest.fixture
def opened() -> Iterator[dict[int, Counted]]:
    Counted.opened.clear()
    yield Counted.opened
    Counted.opened.clear()


@pytest.mark.parametrize(
    ("starts", "stored"),
    [
        ([0, 1, 2, 3, 4], [[1], [2], [3], [4], []]),
        ([0, 0, 0, 0, 0], [[], [], [], [], []]),
        ([0, 1, 1, 1, 1], [[1], [1], [1], [1], []]),
        ([0, 0, 2, 1, 3], None),
        ([0, 1, 0, 3, 1], [[1], [1], [1, 3], [1], []]),
    ],
)
def test_maps_live_from_their_first_reader_to_their_last(
    starts: list[int], stored: list[list[int]] | None, opened: dict[int, Counted]
) -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 4)
    after: list[list[int]] = []
    result = decode(
        model, latent, 2, starts=starts, new_map=Counted, on_sweep=lambda done, of: after.append(sorted(opened))
    )
    assert torch.equal(result, decode(model, latent, 2))
    assert stored is None or after == stored
    assert not opened


def test_a_decode_that_is_abandoned_closes_its_maps(opened: dict[int, Counted]) -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 4)
    rows = dcae.decode_rows(model.decoder, latent, 1, starts=[0, 1, 1, 3, 1], new_map=Counted)
    next(rows)
    assert sorted(opened) == [1]
    rows.close()
    assert not opened

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        decode(model, latent, 1, starts=[0, 1, 1, 3, 1], new_map=Counted, on_sweep=stop)
    assert not opened


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_kept_elsewhere_give_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder, latent = in_dtype("f32", dtype), latent_of(autoencoder("f32"), 3, 4).to(dtype)

    def new_map(sweep: int, height: int) -> RowMap:
        return HostMap(height, chunk_bytes=1000) if kind == "host" else DiskMap(height, tmp_path)

    expected = streamed(decoder, latent)
    for strip_rows in (1, 3):
        for starts in ([0, 1, 2, 3, 4], [0, 1, 1, 3, 1]):
            assert torch.equal(streamed(decoder, latent, strip_rows, starts=starts, new_map=new_map), expected)


class Lender:
    """A decoder on the meta device, whose modules are filled while they are lent and spoilt after."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.real = in_dtype(name, dtype)
        self.decoder = copy.deepcopy(self.real).to("meta")
        self.twins = dict(zip(self.decoder.modules(), self.real.modules(), strict=True))

    @contextmanager
    def lend(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent = []
        for module in itertools.chain(*(module.modules() for module in modules)):
            for table in ("_parameters", "_buffers"):
                own, real = getattr(module, table), getattr(self.twins[module], table)
                lent.append((own, dict(own)))
                for name, value in real.items():
                    copied = None if value is None else value.clone()
                    own[name] = nn.Parameter(copied, False) if table == "_parameters" and value is not None else copied
        yield
        for own, before in lent:
            for value in own.values():
                if value is not None:
                    value.fill_(1 if value.dtype == torch.int64 else float("nan"))
            own.update(before)


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_lent_weights_give_the_same_bits(name: str, dtype: torch.dtype, plain: bool) -> None:
    lender = Lender(name, dtype)
    height, width = CASES[name].sizes[-1]
    latent = latent_of(autoencoder(name), height, width).to(dtype)
    expected = streamed(lender.real, latent, 2, plain=plain)
    assert torch.equal(streamed(lender.decoder, latent, 2, plain=plain, lend=lender.lend), expected)
    assert all(parameter.is_meta for parameter in lender.decoder.parameters())


def test_one_module_is_lent_at_a_time() -> None:
    lender, entered, most = Lender("f32", torch.float32), [0], [0]

    @contextmanager
    def lend(modules: Sequence[nn.Module]) -> Iterator[None]:
        entered[0] += len(modules)
        most[0] = max(most[0], entered[0])
        with lender.lend(modules):
            yield
        entered[0] -= len(modules)

    latent = latent_of(autoencoder("f32"), 3, 4)
    starts = [0, 1, 0, 1, 0]
    expected = streamed(lender.real, latent)
    assert torch.equal(streamed(lender.decoder, latent, lend=lend, starts=starts), expected)
    assert most == [1]
    with pytest.raises(ValueError, match="meta"):
        streamed(lender.decoder, latent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": [0, 1]}, "starts must be one for each of 5 sweeps"),
        ({"starts": [0, 1, 3, 3, 4]}, "sweep 2 cannot start from map 3: only from maps 0 to 2"),
        ({"starts": [0, 1, 2, -1, 4]}, "sweep 3 cannot start from map -1"),
        ({"heights": [1, 1]}, "heights must be one for each of 5 sweeps"),
        ({"heights": [1, 1, 1, 0, 1]}, "at least 1 row"),
    ],
)
def test_routes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    model = autoencoder("f32")
    with pytest.raises(ValueError, match=message):
        decode(model, latent_of(model, 3, 4), **options)


def test_encode_takes_routes_too() -> None:
    model = autoencoder("f32")
    image = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))
    expected = dcae.encode(model.encoder, image, 2)
    count = len(dcae.cut_at_barriers(dcae.encoder_units(model.encoder), 96, 64))
    for starts in every_start(count)[::5]:
        assert torch.equal(dcae.encode(model.encoder, image, starts=starts, heights=range(1, 1 + count)), expected)


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("interpolate", [True, False])
def test_an_up_block_of_any_ratio(repeats: int, plain: bool, interpolate: bool) -> None:
    torch.manual_seed(0)
    block = DCUpBlock2d(16, 4 * repeats, interpolate=interpolate).requires_grad_(False)
    assert block.repeats == repeats
    map_ = torch.randn(2, 16, 5, 3)
    op = dcae.up_block(block, dcae.Pass(plain))
    rows = through(op, list(dcae.cut(map_.permute(0, 2, 3, 1), 2)))
    torch.testing.assert_close(torch.cat(rows, dim=1).permute(0, 3, 1, 2), block(map_), atol=EXACT, rtol=0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second of": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_input(layout: str) -> None:
    model = autoencoder("f32")
    latent = LAYOUTS[layout](latent_of(model, 3, 2))
    image = LAYOUTS[layout](torch.randn(2, 3, 32, 64))
    assert (decode(model, latent, 3) - model.decoder(latent)).abs().max() <= EXACT
    assert (dcae.encode(model.encoder, image, 3) - model.encoder(image)).abs().max() <= EXACT


def test_no_graph_is_built_where_gradients_are_enabled() -> None:
    model = autoencoder("f32")
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            latent = latent_of(model, 3, 2).requires_grad_()
            rows = list(dcae.decode_rows(model.decoder, latent, 2))
            quadratic = list(dcae.decode_rows(model.decoder, latent[:, :, :1, :1], 2))
            encoded = dcae.encode(model.encoder, torch.randn(1, 3, 32, 64).requires_grad_())
            assert torch.is_grad_enabled()
        assert not any(result.requires_grad for result in [*rows, *quadratic, encoded])
    finally:
        model.requires_grad_(False)


def test_the_caller_keeps_its_gradient_mode_between_rows() -> None:
    model = autoencoder("f32")
    rows = dcae.decode_rows(model.decoder, latent_of(model, 3, 2), 1)
    with torch.enable_grad():
        next(rows)
        assert torch.is_grad_enabled()
        rows.close()
        assert torch.is_grad_enabled()


def test_rows_stay_as_they_were_given() -> None:
    """A consumer may keep a strip, or write over it: no strip is memory that the decoder uses again."""
    model = autoencoder("f32")
    latent = latent_of(model, 3, 2)
    kept, copies = [], []
    for strip in dcae.decode_rows(model.decoder, latent, 2):
        kept.append(strip)
        copies.append(strip.clone())
    assert all(torch.equal(strip, copy) for strip, copy in zip(kept, copies, strict=True))

    overwritten = []
    for strip in dcae.decode_rows(model.decoder, latent, 2):
        overwritten.append(strip.clone())
        strip.fill_(float("nan"))
    assert torch.equal(torch.cat(overwritten, dim=2), torch.cat(copies, dim=2))


def test_it_may_be_left_early_and_run_twice_at_once() -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 2)
    expected = decode(model, latent, 2)
    left = dcae.decode_rows(model.decoder, latent, 2)
    next(left)
    left.close()
    with pytest.raises(StopIteration):
        next(left)
    pairs = zip(dcae.decode_rows(model.decoder, latent, 2), dcae.decode_rows(model.decoder, -latent, 2), strict=True)
    assert torch.equal(torch.cat([first for first, _ in pairs], dim=2), expected)


def test_the_model_is_left_as_it_was() -> None:
    model = autoencoder("f32 with batch norm and relu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decode(model, latent_of(model, 3, 2), 2)
    dcae.encode(model.encoder, torch.randn(1, 3, 32, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(48, 64), (64, 33), (31, 32)])
def test_sides_that_do_not_halve_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        dcae.encode(autoencoder("f32").encoder, torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    "latent",
    [torch.zeros(1, 5, 3, 3), torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 4, 0, 3)],
    ids=["channels", "type", "no rows"],
)
def test_a_latent_that_does_not_fit_is_refused(latent: Tensor) -> None:
    with pytest.raises(ValueError, match="expected channels, type and device"):
        decode(autoencoder("f32"), latent)
    with pytest.raises(ValueError, match="expected channels, type and device"):
        dcae.encode(autoencoder("no layers in the first stage").encoder, latent)


def test_double_precision() -> None:
    decoder = copy.deepcopy(autoencoder("batch norm in attention").decoder).double()
    latent = latent_of(autoencoder("batch norm in attention"), 3, 4).double()
    assert (streamed(decoder, latent, 4) - decoder(latent)).abs().max() <= EXACT


@pytest.mark.parametrize("strip_rows", [0, -1])
def test_strips_have_rows(strip_rows: int) -> None:
    model = autoencoder("f32")
    with pytest.raises(ValueError, match="rows"):
        decode(model, latent_of(model, 3, 2), strip_rows)


def test_sweeps_are_counted() -> None:
    model = autoencoder("f32")
    told: list[tuple[int, int]] = []
    list(dcae.decode_rows(model.decoder, latent_of(model, 3, 2), 2, on_sweep=lambda done, of: told.append((done, of))))
    assert told == [(done, 5) for done in range(1, 6)]  # four attentions part five sweeps


def test_a_layer_it_cannot_stream_is_refused() -> None:
    class Quantised(nn.Conv2d):
        pass

    model = AutoencoderDC(**F32).eval()
    model.decoder.conv_in = Quantised(4, 16, 3, padding=1)
    with pytest.raises(TypeError, match="Quantised"):
        decode(model, latent_of(model, 2, 2))


def test_bf16_is_as_near_to_fp32_as_the_whole_decode() -> None:
    """Over several networks: in a single one rounding is chaotic, and either way may be ahead by a third."""
    errors = {"whole": 0.0, "rows": 0.0, "plain": 0.0}
    for name in ("f32", "f32 by shuffling", "f32 with batch norm and relu", "without shortcuts"):
        for seed in range(4):
            half = copy.deepcopy(autoencoder(name, seed).decoder).to(torch.bfloat16)
            # The reference has the weights that bf16 can hold: what is compared is the arithmetic.
            reference = copy.deepcopy(half).float()
            latent = latent_of(autoencoder(name, seed), 3, 4, batch=4, seed=seed).to(torch.bfloat16)
            expected = reference(latent.float())
            results = {
                "whole": half(latent),
                "rows": streamed(half, latent, 4),
                "plain": streamed(half, latent, 4, plain=True),
            }
            for way, result in results.items():
                assert result.dtype == torch.bfloat16
                errors[way] += (result.float() - expected).abs().mean().item()
    assert errors["rows"] <= 1.1 * errors["whole"], errors
    assert errors["plain"] <= 1.1 * errors["whole"], errors


def efficient_vit(norm_type: str) -> EfficientViTBlock:
    return EfficientViTBlock(64, attention_head_dim=16, norm_type=norm_type, qkv_multiscales=(5,))


# A layer, how it is streamed, and its bound on the error in bf16 over that of the layer's own forward.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, dcae.Pass], dcae.RowOp] | None, float]] = {
    "ResBlock": (lambda: ResBlock(64, 64, "rms_norm", "silu"), dcae.res_block, 1.05),
    "ResBlock, batch norm": (lambda: ResBlock(64, 64, "batch_norm", "relu"), dcae.res_block, 1.05),
    "Mix-FFN": (lambda: efficient_vit("rms_norm").conv_out, dcae.glu_mb_conv, 1.05),
    "attention": (lambda: efficient_vit("rms_norm").attn, None, 1.05),
    "attention, batch norm": (lambda: efficient_vit("batch_norm").attn, None, 1.05),
    # The sums of two taps are rounded to bf16 once more.
    "upsampling": (lambda: DCUpBlock2d(64, 64, interpolate=True), dcae.up_block, 1.4),
    "upsampling by shuffling": (lambda: DCUpBlock2d(64, 64), dcae.up_block, 1.05),
    "downsampling": (lambda: DCDownBlock2d(64, 64), dcae.down_block, 1.05),
    "downsampling by shuffling": (lambda: DCDownBlock2d(64, 64, downsample=True), dcae.down_block, 1.05),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_bf16_layer_by_layer(layer: str) -> None:
    make, stream, bound = LAYERS[layer]
    torch.manual_seed(0)
    half = as_if_trained(make()).to(torch.bfloat16)
    reference = copy.deepcopy(half).float()
    map_ = torch.randn(2, 64, 16, 16).to(torch.bfloat16)
    strips = list(dcae.cut(map_.permute(0, 2, 3, 1).contiguous(), 4))
    expected = reference(map_.float())
    whole_error = (half(map_).float() - expected).abs().mean()
    for plain in (False, True):
        this = dcae.Pass(plain)
        if stream is None:
            sums = dcae.AttentionSums(half, this)
            through(sums, strips)
            op = dcae.apply_attention(half, sums.sums, this)
        else:
            op = stream(half, this)
        result = torch.cat(through(op, strips), dim=1).permute(0, 3, 1, 2)
        assert result.dtype == torch.bfloat16
        assert (result.float() - expected).abs().mean() <= bound * whole_error
