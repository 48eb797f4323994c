"""ReLU linear attention: its sums over all pixels, and what they give each pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from handscroll.banded.triton.launch import BUSY_PROGRAMS, Kernel, relu
from handscroll.banded.triton.operands import check_vectors, power_of_2

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # set by launch.py when Triton is first used: kernels find it among their own module's names

# Programs among which a sum over pixels is divided: eight for each multiprocessor of an H100. A constant, so that
# the order of summation is the same on every device.
SUM_PROGRAMS = 1024


def _check_sums(products: Tensor, normaliser: Tensor, shape: tuple[int, int, int, int]) -> None:
    """What is kept of an attention: products [B, heads, d, d'] and normaliser [B, heads, d]."""
    assert products.shape == shape, "not a product for each head"
    assert products.dtype == normaliser.dtype == torch.float32, "sums are kept in fp32"
    check_vectors(products.numel(), products)
    check_vectors(shape[0] * shape[1] * shape[2], normaliser)


@Kernel
def attention_sums_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    partial: tl.tensor,
    pixels: tl.tensor,
    program_pixels: tl.tensor,
    heads: tl.tensor,
    keys_batch: tl.tensor,
    keys_pixel: tl.tensor,
    keys_head: tl.tensor,
    keys_channel: tl.tensor,
    values_batch: tl.tensor,
    values_pixel: tl.tensor,
    values_head: tl.tensor,
    values_channel: tl.tensor,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PIXELS: tl.constexpr,
) -> None:
    # Heads first: programs that run at the same time read what lies side by side.
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * program_pixels
    batch = tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + program_pixels, pixels)
    pixel = tl.arange(0, PIXELS)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    value = tl.arange(0, VALUES)[None, :]
    keys += batch * keys_batch + first.to(tl.int64) * keys_pixel + head * keys_head
    values += batch * values_batch + first.to(tl.int64) * values_pixel + head * values_head

    products = tl.zeros([KEYS, VALUES], dtype=tl.float32)
    sums = tl.zeros([PIXELS, KEYS], dtype=tl.float32)
    for start in range(first, last, PIXELS):
        inside = start + pixel < last
        some_keys = tl.load(keys + pixel * keys_pixel + key * keys_channel, mask=inside & (key < KEY_DIM), other=0)
        some_values = tl.load(
            values + pixel * values_pixel + value * values_channel, mask=inside & (value < VALUE_DIM), other=0
        )
        positive = relu(some_keys.to(tl.float32))
        sums += positive
        # Products of halves are exact in fp32; "ieee" keeps fp32 itself from being cut to tf32.
        columns = tl.trans(positive.to(some_keys.dtype))
        products = tl.dot(columns, some_values, products, input_precision="ieee")
        keys += PIXELS * keys_pixel
        values += PIXELS * values_pixel

    count: tl.constexpr = KEY_DIM * VALUE_DIM + KEY_DIM
    part = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * heads + head
    partial += part * count
    key = tl.arange(0, KEYS)
    cells = key[:, None] * VALUE_DIM + value
    tl.store(partial + cells, products, mask=(key[:, None] < KEY_DIM) & (value < VALUE_DIM))
    tl.store(partial + KEY_DIM * VALUE_DIM + key, tl.sum(sums, axis=0), mask=key < KEY_DIM)


@Kernel
def add_parts_kernel(
    partial: tl.tensor,
    products: tl.tensor,
    normaliser: tl.tensor,
    parts: tl.tensor,
    PRODUCTS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Of one head. Several parts at a time, since nothing but waiting for memory happens here.
    head = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < PRODUCTS + KEYS
    is_product = cell < PRODUCTS
    products += head * PRODUCTS
    normaliser += head * KEYS
    of_part = tl.num_programs(0).to(tl.int64) * (PRODUCTS + KEYS)
    part = tl.arange(0, PARTS)[:, None]
    partial += head * (PRODUCTS + KEYS) + part * of_part + cell[None, :]
    total = tl.load(products + cell, mask=is_product, other=0)
    total += tl.load(normaliser + cell - PRODUCTS, mask=inside & (cell >= PRODUCTS), other=0)
    for start in range(0, parts, PARTS):
        total += tl.sum(tl.load(partial, mask=(start + part < parts) & inside[None, :], other=0), axis=0)
        partial += PARTS * of_part
    tl.store(products + cell, total, mask=is_product)
    tl.store(normaliser + cell - PRODUCTS, total, mask=inside & (cell >= PRODUCTS))


def attention_sums(keys: Tensor, values: Tensor, products: Tensor, normaliser: Tensor) -> None:
    """Adds `sum_i relu(k_i) v_i^T` to products and `sum_i relu(k_i)` to normaliser, over all pixels of a row block.

    keys (before their ReLU) and values: [B, rows, W, heads, d] and [B, rows, W, heads, d'] of one dtype and any strides
    (copied if rows do not follow each other). products: [B, heads, d, d'], normaliser: [B, heads, d], contiguous, fp32.

    Parts of the row block are summed beside each other and then added in an order that depends on their number alone,
    without atomics: the same row blocks give the same bits. (Row blocks cut otherwise do not.)
    """
    batch, _, _, heads, key_dim = keys.shape
    value_dim = values.shape[-1]
    assert keys.shape[:-1] == values.shape[:-1], "not as many keys as values"
    assert keys.dtype == values.dtype, "keys and values of different types"
    _check_sums(products, normaliser, (batch, heads, key_dim, value_dim))
    keys, values = keys.flatten(1, 2), values.flatten(1, 2)
    pixels = keys.shape[1]
    # Tensor cores take 16 at least. A tile of 8 KiB of keys and one of values is what four warps have in flight.
    key_block, value_block = max(16, power_of_2(key_dim)), max(16, power_of_2(value_dim))
    tile = max(16, min(128, 4096 // max(key_block, value_block)))
    tiles = -(-pixels // tile)
    program_tiles = -(-tiles // max(1, SUM_PROGRAMS // (batch * heads)))
    parts = -(-tiles // program_tiles)
    partial = products.new_empty(parts, batch * heads, key_dim * value_dim + key_dim)
    attention_sums_kernel.launch(
        (heads, parts, batch),
        keys,
        values,
        partial,
        pixels,
        program_tiles * tile,
        heads,
        *keys.stride(),
        *values.stride(),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEYS=key_block,
        VALUES=value_block,
        PIXELS=tile,
        num_warps=4,
        fuses=True,
    )
    block = min(128, power_of_2(partial.shape[-1]))
    add_parts_kernel.launch(
        (batch * heads, -(-partial.shape[-1] // block)),
        partial,
        products,
        normaliser,
        parts,
        PRODUCTS=key_dim * value_dim,
        KEYS=key_dim,
        PARTS=8,
        BLOCK=block,
        num_warps=max(1, block // 32),
    )


@Kernel
def attention_apply_kernel(
    queries: tl.tensor,
    products: tl.tensor,
    normaliser: tl.tensor,
    out: tl.tensor,
    pixels: tl.tensor,
    program_pixels: tl.tensor,
    heads: tl.tensor,
    eps: tl.tensor,
    queries_batch: tl.tensor,
    queries_pixel: tl.tensor,
    queries_head: tl.tensor,
    queries_channel: tl.tensor,
    out_batch: tl.tensor,
    out_pixel: tl.tensor,
    out_head: tl.tensor,
    out_channel: tl.tensor,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * program_pixels
    batch = tl.program_id(2).to(tl.int64)
    last = tl.minimum(first + program_pixels, pixels)
    pixel = tl.arange(0, PIXELS)[:, None]
    key = tl.arange(0, KEYS)
    value = tl.arange(0, VALUES)[None, :]
    queries += batch * queries_batch + first.to(tl.int64) * queries_pixel + head * queries_head
    out += batch * out_batch + first.to(tl.int64) * out_pixel + head * out_head
    products += (batch * heads + head) * (KEY_DIM * VALUE_DIM)
    normaliser += (batch * heads + head) * KEY_DIM

    mixture = tl.load(
        products + key[:, None] * VALUE_DIM + value, mask=(key[:, None] < KEY_DIM) & (value < VALUE_DIM), other=0
    )
    total = tl.load(normaliser + key, mask=key < KEY_DIM, other=0)[None, :]
    key = key[None, :]
    for start in range(first, last, PIXELS):
        inside = start + pixel < last
        asked = tl.load(queries + pixel * queries_pixel + key * queries_channel, mask=inside & (key < KEY_DIM), other=0)
        asked = relu(asked.to(tl.float32))
        weight = tl.sum(asked * total, axis=1) + eps
        mixed = tl.dot(asked, mixture, input_precision=PRECISION) / weight[:, None]
        tl.store(
            out + pixel * out_pixel + value * out_channel,
            mixed.to(out.dtype.element_ty),
            mask=inside & (value < VALUE_DIM),
        )
        queries += PIXELS * queries_pixel
        out += PIXELS * out_pixel


def attention_apply(
    queries: Tensor, products: Tensor, normaliser: Tensor, eps: float = 1e-15, out: Tensor | None = None
) -> Tensor:
    """`relu(q) @ products / (relu(q) . normaliser + eps)` for every pixel and head, in fp32, rounded once.

    queries (before their ReLU): [B, rows, W, heads, d] of any strides (copied if rows do not follow each other).
    products: [B, heads, d, d'], normaliser: [B, heads, d], contiguous, fp32. Gives [B, rows, W, heads, d'] in the
    queries' dtype, in new memory or in `out`, of any strides as long as its rows follow each other; it may be the
    queries where d' = d.
    """
    batch, rows, width, heads, key_dim = queries.shape
    value_dim = products.shape[-1]
    _check_sums(products, normaliser, (batch, heads, key_dim, value_dim))
    out = queries.new_empty(batch, rows, width, heads, value_dim) if out is None else out
    assert (out.shape, out.dtype) == ((batch, rows, width, heads, value_dim), queries.dtype), "not the result's shape"
    queries, target = queries.flatten(1, 2), out.view(batch, rows * width, heads, value_dim)
    pixels = rows * width
    key_block, value_block = max(16, power_of_2(key_dim)), max(16, power_of_2(value_dim))
    # The three products need many registers: tiles of half the size let twice as many programs run beside each other.
    tile = max(16, min(64, 2048 // max(key_block, value_block)))
    # A head's products are read once for eight tiles; fewer where that would leave a device idle.
    program_tiles = min(8, -(-pixels * heads * batch // (tile * BUSY_PROGRAMS)))
    attention_apply_kernel.launch(
        (heads, -(-pixels // (program_tiles * tile)), batch),
        queries,
        products,
        normaliser,
        target,
        pixels,
        program_tiles * tile,
        heads,
        eps,
        *queries.stride(),
        *target.stride(),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEYS=key_block,
        VALUES=value_block,
        PIXELS=tile,
        # Queries in half precision are exact in tf32, and three products of tf32 hold fp32's sums to more bits than
        # the result has. Of queries in fp32 nothing may be lost.
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32x3",
        num_warps=4,
        fuses=True,
    )
    return out
