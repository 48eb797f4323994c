"""The shape of an `AutoencoderDC`'s decoder as sweeps: bytes, FLOPs and weights of each, from the spec alone.

It mirrors what banded/autoencoder/ builds from the module itself; tests hold the two together. Bytes are those of
tensors, on a CPU with oneDNN, for one picture. By unit, for r rows of its input, all of them W wide:

    kind        line buffers (rows x channels)    waiting in queues     at work
    conv_in     2 x Cin                           -                     r Cin + r C, twice where channels are repeated
    res_block   2 x C, 2 x C                      2 x C                 2 r C
    mix_ffn     2 x 8C                            1 x C                 r C + 12 r C
    attention   (k-1) x I for a scale of size k   2 x C and 2 x I       r C + (3 + S) r I
    sums        (k-1) x 2I for a scale of size k  -                     r C + 4 r I
    up, folded  2 x C                             -                     4 r K out and 2 r K being made
    up, shuffle 2 x C                             -                     12 r K
    norm_out    -                                 -                     r C
    conv_out    2 x C                             -                     r C + r K
    down        3 x C                             -                     r C + r K / 2
    mean_out    2 x C                             -                     r C + 2 r K

I = heads * head_dim, S = scales with the plain one, K the channels that go out. A pass also has one workspace as large
as its largest window, and keeps the sums of its attentions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from handscroll.models.autoencoder import AutoencoderSpec
from handscroll.plan.inputs import MIB

# Norms and gates of half precision are made in fp32, a piece of this size at a time.
FP32_PIECES_BYTES = 4 * MIB


@dataclass(frozen=True, slots=True)
class UnitShape:
    """One step of the decoder on a map `scale` times the latent's size, whose sides it multiplies by `factor`.

    kind: as in the table above. channels come in, out_channels go out. scales: kernel sizes of an attention's scales
    beyond the plain one. parameters: of its module. macs: multiplications with additions for one pixel of its input.
    """

    kind: str
    scale: int
    channels: int
    out_channels: int
    parameters: int
    macs: int
    factor: float = 1
    scales: tuple[int, ...] = ()
    head_dim: int = 1
    folded: bool = True
    norm: str = "rms_norm"

    @property
    def inner(self) -> int:
        """Channels of an attention's queries, a scale."""
        return self.channels // self.head_dim * self.head_dim

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Size and channels of its line buffers."""
        match self.kind:
            case "conv_in" | "conv_out" | "mean_out" | "up":
                return [(3, self.channels)]
            case "down":
                return [(4, self.channels)]
            case "res_block":
                return [(3, self.channels), (3, self.channels)]
            case "mix_ffn":
                return [(3, 8 * self.channels)]
            case "attention":
                return [(size, self.inner) for size in self.scales]
            case "sums":
                return [(size, 2 * self.inner) for size in self.scales]
        return []

    @property
    def lag_rows(self) -> int:
        """Rows by which its slowest scale lags, which the flush at the end gives at once."""
        return max((size // 2 for size in self.scales), default=0)

    @property
    def queued_channels(self) -> int:
        """Rows times channels that wait for a slower branch."""
        match self.kind:
            case "res_block":
                return 2 * self.channels
            case "mix_ffn":
                return self.channels
            case "attention":
                joined = sum((self.lag_rows - size // 2) * self.inner for size in (1, *self.scales))
                return self.lag_rows * self.channels + joined
        return 0

    @property
    def widest_channels(self) -> int:
        """The most channels that it holds for a pixel of its output."""
        match self.kind:
            case "mix_ffn":
                return 8 * self.channels
            case "attention":
                return 3 * self.inner * (1 + len(self.scales))
        return max(int(self.channels / self.factor**2), self.out_channels)

    @property
    def laid_out(self) -> int:
        """Numbers that it holds for a pass, laid out for its kernels."""
        inner, channels = self.inner, self.channels
        of_scales = sum(size**2 + self.head_dim for size in self.scales)
        match self.kind:
            case "attention":
                return inner * (channels + of_scales) + inner * (1 + len(self.scales)) * channels
            case "sums":
                return 2 * inner * (channels + of_scales)
            case "up" if self.folded:
                return 16 * channels * self.out_channels
        return self.parameters

    def layout_bytes(self, element_bytes: int) -> int:
        """What laying its weights out takes for a moment beside the original and the result."""
        match self.kind:
            case "attention":
                return self.inner * self.channels * element_bytes
            case "sums":
                return 2 * self.inner * self.channels * element_bytes
            case "up" if self.folded:  # taps are added in fp32
                return max(8 * element_bytes, 16 if element_bytes == 2 else 12) * self.channels * self.out_channels
        return 0

    def working_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """The most that it holds at once, beside its line buffers and queues, for so many rows of its input."""
        channels, out_channels, inner, scales = self.channels, self.out_channels, self.inner, 1 + len(self.scales)
        normed = (rows * channels if element_bytes == 4 else 3 * rows * channels) if self.norm == "batch_norm" else 0
        rows = max(rows, self.lag_rows)
        match self.kind:
            case "conv_in":
                elements = rows * channels + rows * out_channels * (2 if out_channels != channels else 1)
            case "res_block":
                elements = 2 * rows * channels + normed
            case "mix_ffn":
                elements = 13 * rows * channels
            case "attention":
                joined = (3 if scales > 1 and rows > 1 else 2) * rows * inner + scales * rows * inner
                attended = scales * rows * inner + 4 * inner * 4 // element_bytes
                given = scales * rows * inner + rows * channels + normed
                elements = rows * channels + max(joined, attended, given)
            case "sums":
                made = (4 if scales > 1 else 2) * rows * inner
                elements = rows * channels + max(made, 2 * rows * inner + 3 * inner * 4 // element_bytes)
            case "up" if self.folded:
                made = max(rows * channels, 4 * rows * out_channels) * columns
                return (made + 2 * rows * out_channels * (columns + 1)) * element_bytes
            case "up" if self.factor == 2 and self.parameters == 9 * channels * out_channels + out_channels:
                elements = 4 * (rows + 2) * channels + 4 * rows * out_channels  # the doubled map, and its convolution
            case "up":
                elements = 12 * rows * out_channels
            case "norm_out":
                elements = rows * channels
            case "down":
                elements = rows * channels + rows * out_channels // 2
            case "mean_out":
                elements = rows * channels + 2 * rows * out_channels
            case _:
                elements = rows * channels + rows * out_channels
        return elements * columns * element_bytes

    def unfused_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """What it holds beside without fused kernels: all windows, or of a depthwise convolution its results twice."""
        channels, out_channels, inner = self.channels, self.out_channels, self.inner
        match self.kind:
            case "mix_ffn":
                elements = 8 * rows * channels
            case "attention" | "sums":
                elements = 2 * max(rows, self.lag_rows) * inner
            case "up" if self.folded:
                elements = 5 * (rows + 1) * channels + 2 * rows * out_channels
            case "up" if self.factor == 2 and self.parameters == 9 * channels * out_channels + out_channels:
                elements = 36 * (rows + 2) * channels
            case "down" if self.parameters > 2 * self.macs:  # a stride of two, and no pixel_unshuffle
                elements = 9 * rows * channels // 4
            case "norm_out":
                return 0
            case _:
                elements = 9 * rows * channels
        return elements * columns * element_bytes


def decoder_units(spec: AutoencoderSpec) -> Iterator[UnitShape]:
    """The units of the decoder, in the order they run."""
    channels, layers = spec.decoder_block_out_channels, spec.decoder_layers_per_block
    yield conv("conv_in", 1, spec.latent_channels, channels[-1])
    scale = 1
    for stage in reversed(range(len(channels))):
        if not layers[stage]:
            continue
        width, norm = channels[stage], spec.decoder_norm_types[stage]
        if stage < len(channels) - 1:
            yield _up(spec, scale, channels[stage + 1], width)
            scale *= 2
        if spec.decoder_block_types[stage] == "ResBlock":
            block = [res_block(scale, width, norm)]
        else:
            block = efficient_vit(spec, scale, width, spec.decoder_qkv_multiscales[stage], norm)
        yield from block * layers[stage]
    last = channels[0] if layers[0] > 0 else channels[1]
    yield UnitShape("norm_out", scale, last, last, 2 * last, 0)
    if layers[0] > 0:
        yield conv("conv_out", scale, last, spec.in_channels)
    else:
        yield _up(spec, scale, last, spec.in_channels)


def conv(kind: str, scale: int, channels: int, out_channels: int) -> UnitShape:
    """A 3x3 convolution."""
    macs = 9 * channels * out_channels
    return UnitShape(kind, scale, channels, out_channels, macs + out_channels, macs)


def _up(spec: AutoencoderSpec, scale: int, channels: int, out_channels: int) -> UnitShape:
    products = channels * out_channels
    if spec.upsample_block_type == "interpolate":  # four convolutions of 2x2 in place of one of 3x3 on the doubled map
        return UnitShape("up", scale, channels, out_channels, 9 * products + out_channels, 16 * products, factor=2)
    parameters = 4 * (9 * products + out_channels)
    return UnitShape("up", scale, channels, out_channels, parameters, 36 * products, factor=2, folded=False)


def efficient_vit(spec: AutoencoderSpec, scale: int, width: int, scales: tuple[int, ...], norm: str) -> list[UnitShape]:
    """An `EfficientViTBlock`: an attention over `scales` and a Mix-FFN."""
    hidden = 4 * width
    macs = 3 * width * hidden + 18 * hidden
    feed_forward = UnitShape("mix_ffn", scale, width, width, macs + 4 * hidden + 2 * width, macs)
    return [_attention(spec, scale, width, scales, norm), feed_forward]


def res_block(scale: int, width: int, norm: str) -> UnitShape:
    """A `ResBlock`."""
    macs = 18 * width**2
    return UnitShape("res_block", scale, width, width, macs + 3 * width, macs, norm=norm)


def _attention(spec: AutoencoderSpec, scale: int, width: int, scales: tuple[int, ...], norm: str) -> UnitShape:
    head_dim = spec.attention_head_dim
    inner = width // head_dim * head_dim
    weights = 3 * width * inner + inner * (1 + len(scales)) * width
    weights += sum(3 * inner * size**2 + 3 * inner * head_dim for size in scales)
    macs = weights + (1 + len(scales)) * 2 * inner * (head_dim + 1)
    return UnitShape(
        "attention", scale, width, width, weights + 2 * width, macs, scales=scales, head_dim=head_dim, norm=norm
    )


@dataclass(frozen=True, slots=True)
class PassShape:
    """What one pass over the rows takes beside maps: while it runs, and before that, while weights are laid out."""

    running_bytes: int
    weight_bytes: int
    layout_bytes: int
    flops: float
    calls: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + max(self.running_bytes, self.layout_bytes)


@dataclass(frozen=True)
class DecoderShape:
    """The decoder of a latent of `rows` x `columns`, cut at its attentions as banded/autoencoder/ cuts it.

    Sweep i begins with attention i, but for sweep 0; a latent of a few pixels has fewer barriers. `columns` are those
    of all pictures of a batch together. fused: whether the device has fused kernels, such as oneDNN's, for the type.
    resident: the weights are there anyway, laying them out brings none; and maps are counted to less than a chunk.
    """

    spec: AutoencoderSpec
    rows: int
    columns: int
    element_bytes: int
    batch: int = 1
    fused: bool = True
    resident: bool = False

    def units(self) -> Iterator[UnitShape]:
        """The network's units, in the order they run."""
        return decoder_units(self.spec)

    @cached_property
    def sweeps(self) -> tuple[tuple[UnitShape, ...], ...]:
        sweeps: list[list[UnitShape]] = [[]]
        for unit in self.units():
            if unit.kind == "attention" and self.rows * self.columns * unit.scale**2 > unit.head_dim * self.batch:
                sweeps.append([])
            sweeps[-1].append(unit)
        return tuple(map(tuple, sweeps))

    def __len__(self) -> int:
        return len(self.sweeps)

    def map_rows(self, index: int) -> int:
        """Of the map that sweep `index` starts from."""
        return self.rows * self.sweeps[index][0].scale

    def map_bytes(self, index: int) -> int:
        """The map that sweep `index` starts from; nothing for the first, whose input is the latent."""
        first = self.sweeps[index][0]
        return self.map_rows(index) * self.columns * first.scale * first.channels * self.element_bytes if index else 0

    def row_bytes(self, index: int) -> int:
        """What the largest activation of sweep `index` holds for one row of its map."""
        own = self.sweeps[index][0].scale
        widest = max(unit.widest_channels * (unit.scale * unit.factor) ** 2 for unit in self.sweeps[index])
        return int(widest * self.columns * self.element_bytes // own)

    @cached_property
    def _parts(self) -> tuple[tuple[tuple[_Part, ...], _Part | None], ...]:
        """Of every sweep its units, and the sums that it makes for the next one's attention."""
        given = (self.element_bytes, self.resident, self.fused)
        parts = {
            id(unit): _Part.of(unit, *given, leads=index > 0 and unit is sweep[0])
            for index, sweep in enumerate(self.sweeps)
            for unit in sweep
        }
        sums = [_Part.of(replace(sweep[0], kind="sums"), *given, leads=True) for sweep in self.sweeps[1:]]
        return tuple(
            (tuple(parts[id(unit)] for unit in sweep), side)
            for sweep, side in zip(self.sweeps, [*sums, None], strict=True)
        )

    def pass_shape(self, start: int, index: int, strip_rows: int) -> PassShape:
        """The pass that makes sweep `index` from map `start`, `strip_rows` rows of map `index` at a time."""
        own, element_bytes = self.sweeps[index][0].scale, self.element_bytes
        parts = [part for each, _ in self._parts[start : index + 1] for part in each]
        if (side := self._parts[index][1]) is not None:
            parts.append(side)
        working = workspace = waiting = 0
        for part in dict.fromkeys(parts):  # layers of the same shape on the same map are one
            unit = part.unit
            columns, row_block = self.columns * unit.scale, _rows_at(strip_rows, unit.scale, own)
            rows = min(row_block, self.rows * unit.scale)
            for size, channels in part.windows:
                workspace = max(workspace, (size - 1 + max(rows, size // 2)) * channels * columns * element_bytes)
            at_work = unit.working_bytes(rows, columns, element_bytes)
            if not self.fused:
                at_work += max(unit.unfused_bytes(rows, columns, element_bytes), min(FP32_PIECES_BYTES, at_work))
            working = max(working, waiting + at_work)
            if rows * unit.factor > _rows_at(strip_rows, int(unit.scale * unit.factor), own):
                # What comes out is cut to fewer rows; the others wait above the units that follow.
                waiting += int(rows * unit.out_channels * columns * unit.factor**2) * element_bytes
        attentions = [sweep[0] for sweep in self.sweeps[1 : index + 2]]
        sums = sum(4 * unit.inner * (unit.head_dim + 1) * (1 + len(unit.scales)) for unit in attentions)
        if element_bytes == 2 and self.fused:
            working += min(FP32_PIECES_BYTES, working)
        held = sum(part.held_channels for part in parts) * self.columns * element_bytes
        return PassShape(
            running_bytes=held + workspace + sums + working,
            weight_bytes=sum(part.laid_out_bytes for part in parts),
            layout_bytes=max(part.layout_bytes for part in parts) + sums,
            flops=2.0 * self.rows * self.columns * sum(part.macs for part in parts),
            calls=8 * len(parts),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A unit and what it takes whatever the row blocks: the same of every unit of this shape on this map.

    held_channels: rows x channels of line buffers and queues, and macs, both for one pixel of the latent's width or
    area.
    """

    unit: UnitShape
    windows: tuple[tuple[int, int], ...]
    held_channels: int
    laid_out_bytes: int
    layout_bytes: int
    macs: int

    @staticmethod
    def of(unit: UnitShape, element_bytes: int, resident: bool, fused: bool, leads: bool) -> _Part:
        """leads: whether a sweep begins with it; an attention that does not is called as it is."""
        lent_bytes = 0 if resident else unit.parameters * element_bytes
        called = unit.kind == "attention" and not leads
        as_it_is = resident and (called or (not fused and unit.laid_out == unit.parameters))
        buffered = sum((size - 1) * channels for size, channels in unit.windows)
        return _Part(
            unit,
            tuple(unit.windows),
            (buffered + unit.queued_channels) * unit.scale,
            0 if as_it_is else unit.laid_out * element_bytes,
            (0 if as_it_is else unit.layout_bytes(element_bytes)) + lent_bytes,
            unit.macs * unit.scale**2,
        )


def _rows_at(strip_rows: int, scale: int, own: int) -> int:
    """A row block's rows where the map is `scale` times the latent's size, given those at `own`; at least one."""
    return max(1, -(-strip_rows * scale // own))
