"""The units of an `AutoencoderDC` as shapes: bytes, FLOPs and weights of each, from the spec alone.

They mirror what banded/autoencoder/ builds from the module itself; tests hold the two together. Bytes are those of
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

I = heads * head_dim, S = scales with the plain one, K the channels that go out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from handscroll.models.autoencoder import AutoencoderSpec


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
    def reach(self) -> int:
        """The input rows above and below its own that an output row depends on; a whole attention is no such unit."""
        match self.kind:
            case "res_block":
                return 2
            case "attention" | "sums":
                return self.lag_rows
            case "norm_out":
                return 0
        return 1

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

    def called_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """What an attention holds that is called as the module that it is, on a whole map of a few pixels.

        At the most its input, queries, keys and values of each scale, all of them together, each of the three once
        more, what they give, and the scores of every head.
        """
        positions, channels = rows * columns, self.inner * (1 + len(self.scales))
        scores = channels // self.head_dim * positions**2
        return (positions * (10 * channels + self.channels) + scores) * element_bytes

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
