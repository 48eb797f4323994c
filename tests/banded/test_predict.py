"""The transformer in row blocks against diffusers' own forward: the same predictions, the same bits at every height."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import miniatures
from handscroll.banded.layers import LayerPass
from handscroll.banded.rows import RowMap
from handscroll.banded.sums import LinearAttentionSums
from handscroll.banded.transformer import Branch, mix_ffn, predict
from handscroll.banded.transformer.embed import embedded
from live_bytes import LiveBytes
from transformer_cases import branches, transformer

SIZES = [(1, 1), (2, 3), (7, 1), (1, 6), (4, 4), (8, 8), (5, 9)]
HEIGHTS = (1, 2, 3, 7, None)
ATOL = {torch.float32: 2e-5, torch.bfloat16: 0.1}


@torch.no_grad()
def whole(model: Any, branch: Branch) -> Tensor:
    return model(
        branch.latent,
        encoder_hidden_states=branch.text,
        encoder_attention_mask=branch.mask,
        timestep=branch.timestep,
        guidance=branch.guidance,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("row", miniatures.ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_diffusers_forward(row: str, size: tuple[int, int]) -> None:
    model = transformer(row)
    given = branches(model, *size)
    expected = [whole(model, branch) for branch in given]
    for plain in (False, True):
        for out, reference in zip(predict(model, given, band_rows=2, plain=plain), expected, strict=True):
            assert out.shape == reference.shape
            torch.testing.assert_close(out, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("row", ["1.6b", "1.6b-4k", "sprint-0.6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_band_heights_and_company_change_no_bit(row: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = transformer(row, dtype)
    given = branches(model, *size)
    expected = predict(model, given)
    for rows in HEIGHTS[:-1]:
        assert all(map(torch.equal, predict(model, given, band_rows=rows), expected)), f"row blocks of {rows} rows"
    assert torch.equal(predict(model, given[1:], band_rows=2)[0], expected[1])


@pytest.mark.parametrize("row", ["0.6b", "1.5-1.6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_that_are_laid_out_change_no_bit(row: str, dtype: torch.dtype) -> None:
    model = transformer(row, dtype)
    given = branches(model, 5, 9)
    expected = predict(model, given)
    assert all(map(torch.equal, predict(model, given, band_rows=2, lay_out=True), expected))


@pytest.mark.parametrize("row", ["1.6b", "1.5-1.6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_of_one_token_is_read_without_asking(
    row: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(row, dtype)
    (given,) = branches(model, 5, 9, texts=(1,))
    padded = torch.randn(1, 9, given.text.shape[-1]).to(dtype)
    padded[:, :1] = given.text
    mask = torch.tensor([[1] + [0] * 8])
    out = predict(model, [given], band_rows=2)[0]
    asked = predict(model, [replace(given, text=padded, mask=mask)])[0]
    torch.testing.assert_close(out, whole(model, replace(given, text=padded, mask=mask)), atol=ATOL[dtype], rtol=0)
    torch.testing.assert_close(out, asked, atol=ATOL[dtype], rtol=0)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    assert torch.equal(predict(model, [given])[0], out)


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_size": 2, "interpolation_scale": 0.5},
        {"patch_size": 2, "out_channels": 64},
        {"attention_bias": True},
        {"norm_elementwise_affine": True},
        {"mlp_ratio": 3.3},
        {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 4},
        {"sample_size": 6, "interpolation_scale": 3.0},
    ],
    ids=str,
)
def test_other_configurations(overrides: dict[str, Any]) -> None:
    if overrides.get("num_cross_attention_heads") == 4:
        overrides = {**overrides, "cross_attention_head_dim": 8}
    model = transformer(**overrides)
    for size in ((4, 4), (6, 10)):
        (given,) = branches(model, *size, texts=(8,))
        out = predict(model, [given], band_rows=2)[0]
        torch.testing.assert_close(out, whole(model, given), atol=2e-5, rtol=0)
        assert torch.equal(out, predict(model, [given], band_rows=1)[0])


def test_a_batch_is_its_pictures() -> None:
    model = transformer("sprint-1.6b")
    one, other = (branches(model, 5, 4, texts=(6,), seed=seed)[0] for seed in (1, 2))
    both = _of_fields(
        None if a is None else torch.cat([a, b]) for a, b in zip(_fields(one), _fields(other), strict=True)
    )
    out = predict(model, [both], band_rows=2)[0]
    torch.testing.assert_close(out, whole(model, both), atol=2e-5, rtol=0)


def _fields(branch: Branch) -> tuple[Any, ...]:
    return branch.latent, branch.text, branch.mask, branch.timestep, branch.guidance


def _of_fields(fields: Iterable[Any]) -> Branch:
    return Branch(*fields)


def test_slabs_of_hidden_channels_change_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(mlp_ratio=3.4)  # 108 hidden channels
    given = branches(model, 5, 7)
    expected = [whole(model, branch) for branch in given]
    monkeypatch.setattr(mix_ffn, "SLAB_CHANNELS", 40)
    assert mix_ffn.slabs(108, 40) == [(0, 64), (64, 108)]
    outs = {rows: predict(model, given, band_rows=rows) for rows in (1, 2, 4)}
    for index, reference in enumerate(expected):
        torch.testing.assert_close(outs[2][index], reference, atol=2e-5, rtol=0)
        assert torch.equal(outs[1][index], outs[2][index])
        assert torch.equal(outs[1][index], outs[4][index])


def test_slabs_cover_the_hidden_channels() -> None:
    assert mix_ffn.slabs(5600, 1120) == [(0, 1120), (1120, 2240), (2240, 3360), (3360, 4480), (4480, 5600)]
    assert mix_ffn.slabs(2880, 1120) == [(0, 960), (960, 1920), (1920, 2880)]
    assert mix_ffn.slabs(80, 1120) == [(0, 80)]


def test_bfloat16_is_as_near_to_fp32_as_diffusers() -> None:
    ours, theirs = 0.0, 0.0
    for seed in range(6):
        for row in ("1.6b", "1.6b-2k", "sprint-0.6b"):
            model = transformer(row, seed=seed)
            rounded = transformer(row, torch.bfloat16, seed=seed)
            model.load_state_dict(rounded.float().state_dict())
            rounded = transformer(row, torch.bfloat16, seed=seed)
            for size in ((4, 4), (7, 9)):
                (given,) = branches(rounded, *size, texts=(9,), seed=seed)
                exact = whole(model, _of_fields(_widened(value) for value in _fields(given)))
                ours += float((predict(rounded, [given], band_rows=3)[0] - exact).square().sum())
                theirs += float((whole(rounded, given) - exact).square().sum())
    assert ours <= 1.1**2 * theirs


def _widened(value: Tensor | None) -> Tensor | None:
    return value.float() if value is not None and value.is_floating_point() else value


@pytest.mark.parametrize("row", ["1.6b-2k", "1.6b-4k"])
def test_the_table_of_positions_is_never_needed(row: str) -> None:
    model = transformer(row)
    for size in ((4, 4), (6, 5)):  # the size that the table is made for, and another
        given = branches(model, *size)
        expected = [whole(model, branch) for branch in given]
        table = model.patch_embed.pos_embed
        model.patch_embed.pos_embed = table.to("meta")
        outs = predict(model, given, band_rows=2)
        model.patch_embed.pos_embed = table
        for out, reference in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (3, 11), (64, 7)], ids=str)
def test_positions_are_diffusers_to_the_bit(size: tuple[int, int]) -> None:
    model = transformer("1.6b-4k")
    embed = model.patch_embed
    latent = torch.zeros(1, 32, *size)
    with torch.no_grad():
        embed.proj.bias.zero_()
        expected = embed(latent).view(1, *size, -1)
        row_blocks = list(embedded(embed, latent, range(size[0]), 2, LayerPass(plain=False)))
    assert torch.equal(torch.cat(row_blocks, dim=1), expected)


def test_each_layer_is_lent_once_and_gone_before_the_next() -> None:
    model = transformer("1.5-4.8b")
    given = branches(model, 6, 5)
    expected = predict(model, given)
    blocks = model.transformer_blocks
    model.transformer_blocks = nn.ModuleList(
        block for block in miniatures.make_transformer("1.5-4.8b").to("meta").transformer_blocks
    )
    lent: list[int] = []

    @contextmanager
    def layer(index: int) -> Iterator[Any]:
        lent.append(index)
        source = {name: value.clone() for name, value in blocks[index].state_dict().items()}
        block = model.transformer_blocks[index]
        block.load_state_dict(source, assign=True)
        yield block
        for value in block.parameters():
            value.data.fill_(torch.nan)  # the buffers go to the next layer: nothing may still use them
        block.to("meta")

    assert all(map(torch.equal, predict(model, given, layer=layer, band_rows=2), expected))
    assert lent == [0, 1, 2, 3]


class _Watched(RowMap):
    open_maps = 0
    most_maps = 0

    def __init__(self, height: int) -> None:
        super().__init__(height, chunk_bytes=300)
        _Watched.open_maps += 1
        _Watched.most_maps = max(_Watched.most_maps, _Watched.open_maps)

    def close(self) -> None:
        super().close()
        _Watched.open_maps -= 1


def test_maps_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer()
    given = branches(model, 9, 5)
    monkeypatch.setattr(_Watched, "open_maps", 0)
    monkeypatch.setattr(_Watched, "most_maps", 0)
    outs = predict(model, given, band_rows=2, new_map=_Watched)
    assert all(map(torch.equal, outs, predict(model, given)))
    assert _Watched.open_maps == 0
    assert _Watched.most_maps == 3  # one a branch, and the one that is written
    model.transformer_blocks[1].attn2.to_q.forward = lambda _: 1 / 0
    model.transformer_blocks[1].attn2.to_q.__class__ = type("Broken", (nn.Linear,), {})
    with pytest.raises(ZeroDivisionError):
        predict(model, given, band_rows=2, new_map=_Watched)
    assert _Watched.open_maps == 0


class _Adapted(nn.Module):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class _AdaptedConv(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Conv2d(base.in_channels, base.out_channels, 1)
        self.kernel_size = base.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


def test_layers_of_other_makes_are_called_as_they_are() -> None:
    model = transformer()
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(attention, name, _Adapted(getattr(attention, name)))
            attention.to_out[0] = _Adapted(attention.to_out[0])
        block.ff.conv_inverted = _AdaptedConv(block.ff.conv_inverted)
        block.ff.conv_point = _AdaptedConv(block.ff.conv_point)
    model.proj_out = _Adapted(model.proj_out)
    model.proj_out.weight = model.proj_out.base.weight
    for size in ((1, 1), (5, 6)):
        given = branches(model, *size)
        outs = predict(model, given, band_rows=2)
        for out, branch in zip(outs, given, strict=True):
            torch.testing.assert_close(out, whole(model, branch), atol=2e-5, rtol=0)


def _strange_processor(model: Any) -> None:
    model.transformer_blocks[0].attn1.processor = object()


def _strange_norm(model: Any) -> None:
    model.transformer_blocks[0].norm1 = nn.Identity()


def _strange_depthwise(model: Any) -> None:
    model.transformer_blocks[0].ff.conv_depth = nn.Identity()


@pytest.mark.parametrize("change", [_strange_processor, _strange_norm, _strange_depthwise])
def test_what_is_not_understood_is_refused(change: Any) -> None:
    model = transformer()
    change(model)
    with pytest.raises(TypeError, match="cannot be run in row blocks"):
        predict(model, branches(model, 4, 4))


@pytest.mark.parametrize("name", ["to_k", "to_v"])
def test_infinity_in_the_texts_keys_shows(name: str) -> None:
    model = transformer()
    with torch.no_grad():
        getattr(model.transformer_blocks[0].attn2, name).weight[0, 0] = torch.inf
    (found,) = predict(model, branches(model, 4, 4)[:1])
    assert not torch.isfinite(found).all()


def test_what_does_not_fit_is_refused() -> None:
    model = transformer(patch_size=2)
    with pytest.raises(ValueError, match="patches of 2x2"):
        predict(model, branches(model, 4, 5))
    (given,) = branches(model, 4, 4, texts=(5,))
    with pytest.raises(ValueError, match="expected channels"):
        predict(model, [Branch(given.latent.bfloat16(), given.text, None, given.timestep)])
    with pytest.raises(ValueError, match="row blocks of 0 rows"):
        predict(model, [given], band_rows=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_do_not_know_how_rows_were_cut(dtype: torch.dtype, batch: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for height, width, heads, head_dim in ((9, 7, 4, 8), (11, 1, 3, 8), (5, 33, 5, 16), (13, 3, 7, 4)):
        shape = (batch, height, width, heads, head_dim)
        queries, keys, values = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
        results = []
        for rows in (1, 2, 3, height):
            sums = LinearAttentionSums()
            for top in range(0, height, rows):
                sums.add(keys[:, top : top + rows], values[:, top : top + rows])
            pieces = [sums.apply_(queries[:, top : top + rows].clone()) for top in range(0, height, rows)]
            results.append(torch.cat(pieces, dim=1))
        assert all(torch.equal(result, results[0]) for result in results)
        q, k, v = (each.double().flatten(1, 2).transpose(1, 2) for each in (queries.relu(), keys.relu(), values))
        expected = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(dim=2, keepdim=True).transpose(-1, -2) + 1e-15)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        expected = expected.transpose(1, 2).reshape(shape)
        torch.testing.assert_close(results[0].double(), expected, atol=tolerance, rtol=tolerance)


def test_only_the_residual_stream_is_whole() -> None:
    model = transformer(num_attention_heads=16, cross_attention_dim=128, cross_attention_head_dim=64)
    peaks = {}
    for height in (32, 64):
        (given,) = branches(model, height, 16, texts=(5,))
        with LiveBytes() as live:
            predict(model, [given], band_rows=1, new_map=lambda rows: RowMap(rows, chunk_bytes=16 * 128 * 4))
        peaks[height] = live.peak_bytes
    row_bytes = 16 * 128 * 4
    assert peaks[64] - peaks[32] <= 32 * row_bytes + 2**13  # 32 more rows of the stream, and of the prediction
