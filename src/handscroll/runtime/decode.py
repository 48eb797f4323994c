"""A latent becomes rows of uint8: the exact streaming way, and the three others that it is compared with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from handscroll.banded.autoencoder import OnRows
from handscroll.banded.autoencoder import decode_rows as decoder_rows
from handscroll.bands import common
from handscroll.errors import NumericsError
from handscroll.events import OnEvent, Progress
from handscroll.limits import PIXEL_PIECE_BYTES
from handscroll.plan.plan import Plan
from handscroll.plan.stages import DECODE
from handscroll.runtime.distributed.rows import received_rows
from handscroll.runtime.maps import map_maker
from handscroll.runtime.memory import trim
from handscroll.runtime.session import Session
from handscroll.weights.dtypes import DTYPES


def decode_rows(
    session: Session, plan: Plan, latent: Tensor, on_sweep_rows: OnRows | None = None
) -> Generator[np.ndarray, None, None]:
    """latent [1, C, h, w] as the sampler leaves it -> row blocks [rows, width, 3] uint8, the plan's height in all.

    on_sweep_rows: told between two row blocks of each sweep, where the picture is decoded by rows.
    Raises NumericsError for NaN or infinity, OutputError where a map finds no room on disk.
    """
    team = session.team
    if team is None:
        yield from own_rows(session, plan, latent, on_sweep_rows)
        return
    team.tell("decode", plan, latent=latent)
    yield from own_rows(session, plan, latent, on_sweep_rows)
    for rank in range(1, team.ranks.size):
        yield from received_rows(team, rank, picture_rows(session, plan, rank), plan.width)


def picture_rows(session: Session, plan: Plan, rank: int | None = None) -> range:
    """The picture's rows that a rank makes, this one if None: all where there is no team."""
    exchange = session.exchange(plan)
    if exchange is None:
        return range(plan.height)
    exchange = exchange.scaled(session.spec.autoencoder.spatial_compression_ratio)
    return common(exchange.rows if rank is None else exchange.bands.rows(rank), range(plan.height))


def own_rows(
    session: Session, plan: Plan, latent: Tensor, on_sweep_rows: OnRows | None = None
) -> Generator[np.ndarray, None, None]:
    """`decode_rows` of the rows that this rank makes."""
    height = len(picture_rows(session, plan))
    row = 0
    waiting: _Pixels | None = None
    with closing(_row_blocks(session, plan, latent, on_sweep_rows)) as row_blocks:
        for row_block in row_blocks:
            row_block = row_block[..., : height - row, : plan.width]
            row += row_block.shape[-2]
            if not row_block.shape[-2]:
                continue
            pixels = _Pixels(row_block)
            del row_block
            if not pixels.on_their_way:
                yield pixels.arrived()
                continue
            # A device works on the next row block while this one is copied and the one before is written.
            if waiting is not None:
                yield waiting.arrived()
            waiting = pixels
    if waiting is not None:
        yield waiting.arrived()


class DecodeProgress:
    """Tells a listener how far the decoding of a picture is, sweeps weighed by the seconds that they should take.

    `on_sweep_rows` is for `decode_rows`. The last sweep makes the picture's rows: it is counted by `on_rows`, which is
    told how many of them are written.
    """

    def __init__(self, on_event: OnEvent, plan: Plan, picture: int) -> None:
        self.on_event, self.plan, self.picture = on_event, plan, picture
        self.done = 0
        self.last_begins_at = 0.0  # share of all work; nothing comes before the rows where there are no sweeps
        self._tell(0.0)

    def on_sweep_rows(self, index: int, count: int, share: float) -> None:
        self.last_begins_at = self._share(count - 1, count, 0.0)
        if index + 1 < count:
            self._tell(self._share(index, count, share))

    def on_rows(self, rows: int) -> None:
        share = rows / self.plan.height
        self._tell(self.last_begins_at + share * (1 - self.last_begins_at), rows)

    def _share(self, index: int, count: int, share: float) -> float:
        planned = self.plan.decoding
        return (index + share) / count if planned is None else planned.share_done(index, share)

    def _tell(self, share: float, rows: int = 0) -> None:
        height = self.plan.height
        self.done = height if rows == height else max(self.done, min(int(share * height), height - 1))
        self.on_event(Progress(DECODE.name, self.done, height, self.picture, rows=rows))


def whole_picture(session: Session, plan: Plan, latent: Tensor) -> np.ndarray:
    """latent [1, C, h, w] as the sampler leaves it -> the picture of the plan's size, [height, width, 3] uint8.

    Raises as `decode_rows`.
    """
    picture, row = np.empty((plan.height, plan.width, 3), np.uint8), 0
    for row_block in decode_rows(session, plan, latent, lambda *_: session.pulse(DECODE.name)):
        picture[row : row + len(row_block)] = row_block
        row += len(row_block)
    return picture


def _row_blocks(
    session: Session, plan: Plan, latent: Tensor, on_sweep_rows: OnRows | None
) -> Generator[Tensor, None, None]:
    """Row blocks [1, 3, rows, W] in the autoencoder's dtype, by the way that the plan names."""
    if not torch.isfinite(latent.sum(dtype=torch.float64)):
        raise NumericsError(
            "the latent holds numbers that are not finite, so there is no picture in it; make it again", "latent"
        )
    opened = session.open_autoencoder(plan, "decoder")
    autoencoder = opened.module
    scaled = latent.to(plan.device, DTYPES[plan.precision.autoencoder]) / autoencoder.config.scaling_factor
    match plan.decode:
        case "rows":
            decoding = plan.decoding
            yield from decoder_rows(
                autoencoder.decoder,
                scaled,
                plan.strip_rows,
                heights=None if decoding is None else decoding.strip_rows,
                starts=None if decoding is None else decoding.starts,
                new_map=map_maker(decoding, session.scratch),
                materialize=opened.materialize,
                on_sweep=lambda done, of: trim(),
                on_rows=on_sweep_rows,
                exchange=session.exchange(plan),
            )
        case "patch":
            from handscroll.banded.patches import decode_by_patches

            yield decode_by_patches(autoencoder.decoder, scaled, plan.patches)
        case "tiled":
            autoencoder.enable_tiling()
            try:
                whole = autoencoder.decode(scaled, return_dict=False)[0]
            finally:
                autoencoder.disable_tiling()
            yield whole
        case _:
            yield autoencoder.decode(scaled, return_dict=False)[0]


class _Pixels:
    """A row block [1, 3, rows, W] in -1 ... 1 as uint8, rounded as diffusers' image processor does, on its way here."""

    def __init__(self, row_block: Tensor) -> None:
        self.on_their_way = row_block.device.type == "cuda"
        pixels, finite = _to_uint8(row_block)
        if self.on_their_way:
            # Nothing here waits for the device, not even to look whether the numbers are finite.
            with torch.cuda.device(row_block.device):
                self.pixels = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                self.pixels.copy_(pixels, non_blocking=True)
                self.finite = torch.empty((), dtype=torch.bool, pin_memory=True)
                self.finite.copy_(finite, non_blocking=True)
                self.event = torch.cuda.Event()
                self.event.record(torch.cuda.current_stream(row_block.device))
        else:
            self.pixels, self.finite = pixels, finite

    def arrived(self) -> np.ndarray:
        """[rows, W, 3]. Raises NumericsError."""
        if self.on_their_way:
            self.event.synchronize()
        if not self.finite:
            raise NumericsError("the autoencoder gave numbers that are not finite", "autoencoder")
        return self.pixels.numpy()


def _to_uint8(row_block: Tensor) -> tuple[Tensor, Tensor]:
    """[1, 3, rows, W] -> [rows, W, 3] uint8, and whether all of it was finite."""
    pixels = row_block.new_empty((*row_block.shape[2:], 3), dtype=torch.uint8)
    finite = torch.ones((), dtype=torch.bool, device=row_block.device)
    row_bytes = 4 * row_block[0, :, 0].numel()
    # Row blocks are tall where channels are few: on a CPU one would take several times its own memory in fp32.
    step = max(1, PIXEL_PIECE_BYTES // row_bytes) if row_block.device.type == "cpu" else row_block.shape[2]
    for piece, target in zip(row_block[0].permute(1, 2, 0).split(step), pixels.split(step), strict=True):
        values = piece.float()
        finite &= torch.isfinite(values.sum())
        target.copy_((values * 0.5).add_(0.5).clamp_(0, 1).mul_(255).round_())
    return pixels, finite
