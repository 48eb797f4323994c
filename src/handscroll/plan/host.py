"""What a job takes of the host's memory beside a CUDA device: layers and maps share it, and all of it is pinned."""

from __future__ import annotations

from collections.abc import Iterable

from handscroll.limits import MAP_CHUNK_BYTES, SLOTS
from handscroll.weights.pinned import pinned_blocks, pinned_bytes

PADDED = 1.01  # each of a layer's tensors begins at a multiple of 512 bytes


def host_map_bytes(map_bytes: int, rows: int) -> int:
    """A map of so many rows in the host's memory, pinned in chunks of rows as `RowMap` cuts them."""
    if not map_bytes:
        return 0
    row_bytes = map_bytes // rows
    chunk_rows = min(rows, max(1, MAP_CHUNK_BYTES // row_bytes))
    chunks, rest = divmod(rows, chunk_rows)
    return chunks * pinned_bytes(chunk_rows * row_bytes) + pinned_bytes(rest * row_bytes)


def staging_bytes(layer_bytes: int) -> int:
    """What layers are read through on their way to the device, none of which stays."""
    return 0 if not layer_bytes else SLOTS * pinned_bytes(_padded(layer_bytes))


def layers_on_host(layers: int, layer_bytes: int, room_bytes: int) -> tuple[int, int]:
    """How many of so many layers the host has room for, and what they take of it.

    Where not all of them do, the others are read through memory of their own, which has to have room as well.
    """
    each_bytes = _padded(layer_bytes)
    blocks = pinned_blocks(layers, each_bytes, max(0, room_bytes))
    if _pieces(blocks, each_bytes) < layers:
        blocks = pinned_blocks(layers, each_bytes, max(0, room_bytes - staging_bytes(layer_bytes)))
    return min(layers, _pieces(blocks, each_bytes)), sum(blocks)


def layers_room_bytes(layers: int, layer_bytes: int) -> int:
    """So many layers as they lie on the host, without what blocks of pinned memory waste."""
    return layers * _padded(layer_bytes)


def _pieces(blocks: Iterable[int], each_bytes: int) -> int:
    return sum(block // each_bytes for block in blocks)


def _padded(layer_bytes: int) -> int:
    return int(PADDED * layer_bytes) + 1
