"""Rows of pixels on their way from the ranks that decode them to the leader, who writes the picture."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from handscroll.files import write_all
from handscroll.limits import PIXEL_PIECE_BYTES
from handscroll.runtime.distributed.team import LEADER, Team


def send_rows(team: Team, row_blocks: Iterable[np.ndarray], scratch: Path | None) -> None:
    """As a follower, makes row blocks [rows, width, 3] uint8, and sends them when the leader takes them.

    The leader writes the picture from top to bottom and decodes its own rows first: until then they lie in a file.
    """
    with tempfile.TemporaryFile(dir=scratch) as kept:
        width = 0
        for row_block in row_blocks:
            width = row_block.shape[1]
            write_all(kept.fileno(), np.ascontiguousarray(row_block))
        kept.seek(0)
        while piece := kept.read(_piece_rows(width) * width * 3):
            team.ranks.trade([(LEADER, torch.frombuffer(bytearray(piece), dtype=torch.uint8))], [])()


def received_rows(team: Team, rank: int, rows: range, width: int) -> Iterator[np.ndarray]:
    """As the leader, the row blocks that a rank sends, as they come."""
    step = _piece_rows(width)
    for first in rows[::step]:
        row_block = torch.empty(min(step, rows.stop - first), width, 3, dtype=torch.uint8)
        team.ranks.trade([], [(rank, row_block)])()
        yield row_block.numpy()


def _piece_rows(width: int) -> int:
    return max(1, PIXEL_PIECE_BYTES // (3 * width))
