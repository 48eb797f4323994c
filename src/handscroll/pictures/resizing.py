"""A picture made larger, in row blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from handscroll.limits import PIXEL_PIECE_BYTES


def enlarged(
    picture: np.ndarray,
    height: int,
    width: int,
    rows: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    of: range | None = None,
) -> Iterator[Tensor]:
    """Row blocks [1, rows, width, 3] of a picture [h, w, 3] uint8 made larger, in -1 ... 1; the last may be lower.

    of: which rows of the larger picture; None: all.

    Cubic convolution with a = -0.5 (Keys 1981), pixels' middles on pixels' middles, and at the edges the weights of
    what is there: what Pillow's BICUBIC does where it enlarges. A piece is made at a time, so that a row block takes
    little more than itself.
    """
    source = torch.from_numpy(picture)
    ys, down = _taps(picture.shape[0], height)
    xs, across = _taps(picture.shape[1], width)
    piece_rows = max(1, PIXEL_PIECE_BYTES // (4 * 3 * width))
    of = range(height) if of is None else of
    for top in of[::rows]:
        row_block = torch.empty(min(rows, of.stop - top), width, 3, dtype=dtype)
        for first in range(0, len(row_block), piece_rows):
            target = row_block[first : first + piece_rows]
            part = slice(top + first, top + first + len(target))
            lines = torch.zeros(len(target), picture.shape[1], 3)
            for tap in range(4):
                lines.addcmul_(source[ys[part, tap]].float(), down[part, tap, None, None])
            pixels = torch.zeros(len(target), width, 3)
            for tap in range(4):
                pixels.addcmul_(lines[:, xs[:, tap]], across[:, tap, None])
            target.copy_(pixels.mul_(1 / 127.5).sub_(1).clamp_(-1, 1))
            del target, lines, pixels
        given = [row_block[None].to(device)]
        del row_block
        yield given.pop()  # which the network may free when it has read it


def _taps(before: int, after: int) -> tuple[Tensor, Tensor]:
    """For each of `after` positions the four of `before` that it is made of, and their weights: [after, 4] both."""
    middles = (torch.arange(after, dtype=torch.float64) + 0.5) * (before / after) - 0.5
    first = middles.floor()
    away = (middles - first)[:, None] + torch.tensor([1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    near, far = away.abs() <= 1, away.abs()
    weights = torch.where(near, 1.5 * far**3 - 2.5 * far**2 + 1, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2)
    taps = first[:, None].long() + torch.arange(-1, 3)
    weights[(taps < 0) | (taps >= before)] = 0
    return taps.clamp(0, before - 1), (weights / weights.sum(dim=1, keepdim=True)).float()
