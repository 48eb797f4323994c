"""What kernels are given: checks of shapes and types, strides, sizes of blocks."""

from __future__ import annotations

from torch import Tensor


def power_of_2(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def pixel_strides(row_block: Tensor) -> tuple[int, int]:
    """Elements from one of the batch to the next, and from one pixel to the next, row after row.

    `[B, rows, W, C]` of which the channels are contiguous and the rows follow each other: a row block, some of its
    rows, or some of its channels.
    """
    _, rows, width, channels = row_block.shape
    of_batch, of_row, of_pixel, of_channel = row_block.stride()
    assert of_channel == 1 or channels == 1, "channels must be contiguous"
    assert rows == 1 or width == 1 or of_row == width * of_pixel, "rows must follow each other"
    return of_batch, of_pixel if width > 1 else of_row if rows > 1 else channels


def check_like(row_block: Tensor, *others: Tensor | None) -> None:
    for other in others:
        assert other is None or (other.shape, other.dtype) == (row_block.shape, row_block.dtype), (
            "not the row block's shape"
        )


def batch_stride(modulation: Tensor, row_block: Tensor) -> int:
    """From one of the batch to the next, of [B, 1, 1, C] or, for all of them, [1, 1, 1, C]."""
    assert modulation.shape in ((len(row_block), 1, 1, row_block.shape[-1]), (1, 1, 1, row_block.shape[-1])), (
        "not a value a channel"
    )
    assert modulation.stride(-1) == 1 or modulation.shape[-1] == 1, "channels must be contiguous"
    return modulation.stride(0) if len(modulation) > 1 else 0


def check_vectors(count: int, *vectors: Tensor | None) -> None:
    for vector in vectors:
        assert vector is None or (vector.is_contiguous() and vector.numel() == count), f"not {count} contiguous values"
