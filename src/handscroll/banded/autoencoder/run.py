"""Decoding and encoding: the sweeps of a network one after another, and the maps between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from handscroll.banded.autoencoder.attention import Sums
from handscroll.banded.autoencoder.route import Route, scaled
from handscroll.banded.autoencoder.sweeps import Sweep, cut_at_barriers, strip_heights
from handscroll.banded.autoencoder.units import Attention, Unit, decoder_units, encoder_units
from handscroll.banded.exchange import BandMap, Exchange, Halo
from handscroll.banded.layers import Pass, check_dense
from handscroll.banded.modules import DCDownBlock2d, Decoder, Encoder, is_down_block
from handscroll.banded.rows import Cropped, RowMap, RowOp, Stage, Tee, cut, sweep

# Makes the parameters and buffers of these modules real while it is entered; outside they may be on the meta device.
Materialize = Callable[[Sequence[nn.Module]], AbstractContextManager[Any]]
# Of so many rows at a time, the rows of a map that are asked for, from top to bottom: `[B, rows, W, C]`.
RowBlocksOf = Callable[[int, range], Iterable[Tensor]]
# Told between two row blocks: the number of the sweep, of how many, and how much of its rows it has made, 0 to 1.
OnRows = Callable[[int, int, float], None]


class StreamOptions(TypedDict, total=False):
    """How a network is run, as `decode_rows` says; on the CPU nothing of it changes a bit of the result."""

    starts: Sequence[int] | None
    new_map: Callable[[int, int], RowMap] | None
    materialize: Materialize | None
    on_sweep: Callable[[int, int], None] | None
    on_rows: OnRows | None
    plain: bool
    exchange: Exchange | None


def stream(
    sweeps: Sequence[Sweep],
    row_blocks_of: RowBlocksOf,
    size: tuple[int, int],
    heights: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    new_map: Callable[[int, int], RowMap] | None = None,
    materialize: Materialize | None = None,
    on_sweep: Callable[[int, int], None] | None = None,
    on_rows: OnRows | None = None,
    plain: bool = False,
    exchange: Exchange | None = None,
) -> Generator[Tensor, None, None]:
    """Runs a network sweep by sweep and yields the rows of its output, or with an exchange those of the own band.

    row_blocks_of gives the input; size is its height and width; heights are the row block heights of the sweeps; the
    exchange's bands are in rows of the input. The rest is as in `decode_rows`.
    """
    count = len(sweeps)
    starts = range(count) if starts is None else starts
    _check_route(count, heights, starts)
    last_reader = {start: index for index, start in enumerate(starts)}
    real: Materialize = materialize or (lambda modules: nullcontext())
    route, own = Route(sweeps, starts, *size), range(size[0]) if exchange is None else exchange.rows
    maps: dict[int, BandMap] = {}
    sums: dict[int, Sums] = {}
    try:
        for index, start in enumerate(starts):
            this = Pass(plain, copies=materialize is not None)
            # The height is in rows of this sweep's own map, wherever it starts: what it holds depends little on that.
            rows_at_1 = heights[index] / sweeps[index].in_scale
            needed, made = route.needed(index, own), route.made(index, own)
            stages = list(_stages(route, index, needed, sums, rows_at_1, real, this))
            asked = _rows_at(sweeps[start].in_scale, rows_at_1), needed[0]
            source = maps[start].row_blocks(*asked, last_reader[start] != index) if start else row_blocks_of(*asked)
            following = sweeps[index + 1].attention if index + 1 < count else None
            told = None if on_rows is None else partial(on_rows, index, count)
            if following is None:
                yield from _told_of_rows(sweep(source, stages), len(made), told)
            else:
                with real(_modules_of(following)):
                    side = following.sum(this, needed[-1], made)
                stages.append(Stage(_cropped(Tee(side), needed[-1], made), sys.maxsize))
                sums[index + 1] = side.sums
                del side
                if index + 1 in last_reader:
                    maps[index + 1] = _band_map(route, index + 1, len(made), new_map, exchange)
                _fill(maps.get(index + 1), _told_of_rows(sweep(source, stages), len(made), told))
                _put_together(sums[index + 1], None if exchange is None else exchange.scaled(following.in_scale))
            # Before the listener, who may trim the heap: with its buffers and weights.
            del stages, this, source
            if start and last_reader[start] == index:
                maps.pop(start).close()
            if on_sweep is not None:
                on_sweep(index + 1, count)
    finally:
        for map_ in maps.values():
            map_.close()


def _stages(
    route: Route,
    index: int,
    needed: Sequence[range],
    sums: dict[int, Sums],
    rows_at_1: float,
    real: Materialize,
    this: Pass,
) -> Iterator[Stage]:
    """The ops of sweep `index`; each unit's weights are real while they are laid out, and no longer.

    needed: the rows that go into each of them, and last those that come out.
    """
    for unit, (given, wanted) in zip(route.units(index), pairwise(needed), strict=True):
        with real(_modules_of(unit)):
            number = route.barrier(unit)
            op = (
                unit.apply(sums[number], this)
                if isinstance(unit, Attention) and number is not None
                else unit.build(this)
            )
        op = _cropped(op, scaled(given, unit.factor), wanted)
        yield Stage(op, _rows_at(unit.in_scale * unit.factor, rows_at_1))


def _cropped(op: RowOp, made: range, wanted: range) -> RowOp:
    """An op that is given a part of a map and makes some rows; those at its ends may be wrong, and are not wanted."""
    return op if made == wanted else Cropped(op, wanted.start - made.start, len(wanted))


def _band_map(
    route: Route, index: int, rows: int, new_map: Callable[[int, int], RowMap] | None, exchange: Exchange | None
) -> BandMap:
    """Where the own rows of map `index` go, and what ranks need of each other's."""
    halo = None
    if exchange is not None:
        needed = [route.of_map(index, own) for own in exchange.bands]
        halo = Halo(exchange.scaled(route.sweeps[index].in_scale), needed)
    return BandMap(RowMap(rows) if new_map is None else new_map(index, rows), halo)


def _put_together(sums: Sums, exchange: Exchange | None) -> None:
    """Makes sums of what rows gave; until then a tree's nodes are held."""
    if exchange is not None:
        exchange.merge(sums)()
    for part in sums:
        part.finish()


def _fill(result: BandMap | None, row_blocks: Iterable[Tensor]) -> None:
    """Runs a sweep to its end; its rows are kept where a map is given."""
    for row_block in row_blocks:
        if result is not None:
            result.write(row_block)
        del row_block
    if result is not None:
        result.finish()


def _told_of_rows(
    row_blocks: Iterable[Tensor], height: float, on_share: Callable[[float], None] | None
) -> Iterator[Tensor]:
    """The same row blocks. When the next one is asked for, it is told how much of `height` rows there was so far."""
    rows = 0
    for row_block in row_blocks:
        rows += row_block.shape[1]
        yield row_block
        del row_block
        if on_share is not None:
            on_share(min(1.0, rows / height))


def _modules_of(unit: Unit) -> list[nn.Module]:
    return [unit.module]


def _rows_at(scale: float, rows_at_1: float) -> int:
    """A row block's rows where the map is `scale` times the size of the network's input, at least one."""
    return max(1, ceil(scale * rows_at_1))


def _check_route(count: int, heights: Sequence[int], starts: Sequence[int]) -> None:
    if len(heights) != count or min(heights) < 1:
        raise ValueError(f"heights must be one for each of {count} sweeps and at least 1 row, not {list(heights)}")
    if len(starts) != count:
        raise ValueError(f"starts must be one for each of {count} sweeps, not {list(starts)}")
    for index, start in enumerate(starts):
        if not 0 <= start <= index:
            raise ValueError(f"sweep {index} cannot start from map {start}: only from maps 0 to {index} (0: the input)")


def _check_input(first: nn.Conv2d | DCDownBlock2d, image: Tensor, streamed: bool) -> None:
    conv = first.conv if is_down_block(first) else first
    check_dense(conv)
    weight = conv.weight
    # What is made real for a while may lie elsewhere, or in another type, until then.
    dtype, device = (image.dtype, image.device) if streamed else (weight.dtype, weight.device)
    expected = (weight.shape[1], dtype, device)
    given = (image.shape[1], image.dtype, image.device)
    if given != expected or not image.numel():
        raise ValueError(f"expected channels, type and device {expected}, not {given} of shape {tuple(image.shape)}")


@torch.no_grad()
def decode_rows(
    decoder: Decoder,
    latent: Tensor,
    strip_rows: int | None = None,
    *,
    heights: Sequence[int] | None = None,
    **options: Unpack[StreamOptions],
) -> Generator[Tensor, None, None]:
    """The decoder of an `AutoencoderDC`, row by row, from top to bottom.

    decoder: diffusers' `AutoencoderDC.decoder`, in eval mode. latent: `[B, C, h, w]` in the decoder's dtype and on its
    device, not scaled. strip_rows: rows of the map at the last attention to take at a time; None lets the size decide.
    Yields `[B, 3, rows, W]`; together the same values as `decoder(latent)` up to the order of summation. On the CPU
    they are the same to the bit whatever the other arguments:

    heights: in place of strip_rows, for every sweep the rows that it takes of the map at its own attention (of the
    latent in sweep 0); elsewhere it takes as much of the picture, but at least one row.
    starts: for every sweep the number of the sweep whose map it starts from. `starts[i] == i` is the ordinary way; an
    earlier one repeats the sweeps from that one to i, 0 from the latent. A map is stored if a sweep starts from it,
    and freed with the last that does.
    new_map: makes the map that a sweep starts from, out of the sweep's number and the map's height in rows; its default
    is `RowMap`. It is closed at its end, and when the decoding is abandoned.
    materialize: a context manager in which the parameters and buffers of the modules that it is given are real, in the
    latent's dtype and on its device; outside they may be elsewhere, or on the meta device. It is entered while a
    module's weights are laid out, before the sweep runs.
    on_sweep: told after each sweep its number, from 1, and how many there are. on_rows: told between two row blocks of
    every sweep. What either raises ends the decoding.
    exchange: of the latent's rows, where several ranks make a band each. The latent is whole on every rank, which
    yields the rows of its own band; starts must be the same on all.

    Raises ValueError for a latent that does not fit, and for heights or starts that cannot be.
    """
    _check_input(decoder.conv_in, latent, options.get("materialize") is not None)
    height, width = latent.shape[2:]
    sweeps = cut_at_barriers(decoder_units(decoder), height, width)
    if heights is None:
        heights = strip_heights(sweeps, latent, strip_rows)
    map_ = latent.permute(0, 2, 3, 1).contiguous()

    def row_blocks_of(rows: int, of: range) -> Iterator[Tensor]:
        return cut(map_[:, of.start : of.stop], rows)

    row_blocks = stream(sweeps, row_blocks_of, (height, width), heights, **options)
    with closing(row_blocks):
        for row_block in row_blocks:
            yield row_block.permute(0, 3, 1, 2)
            del row_block


@torch.no_grad()
def encode(
    encoder: Encoder,
    image: Tensor,
    strip_rows: int | None = None,
    *,
    heights: Sequence[int] | None = None,
    **options: Unpack[StreamOptions],
) -> Tensor:
    """The encoder of an `AutoencoderDC`, row by row: image `[B, 3, H, W]` -> latent `[B, C, h, w]`, not scaled.

    The other arguments are as in `decode_rows`; the image is whole on every rank, and so is the latent.
    """
    _check_input(encoder.conv_in, image, options.get("materialize") is not None)
    height, width = image.shape[2:]
    if heights is None:
        heights = strip_heights(cut_at_barriers(encoder_units(encoder), height, width), image, strip_rows)
    map_ = image.permute(0, 2, 3, 1)

    def row_blocks_of(rows: int, of: range) -> Iterator[Tensor]:
        return (row_block.contiguous() for row_block in cut(map_[:, of.start : of.stop], rows))

    return encode_row_blocks(encoder, row_blocks_of, height, width, heights, **options)


@torch.no_grad()
def encode_row_blocks(
    encoder: Encoder,
    row_blocks_of: RowBlocksOf,
    height: int,
    width: int,
    heights: Sequence[int],
    **options: Unpack[StreamOptions],
) -> Tensor:
    """`encode` of an image that need not exist: `row_blocks_of(rows, of)` gives its rows `of` from top to bottom, `[B,
    rows, width, 3]` contiguous in the encoder's dtype, as often as a sweep starts from it. Raises ValueError as
    `encode`.
    """
    units = encoder_units(encoder)
    ratio = round(1 / units[-1].in_scale)
    if height % ratio or width % ratio:
        raise ValueError(f"an image of {width}x{height} cannot be encoded: its sides must be multiples of {ratio}")
    exchange = options.get("exchange")
    if exchange is not None:
        options["exchange"] = exchange.scaled(ratio)
    row_blocks = stream(cut_at_barriers(units, height, width), row_blocks_of, (height, width), heights, **options)
    latent = torch.cat(list(row_blocks), dim=1).permute(0, 3, 1, 2).contiguous()
    return latent if exchange is None else exchange.whole(latent, dim=2)
