"""The decoding stage: which maps are kept, spilled or recomputed, and how tall the row blocks of each sweep are.

A decoder with n barriers takes n + 1 sweeps; sweep i starts from map i, the input of attention i (map 0 is the latent).
Encoding is planned by the same arithmetic, and map 0 is then the image.
A map that is spilled lives on the host or in a file. A map that is recomputed never exists: the sweep that needs it
starts from an earlier one and repeats the layers in between. All ways give the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from handscroll.limits import CUDA_STRIP_BYTES, MAP_CHUNK_BYTES, STRIP_BYTES, few_heights_below
from handscroll.plan.decoder_shape import DecoderShape, PassShape
from handscroll.plan.host import host_map_bytes
from handscroll.plan.inputs import Hardware, heights_up_to
from handscroll.plan.store import Store

# What calling one operator for a row block costs, whatever its size.
SECONDS_A_CALL = 5e-5


@dataclass(frozen=True, slots=True)
class SweepStage:
    """`strip_rows` of its input at a time; `start`: the sweep whose input map it begins from; `store`: where that of
    its own lives, which is nowhere (None) if no sweep begins from it."""

    strip_rows: int
    start: int
    store: Store | None
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeStage:
    """The sweeps in order. `peak_bytes` of the whole stage; `seconds` by the hardware's rates."""

    sweeps: tuple[SweepStage, ...]
    peak_bytes: int
    seconds: float

    @property
    def strip_rows(self) -> tuple[int, ...]:
        return tuple(sweep.strip_rows for sweep in self.sweeps)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(sweep.start for sweep in self.sweeps)

    def share_done(self, index: int, share: float) -> float:
        """How much of the stage is done, 0 to 1, when `share` of sweep `index` is, by planned seconds."""
        seconds = [sweep.seconds for sweep in self.sweeps]
        return (sum(seconds[:index]) + share * seconds[index]) / self.seconds if self.seconds else 0.0

    @property
    def spilled(self) -> bool:
        return any(sweep.store in ("host", "disk") for sweep in self.sweeps)

    @property
    def recomputed(self) -> bool:
        return any(sweep.store is None for sweep in self.sweeps)


def decode_stages(
    shape: DecoderShape,
    precision: str,
    hardware: Hardware,
    limit_bytes: int | None,
    strip_rows: int | None = None,
    held_bytes: int = 0,
    kept_bytes: int = 0,
) -> Iterator[DecodeStage]:
    """Every way worth considering, each with the fastest row blocks that the limit lets; else with the smallest.

    `strip_rows` fixes the height in the last sweep, and the others' by the same bytes. `held_bytes` are there all the
    time, beside what the stage itself makes; so are `kept_bytes` of weights, which then need not be read.
    """
    reads = not kept_bytes
    for route in _routes(shape, precision, hardware, strip_rows, held_bytes + kept_bytes, reads):
        sweeps = []
        for options in route:
            fitting = (option for option in options if limit_bytes is None or option.peak_bytes <= limit_bytes)
            sweeps.append(next(fitting, None) or min(options, key=_by_bytes))
        yield DecodeStage(
            tuple(sweeps), max(sweep.peak_bytes for sweep in sweeps), sum(sweep.seconds for sweep in sweeps)
        )


def taller(
    shape: DecoderShape, precision: str, hardware: Hardware, stage: DecodeStage, limit_bytes: int, held_bytes: int = 0
) -> DecodeStage:
    """The same way with the tallest row blocks that the limit lets; `decode_stages` tries powers of two."""
    held_bytes += _latent_bytes(shape)
    stores = [sweep.store for sweep in stage.sweeps]
    layout = _Layout(shape, stage.starts, stores, precision, hardware, held_bytes, reads=False)
    sweeps = []
    for index, sweep in enumerate(stage.sweeps):
        fitting, too_tall = sweep.strip_rows, _most_rows(shape, index, hardware) + 1
        while too_tall - fitting > 1:
            rows = (fitting + too_tall) // 2
            tried = few_heights_below(rows) if hardware.is_cuda else rows
            if tried <= sweep.strip_rows:
                fitting = rows
                continue
            made = layout.sweep(index, tried, shape.pass_shape(sweep.start, index, tried))
            if made.peak_bytes <= limit_bytes:
                fitting, sweep = rows, made
            else:
                too_tall = rows
        sweeps.append(sweep)
    return DecodeStage(tuple(sweeps), max(sweep.peak_bytes for sweep in sweeps), sum(sweep.seconds for sweep in sweeps))


def _latent_bytes(shape: DecoderShape) -> int:
    return shape.rows * shape.columns * shape.spec.latent_channels * (4 + 2 * shape.element_bytes)


def _by_seconds(option: SweepStage) -> tuple[float, int]:
    return option.seconds, option.peak_bytes


def _by_bytes(option: SweepStage) -> tuple[int, float]:
    return option.peak_bytes, option.seconds


@lru_cache(
    maxsize=32
)  # a job asks several times: for its budget, for the least, for what may be kept, for the next try
def _routes(
    shape: DecoderShape, precision: str, hardware: Hardware, strip_rows: int | None, held_bytes: int, reads: bool
) -> tuple[tuple[tuple[SweepStage, ...], ...], ...]:
    """For every layout, for every sweep, what each row block height makes of it, the fastest first."""
    held_bytes += _latent_bytes(shape)
    heights = [_heights(shape, index, hardware, strip_rows) for index in range(len(shape))]
    routes = []
    known: dict[tuple[object, ...], tuple[SweepStage, ...]] = {}

    @cache
    def passes(start: int, index: int) -> list[PassShape]:
        return [shape.pass_shape(start, index, rows) for rows in heights[index]]

    for starts, stores in _layouts(shape, hardware):
        layout = _Layout(shape, starts, stores, precision, hardware, held_bytes, reads)
        route = []
        for index in range(len(shape)):
            start = starts[index]
            key = (index, start, stores[index : index + 2], stores[start], starts[index + 1 : index + 2] == [start])
            if key not in known:
                made = zip(heights[index], passes(start, index), strict=True)
                known[key] = tuple(sorted((layout.sweep(index, rows, each) for rows, each in made), key=_by_seconds))
            route.append(known[key])
        routes.append(tuple(route))
    return tuple(routes)


def _heights(shape: DecoderShape, index: int, hardware: Hardware, strip_rows: int | None) -> list[int]:
    """Row block heights to choose from: powers of two up to what makes the largest activation big."""
    row_bytes = shape.row_bytes(index)
    if strip_rows is not None:
        last = len(shape) - 1
        return [strip_rows if index == last else max(1, strip_rows * shape.row_bytes(last) // row_bytes)]
    return heights_up_to(_most_rows(shape, index, hardware))


def _most_rows(shape: DecoderShape, index: int, hardware: Hardware) -> int:
    """Beyond it nothing gets faster."""
    strip_bytes = CUDA_STRIP_BYTES if hardware.is_cuda else STRIP_BYTES
    most = max(1, min(shape.map_rows(index), strip_bytes // shape.row_bytes(index)))
    return few_heights_below(most) if hardware.is_cuda else most


def _layouts(shape: DecoderShape, hardware: Hardware) -> Iterator[tuple[list[int], tuple[Store | None, ...]]]:
    """For every sweep where it starts and where its input map lives: all kept, the largest spilled, or recomputed."""
    count = len(shape)
    rooms: dict[Store, int] = {"disk": hardware.scratch_bytes}
    if hardware.is_cuda:
        rooms["host"] = hardware.host_bytes
    for restart in _restarts(shape):
        starts = [min(index, restart) for index in range(count)]
        stored = set(starts)
        yield starts, tuple("memory" if index in stored else None for index in range(count))
        for first_spilled in sorted(stored - {0}):
            spilled = {index for index in stored if index >= first_spilled}
            for store, room_bytes in rooms.items():
                if _spilled_bytes(shape, spilled, store) <= room_bytes:
                    yield (
                        starts,
                        tuple(
                            (store if index in spilled else "memory") if index in stored else None
                            for index in range(count)
                        ),
                    )


def _restarts(shape: DecoderShape) -> list[int]:
    """The sweep behind whose start nothing is stored: the last (nothing is recomputed), or where maps begin to grow."""
    last = len(shape) - 1
    return [last, *(index for index in reversed(range(last)) if shape.map_bytes(index) != shape.map_bytes(index + 1))]


def _spilled_bytes(shape: DecoderShape, spilled: set[int], store: Store) -> int:
    """The most that lies there at one time: two maps, one being read while the next is written."""
    sizes = ((shape.map_bytes(index), shape.map_rows(index)) for index in spilled)
    return sum(sorted((host_map_bytes(*size) if store == "host" else size[0] for size in sizes), reverse=True)[:2])


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where sweeps start and maps live, and what that makes of a sweep."""

    shape: DecoderShape
    starts: Sequence[int]
    stores: Sequence[Store | None]
    precision: str
    hardware: Hardware
    held_bytes: int  # the latent, and what a caller holds
    reads: bool  # whether weights come from the file

    def sweep(self, index: int, strip_rows: int, made: PassShape) -> SweepStage:
        start, rates = self.starts[index], self.hardware.rates
        row_blocks = -(-self.shape.map_rows(index) // strip_rows)
        seconds = made.flops / rates.flops(self.precision) + row_blocks * made.calls * SECONDS_A_CALL
        seconds += made.weight_bytes / rates.weight_bytes if self.reads else 0.0
        for place in (start, index + 1):  # the map that is read, and the one that is written
            store = self.stores[place] if 0 < place < len(self.shape) else None
            if store in ("disk", "host"):
                rate = rates.disk_bytes if store == "disk" else rates.host_bytes
                seconds += self.shape.map_bytes(place) / rate
        peak_bytes = made.peak_bytes + self._map_bytes(index) + self._halo_bytes(index) + self.held_bytes
        return SweepStage(strip_rows, start, self.stores[index], peak_bytes, seconds)

    def _halo_bytes(self, index: int) -> int:
        """Of the map that a sweep reads the rows of other ranks; of the one that it makes those that they need."""
        made = self.shape.halo_bytes(index + 1, self.starts) if index + 1 < len(self.shape) else 0
        return self.shape.halo_bytes(self.starts[index], self.starts) + made

    def _map_bytes(self, index: int) -> int:
        """Device bytes of the maps that a sweep reads and writes."""
        start = self.starts[index]
        source = self._kept_bytes(start)
        result = self._kept_bytes(index + 1) if index + 1 < len(self.shape) else 0
        chunks = min(source, MAP_CHUNK_BYTES) + min(result, MAP_CHUNK_BYTES)
        if self.shape.resident:
            chunks = min(chunks, min(source, result))
        if any(later == start for later in self.starts[index + 1 :]):  # read again, and so not freed behind the reader
            return source + result + chunks
        return max(source, result) + chunks

    def _kept_bytes(self, index: int) -> int:
        return self.shape.map_bytes(index) if self.stores[index] == "memory" else 0
