"""The denoising stage: bytes and FLOPs of the transformer in row blocks, and the ways to run it within a budget.

Only the residual stream is whole, a map of tokens x width for each branch (with and without the prompt). Layers stay in
memory or are read anew at every step; row blocks are as tall as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from handscroll.bands import Bands
from handscroll.limits import (
    BAND_BYTES,
    CUDA_BAND_BYTES,
    CUDA_SLAB_CHANNELS,
    SLAB_CHANNELS,
    SLAB_MULTIPLE,
    SLOTS,
    tree_nodes,
)
from handscroll.models.quantisation import NATIVE, Quantisation, WeightCost, weight_cost
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.host import host_map_bytes, layers_on_host, staging_bytes
from handscroll.plan.inputs import Hardware, heights_up_to
from handscroll.plan.precision import BYTES
from handscroll.plan.store import Store, stored_bytes

# Rows of a branch with a short text take less work, so that a rank may have more of them.
UNEVEN = 1.1
# What calling a layer's operators costs for a row block, whatever its size.
SECONDS_A_BAND = 1e-3
# Laid out for a CPU's kernels, matrices take a layer's memory again and save this share of the computing.
LAID_OUT_GAIN = 0.05
LAYING_OUT_BYTES = 1.5e9  # a second
# Of the time that reading layers takes beside computing, this much shows.
READING_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class DenoiseStage:
    """`band_rows` of the token map at a time; `resident_layers` of the transformer's layers stay in memory.

    `together`: guidance's branches pass through each layer one after another, so that it is read once a step; else one
    forward follows the other, and one residual stream exists at a time. `residual` is where the streams live between
    row blocks. `lay_out`: a layer is laid out for the CPU's kernels, beside itself. Beside a CUDA device,
    `host_layers` of those that are read anew are kept in the host's memory, of which they take `host_bytes`.
    `peak_bytes` of the whole stage; `seconds` by the hardware's rates. `embedders_pass`: what embeds a step's time and
    the prompt is read anew for every branch of a step, a matrix at a time.
    """

    band_rows: int
    resident_layers: int
    together: bool
    residual: Store
    lay_out: bool
    host_bytes: int
    peak_bytes: int
    seconds: float
    host_layers: int = 0
    embedders_pass: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is asked of the transformer: a token map of `rows` x `columns`, and so many forwards of so many steps.

    ranks: so many devices make a band of the rows each, in proportion to `speeds` where there are any; memory and work
    are those of the one with most rows.
    """

    rows: int
    columns: int
    tokens: int
    steps: int
    branches: int
    precision: str
    storage: str = ""  # what matrices are kept in
    stored: Quantisation | None = None  # how the files hold them; None: plainly
    ranks: int = 1
    speeds: tuple[float, ...] = ()

    @property
    def own_rows(self) -> int:
        """Those that a device makes."""
        if not self.speeds:
            return -(-self.rows // self.ranks)
        return Bands.of(self.rows, self.ranks, self.speeds).most_rows

    @property
    def positions(self) -> int:
        """Of the own rows."""
        return self.own_rows * self.columns

    @property
    def halo_rows(self) -> float:
        """Of others, next to the own ones, for each branch: a rank has rows of one, seldom of two."""
        return min(2, self.rows - self.own_rows) / self.branches


def denoise_stages(
    spec: TransformerSpec, job: Sampling, hardware: Hardware, limit_bytes: int | None, kept: bool = False
) -> Iterator[DenoiseStage]:
    """Every way to run it that is worth considering; those that keep layers resident keep as many as the limit lets.

    kept: all layers are in memory, whatever the limit.
    """
    sizes = _Sizes.of(spec, job, hardware)
    for residual, together in _residuals(hardware, job, sizes.stream_bytes, 0 if kept else sizes.layer.working_bytes):
        readings = job.steps * (1 if together else job.branches)
        held = sizes.streams_bytes(job.branches if together else 1, residual)
        moved_bytes = 0 if residual == "memory" else 3 * job.steps * job.branches * spec.num_layers * sizes.stream_bytes
        moving_seconds = moved_bytes / (hardware.rates.disk_bytes if residual == "disk" else hardware.rates.host_bytes)
        room_bytes = hardware.host_bytes
        room_bytes -= (job.branches + 1) * host_map_bytes(sizes.stream_bytes, job.own_rows) if residual == "host" else 0
        # What is multiplied in 8 bits has no other layout.
        layouts = (False,) if hardware.is_cuda or job.storage in NATIVE else (True, False)
        for band_rows, lay_out in product(band_heights(spec, job, hardware), layouts):
            calls = job.steps * job.branches * spec.num_layers * -(-job.own_rows // band_rows)
            working = held + sizes.weights_bytes + lay_out * sizes.layer.working_bytes
            working += native_bytes(spec, job, band_rows) + exchange_bytes(spec, job)
            working += band_bytes(
                spec, job.own_rows, job.columns, band_rows, job.tokens, BYTES[job.precision], sizes.slab_channels
            )
            laying_seconds = lay_out * readings * spec.num_layers * sizes.layer.working_bytes / LAYING_OUT_BYTES
            busy_seconds = sizes.compute_seconds * (1 - lay_out * LAID_OUT_GAIN) + laying_seconds
            most = _resident_layers(spec.num_layers, sizes, working, limit_bytes)
            for resident in {spec.num_layers} if kept else {0, most}:
                streamed = spec.num_layers - resident
                read = _reading(streamed, sizes.layer, readings, busy_seconds, hardware, room_bytes)
                made = resident + read.host_layers + readings * (streamed - read.host_layers)
                peak_bytes = working + resident * sizes.layer.resident_bytes + sizes.passing_bytes(streamed)
                seconds = read.seconds + moving_seconds + calls * SECONDS_A_BAND + made * sizes.layer.making_seconds
                # Where no layer stays, neither does what embeds: a unit of it at a time, before there is a layer.
                embedders_pass = resident == 0 and not hardware.is_cuda
                if embedders_pass:
                    before_bytes = held + sizes.weights_bytes + max(sizes.embedders_bytes)
                    peak_bytes = max(peak_bytes, before_bytes) - sum(sizes.embedders_bytes)
                    seconds += job.steps * job.branches * sum(sizes.embedders_bytes) / hardware.rates.weight_bytes
                yield DenoiseStage(
                    band_rows=band_rows,
                    resident_layers=resident,
                    together=together,
                    residual=residual,
                    lay_out=lay_out,
                    host_layers=read.host_layers,
                    host_bytes=read.host_bytes,
                    embedders_pass=embedders_pass,
                    peak_bytes=peak_bytes,
                    seconds=seconds,
                )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What all ways to run it have in common.

    layer: what one of them takes, of which those that do not stay pass through `slots` buffers. weights_bytes: all
    other weights; embedders_bytes: of these each unit of what embeds. beside_bytes: the prompts' embeddings and the
    sampler's maps. stream_bytes: a residual stream. compute_seconds: of all steps.
    """

    layer: WeightCost
    slots: int
    on_device: bool
    slab_channels: int
    weights_bytes: int
    embedders_bytes: tuple[int, ...]
    beside_bytes: int
    stream_bytes: int
    compute_seconds: float

    @classmethod
    def of(cls, spec: TransformerSpec, job: Sampling, hardware: Hardware) -> _Sizes:
        element_bytes = BYTES[job.precision]
        text_bytes = job.branches * job.tokens * (3 * spec.width + spec.caption_channels) * element_bytes
        samples_bytes = 8 * 4 * job.rows * job.columns * spec.patch_size**2 * max(spec.in_channels, spec.out_channels)
        flops = job.steps * job.branches * forward_flops(spec, job)
        return cls(
            layer=layer_cost(spec, job),
            slots=SLOTS if hardware.is_cuda else 1,
            on_device=hardware.is_cuda,
            slab_channels=CUDA_SLAB_CHANNELS if hardware.is_cuda else SLAB_CHANNELS,
            weights_bytes=(spec.parameter_count - spec.num_layers * spec.block_parameter_count) * element_bytes,
            embedders_bytes=tuple(count * element_bytes for count in spec.embedder_units),
            beside_bytes=text_bytes + samples_bytes,
            stream_bytes=int(job.positions * spec.width * element_bytes * (UNEVEN if job.ranks > 1 else 1)),
            compute_seconds=flops / hardware.rates.flops(job.precision),
        )

    def streams_bytes(self, streams: int, residual: Store) -> int:
        """What is held beside weights and row blocks, of so many residual streams that are kept there."""
        held = self.beside_bytes + (streams - 1) * stored_bytes(self.stream_bytes, residual)
        return held + stored_bytes(self.stream_bytes, residual, rewritten=True)

    def passing_bytes(self, layers: int) -> int:
        """What a layer takes at work beside what is resident, where so many of them pass through memory."""
        layer, slots = self.layer, min(self.slots, layers)
        making_bytes = (layer.widened_bytes and layer.working_bytes) + layer.making_bytes
        if self.on_device:  # is sent what would be resident, and makes that wide
            return slots * layer.resident_bytes + making_bytes
        # On a CPU the buffer that is filled from a file is that in which a layer is wide.
        return making_bytes if layer.widened_bytes else slots * layer.working_bytes + making_bytes


@dataclass(frozen=True, slots=True)
class _Reading:
    """Layers that are read anew: how many of them the host keeps, what that takes, and computing with reading."""

    host_layers: int
    host_bytes: int
    seconds: float


def _reading(
    streamed: int, layer: WeightCost, readings: int, busy_seconds: float, hardware: Hardware, room_bytes: int
) -> _Reading:
    """`readings` times so many layers, beside `busy_seconds` of computing. `room_bytes` of the host's memory."""
    rates = hardware.rates
    host_layers = host_bytes = 0
    if hardware.is_cuda and rates.host_bytes > rates.weight_bytes:  # else the file is as near
        host_layers, host_bytes = layers_on_host(streamed, layer.resident_bytes, room_bytes)
    a_reading = host_layers * layer.resident_bytes / rates.host_bytes
    a_reading += (streamed - host_layers) * layer.stored_bytes / rates.weight_bytes
    reading_seconds = readings * a_reading
    if hardware.is_cuda:  # on a stream of its own while a layer computes, and not quite for nothing
        seconds = max(busy_seconds, reading_seconds) + READING_SHARE * reading_seconds
    else:
        seconds = busy_seconds + reading_seconds
    return _Reading(host_layers, host_bytes, seconds)


def _residuals(
    hardware: Hardware, job: Sampling, stream_bytes: int, streamed_layer_bytes: int
) -> Iterator[tuple[Store, bool]]:
    """Where residual streams live, and whether all branches' exist at a time. Each is written as another is read."""
    yield "memory", True
    if job.branches > 1:
        yield "memory", False
    on_host_bytes = (job.branches + 1) * host_map_bytes(stream_bytes, job.own_rows) + staging_bytes(
        streamed_layer_bytes
    )
    if hardware.is_cuda and on_host_bytes <= hardware.host_bytes:
        yield "host", True
    if (job.branches + 1) * stream_bytes <= hardware.scratch_bytes:
        yield "disk", True


def _resident_layers(layers: int, sizes: _Sizes, other_bytes: int, limit_bytes: int | None) -> int:
    """The most layers that stay in memory within the limit; all but the last need room for those that pass through."""
    resident_bytes = sizes.layer.resident_bytes
    if limit_bytes is None or other_bytes + sizes.passing_bytes(0) + layers * resident_bytes <= limit_bytes:
        return layers
    free_bytes = limit_bytes - other_bytes - sizes.passing_bytes(layers)
    return max(0, min(layers - 1, free_bytes // resident_bytes))


def native_bytes(spec: TransformerSpec, job: Sampling, band_rows: int) -> int:
    """What a row block takes in 8 bits where it is multiplied so: itself, and what goes into the last matrix."""
    if job.storage not in NATIVE:
        return 0
    return job.columns * band_rows * (spec.width + spec.hidden_channels)


def bands_of_branches(
    spec: TransformerSpec,
    rows: int,
    columns: int,
    tokens: Sequence[int],
    ranks: int,
    speeds: Sequence[float] | None = None,
) -> list[Bands]:
    """Which rows of each branch's token map a rank makes; tokens: of each branch's text; speeds: as of `Bands.stacked`.

    Branches are stacked and cut into parts of equal work: so hardly any rank has a halo in more than one of them.
    """
    weights = [row_flops(spec, columns, count) for count in tokens]
    return Bands.stacked(rows, weights, ranks, halo_row_flops(spec, columns), speeds or None)


def row_flops(spec: TransformerSpec, columns: int, tokens: int) -> float:
    """Of a layer, what one row of tokens takes. A text of one token is not asked: its answer is known."""
    width, hidden = spec.width, spec.hidden_channels
    attention = 2 * columns * (4 * width**2 + 2 * width * spec.attention_head_dim)
    feed_forward = 2 * columns * (width * 2 * hidden + 9 * 2 * hidden + hidden * width)
    return float(attention + feed_forward) + (_asking_flops(spec, columns, tokens) if tokens > 1 else 0.0)


def _asking_flops(spec: TransformerSpec, columns: int, tokens: int) -> float:
    """Of a layer, what one row of tokens takes to ask a text."""
    return float(2 * columns * 2 * spec.width * spec.cross_width + 4 * columns * tokens * spec.cross_width)


def halo_row_flops(spec: TransformerSpec, columns: int) -> float:
    """Of a layer, what a row next to a band takes: the Mix-FFN's first matrix."""
    return float(2 * columns * spec.width * 2 * spec.hidden_channels)


def exchange_bytes(spec: TransformerSpec, job: Sampling) -> int:
    """What a layer holds of other ranks' rows and sums, and of its own on their way, for all branches together.

    Of each branch its first and last row before and after attention, and those next to them; the nodes of all sums.
    """
    if job.ranks == 1:
        return 0
    rows_bytes = 6 * job.columns * spec.width * BYTES[job.precision]
    nodes_bytes = 4 * tree_nodes(job.own_rows) * 4 * spec.width * (spec.attention_head_dim + 1)
    predicted_bytes = 2 * job.rows * job.columns * spec.patch_size**2 * spec.out_channels * BYTES[job.precision]
    return job.branches * (rows_bytes + nodes_bytes) + predicted_bytes


def layer_cost(spec: TransformerSpec, job: Sampling) -> WeightCost:
    """What one of its layers takes."""
    matrices, parameters = spec.block_matrices(), spec.block_parameter_count
    return weight_cost("transformer", job.storage, matrices, parameters, BYTES[job.precision], job.stored)


def band_heights(spec: TransformerSpec, job: Sampling, hardware: Hardware) -> list[int]:
    """Heights of row blocks to choose from, in rows of tokens: powers of two.

    Up to the height at which the widest activation takes `BAND_BYTES`, on CUDA `CUDA_BAND_BYTES`.
    """
    row_bytes = job.columns * 2 * spec.hidden_channels * BYTES[job.precision]
    most = min(job.own_rows, max(1, (CUDA_BAND_BYTES if hardware.is_cuda else BAND_BYTES) // row_bytes))
    return heights_up_to(most)


def forward_flops(spec: TransformerSpec, job: Sampling) -> float:
    """One forward: two a weight and position it meets, and the attentions themselves; any text is asked."""
    asking = _asking_flops(spec, job.columns, job.tokens) if job.tokens <= 1 else 0.0
    own = job.own_rows * (row_flops(spec, job.columns, job.tokens) + asking)
    halo = job.halo_rows * halo_row_flops(spec, job.columns)
    text = 2 * job.tokens * 2 * spec.width * spec.cross_width
    return spec.num_layers * (own + halo + text)


@lru_cache(maxsize=4096)
def band_bytes(
    spec: TransformerSpec,
    rows: int,
    columns: int,
    band_rows: int,
    tokens: int,
    element_bytes: int,
    slab_channels: int = SLAB_CHANNELS,
) -> int:
    """The most that a layer holds for one row block, beside weights and residual streams.

    Most of the time that is in its Mix-FFN, of a map of few columns where its attention's sums are made: those of a
    single row, of two, of four, ... The Mix-FFN's hidden channels are made a slab of at most `slab_channels` at a time
    (banded/transformer/); the gated half of them exists for the whole row block, and four rows of both halves in line
    buffers. The text's keys and values, the attention's sums and what is laid out of the depthwise convolution come on
    top.
    """
    width, hidden = spec.width, spec.hidden_channels
    slabs = -(-hidden // slab_channels)
    slab = -(-hidden // (slabs * SLAB_MULTIPLE)) * SLAB_MULTIPLE
    row_block = band_rows * hidden + (3 * band_rows + 2) * slab + (2 * band_rows + 1) * width + 4 * hidden
    keys_and_values = 2 * tokens * spec.cross_width
    small = 20 * hidden + 20 * width
    sums = 4 * width * (spec.attention_head_dim + 1)
    feed_forward = (columns * row_block + keys_and_values + small) * element_bytes + sums
    return max(feed_forward, 3 * columns * band_rows * width * element_bytes + tree_nodes(rows) * sums)
