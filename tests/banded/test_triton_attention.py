"""ReLU linear attention against sums in double precision, and against the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handscroll.banded import triton
from handscroll.banded.sums import LinearAttentionSums
from triton_cases import assert_rounds_as, drawn, of_all_types, on_devices, on_triton, some_rows

pytestmark = on_triton


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
    monkeypatch.setattr(
        "handscroll.banded.triton.attention.SUM_PROGRAMS", 4 * heads
    )  # two parts for each head, where there are pixels
    if interleaved:  # as the autoencoder's: a head's keys and values side by side, in some rows of a taller row block
        both = some_rows(drawn(2, rows, width, heads * (key_dim + value_dim), dtype=dtype, device=device))
        keys, values = both.unflatten(-1, (heads, -1)).split([key_dim, value_dim], dim=-1)
    else:
        keys = drawn(2, rows, width, heads, key_dim, dtype=dtype, device=device)
        values = drawn(2, rows, width, heads, value_dim, dtype=dtype, device=device)
    start = drawn(2, heads, key_dim, value_dim, dtype=torch.float32, device=device)
    start_keys = drawn(2, heads, key_dim, dtype=torch.float32, device=device)
    products, normaliser = start.clone(), start_keys.clone()
    triton.attention_sums(keys, values, products, normaliser)
    exact, exact_keys = exact_sums(keys, values)
    torch.testing.assert_close(products.double(), exact + start, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normaliser.double(), exact_keys + start_keys, rtol=1e-5, atol=1e-5)

    if device == "cpu":
        return  # one program after another
    again, again_normaliser = start.clone(), start_keys.clone()
    triton.attention_sums(keys, values, again, again_normaliser)
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
    sums = LinearAttentionSums()
    sums.add(queries.flip(2), drawn(2, rows, width, heads, value_dim, dtype=dtype, device=device))
    expected = sums.apply_(queries.clone(), 1e-15)
    ours = triton.attention_apply(queries, sums.products, sums.keys, 1e-15)
    assert_rounds_as(ours, expected)
    if key_dim == value_dim:
        written = triton.attention_apply(queries, sums.products, sums.keys, 1e-15, out=queries)
        assert written is queries
        assert torch.equal(queries, ours)


@on_devices
@of_all_types
def test_attention_passes_on_nan(device: str, dtype: torch.dtype) -> None:
    keys = drawn(1, 2, 5, 2, 8, dtype=dtype, device=device)
    keys[0, 1, 3, 1, 2] = torch.nan
    products, normaliser = torch.zeros(1, 2, 8, 8, device=device), torch.zeros(1, 2, 8, device=device)
    triton.attention_sums(keys, keys.abs().nan_to_num(), products, normaliser)
    assert products[0, 0].isfinite().all()
    assert products[0, 1, 2].isnan().all()
    assert normaliser[0, 1, 2].isnan()
    applied = triton.attention_apply(keys, products, normaliser)
    assert applied[..., 0, :].isfinite().all()
    assert applied[..., 1, :].isnan().all()
