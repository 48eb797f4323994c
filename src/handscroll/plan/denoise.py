"""The denoising stage: bytes and FLOPs of the transformer in row blocks, and the ways to run it within a budget.

Only the residual stream is whole, a map of tokens x width for each branch (with and without the prompt). Layers stay in
memory or are read anew at every step; row blocks are as tall as memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from handscroll.limits import BAND_BYTES, CUDA_BAND_BYTES, CUDA_SLAB_CHANNELS, SLAB_CHANNELS, SLAB_MULTIPLE, SLOTS
from handscroll.models.quantisation import NATIVE, Quantisation, WeightCost, weight_cost
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.host import host_map_bytes, layers_on_host, staging_bytes
from handscroll.plan.inputs import Hardware, heights_up_to
from handscroll.plan.precision import BYTES
from handscroll.plan.store import Store, stored_bytes

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
    the prompt is read anew at every step too, a matrix at a time.
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
    """What is asked of the transformer: a token map of `rows` x `columns`, and so many forwards of so many steps."""

    rows: int
    columns: int
    tokens: int
    steps: int
    branches: int
    precision: str
    storage: str = ""  # what matrices are kept in
    stored: Quantisation | None = None  # how the files hold them; None: plainly

    @property
    def positions(self) -> int:
        return self.rows * self.columns


def denoise_stages(
    spec: TransformerSpec, job: Sampling, hardware: Hardware, limit_bytes: int | None, kept: bool = False
) -> Iterator[DenoiseStage]:
    """Every way to run it that is worth considering; those that keep layers resident keep as many as the limit lets.

    kept: all layers are in memory, whatever the limit.
    """
    element_bytes = BYTES[job.precision]
    layer = layer_cost(spec, job)
    layer_bytes = layer.working_bytes
    fixed_bytes = (spec.parameter_count - spec.num_layers * spec.block_parameter_count) * element_bytes
    embedder_units = [count * element_bytes for count in spec.embedder_units]
    # A CUDA device is sent what is resident of a layer, and widens that there; on a CPU one buffer is filled.
    sent_bytes = layer.resident_bytes if hardware.is_cuda else layer.working_bytes
    widened_bytes = (layer.widened_bytes and layer.working_bytes) + layer.making_bytes
    slots, slab_channels = (SLOTS, CUDA_SLAB_CHANNELS) if hardware.is_cuda else (1, SLAB_CHANNELS)
    stream_bytes = job.positions * spec.width * element_bytes
    samples_bytes = 8 * 4 * job.positions * spec.patch_size**2 * max(spec.in_channels, spec.out_channels)
    text_bytes = job.branches * job.tokens * (3 * spec.width + spec.caption_channels) * element_bytes
    compute_seconds = job.steps * job.branches * forward_flops(spec, job) / hardware.rates.flops(job.precision)
    for residual, together in _residuals(hardware, job, stream_bytes, 0 if kept else layer_bytes):
        streams = job.branches if together else 1
        held = fixed_bytes + text_bytes + samples_bytes
        held += (streams - 1) * stored_bytes(stream_bytes, residual)
        held += stored_bytes(stream_bytes, residual, rewritten=True)
        moved_bytes = 0 if residual == "memory" else 3 * job.steps * job.branches * spec.num_layers * stream_bytes
        moving_seconds = moved_bytes / (hardware.rates.disk_bytes if residual == "disk" else hardware.rates.host_bytes)
        room_bytes = hardware.host_bytes
        room_bytes -= (job.branches + 1) * host_map_bytes(stream_bytes, job.rows) if residual == "host" else 0
        readings = job.steps * (1 if together else job.branches)
        layouts = (False,) if hardware.is_cuda else (True, False)
        for band_rows, lay_out in product(band_heights(spec, job, hardware), layouts):
            row_blocks = -(-job.rows // band_rows)
            calls = job.steps * job.branches * spec.num_layers * row_blocks
            working = held + lay_out * layer_bytes
            working += native_bytes(spec, job, band_rows)
            working += band_bytes(spec, job.columns, band_rows, job.tokens, element_bytes, slab_channels)
            laying_seconds = lay_out * readings * spec.num_layers * layer_bytes / LAYING_OUT_BYTES
            busy_seconds = compute_seconds * (1 - lay_out * LAID_OUT_GAIN) + laying_seconds
            most = _resident_layers(spec.num_layers, layer, sent_bytes, slots, working + widened_bytes, limit_bytes)
            for resident in {spec.num_layers} if kept else {0, most}:
                streamed = spec.num_layers - resident
                read = _reading(streamed, layer, readings, busy_seconds, hardware, room_bytes)
                made = resident + read.host_layers + readings * (streamed - read.host_layers)
                slots_bytes = min(slots, streamed) * sent_bytes
                if hardware.is_cuda or not layer.widened_bytes:
                    slots_bytes += widened_bytes
                else:  # the same buffer is filled from a file, or from what is resident
                    slots_bytes = widened_bytes
                # Where no layer stays, neither do they: a matrix of theirs at a time, before there is a layer.
                embedders_pass = resident == 0 and not hardware.is_cuda
                passing_bytes = sum(embedder_units) if embedders_pass else 0
                peak_bytes = working - passing_bytes + resident * layer.resident_bytes + slots_bytes
                if embedders_pass:
                    peak_bytes = max(peak_bytes, held - passing_bytes + max(embedder_units))
                passing_seconds = readings * passing_bytes / hardware.rates.weight_bytes
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
                    seconds=sum(
                        (
                            read.seconds,
                            moving_seconds,
                            passing_seconds,
                            calls * SECONDS_A_BAND,
                            made * layer.making_seconds,
                        )
                    ),
                )


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
    on_host_bytes = (job.branches + 1) * host_map_bytes(stream_bytes, job.rows) + staging_bytes(streamed_layer_bytes)
    if hardware.is_cuda and on_host_bytes <= hardware.host_bytes:
        yield "host", True
    if (job.branches + 1) * stream_bytes <= hardware.scratch_bytes:
        yield "disk", True


def _resident_layers(
    layers: int, layer: WeightCost, sent_bytes: int, slots: int, other_bytes: int, limit_bytes: int | None
) -> int:
    """The most layers that stay in memory within the limit; all but the last need room for those that pass through."""
    if limit_bytes is None or other_bytes + layers * layer.resident_bytes <= limit_bytes:
        return layers
    passing_bytes = slots * sent_bytes
    return max(0, min(layers - 1, (limit_bytes - other_bytes - passing_bytes) // layer.resident_bytes))


def native_bytes(spec: TransformerSpec, job: Sampling, band_rows: int) -> int:
    """What a row block takes in 8 bits where it is multiplied so: itself, and what goes into the last matrix."""
    if job.storage not in NATIVE:
        return 0
    return job.columns * band_rows * (spec.width + spec.hidden_channels)


def layer_cost(spec: TransformerSpec, job: Sampling) -> WeightCost:
    """What one of its layers takes."""
    matrices, parameters = spec.block_matrices(), spec.block_parameter_count
    return weight_cost("transformer", job.storage, matrices, parameters, BYTES[job.precision], job.stored)


def band_heights(spec: TransformerSpec, job: Sampling, hardware: Hardware) -> list[int]:
    """Heights of row blocks to choose from, in rows of tokens: powers of two.

    Up to the height at which the widest activation takes `BAND_BYTES`, on CUDA `CUDA_BAND_BYTES`.
    """
    row_bytes = job.columns * 2 * spec.hidden_channels * BYTES[job.precision]
    most = min(job.rows, max(1, (CUDA_BAND_BYTES if hardware.is_cuda else BAND_BYTES) // row_bytes))
    return heights_up_to(most)


def forward_flops(spec: TransformerSpec, job: Sampling) -> float:
    """One forward: two a weight and position it meets, and the attentions themselves."""
    width, cross, hidden = spec.width, spec.cross_width, spec.hidden_channels
    positions = job.positions
    self_attention = 2 * positions * (4 * width**2 + 2 * width * spec.attention_head_dim)
    cross_attention = 2 * positions * 2 * width * cross + 4 * positions * job.tokens * cross
    cross_attention += 2 * job.tokens * 2 * width * cross
    feed_forward = 2 * positions * (width * 2 * hidden + 9 * 2 * hidden + hidden * width)
    return float(spec.num_layers * (self_attention + cross_attention + feed_forward))


@lru_cache(maxsize=4096)
def band_bytes(
    spec: TransformerSpec,
    columns: int,
    band_rows: int,
    tokens: int,
    element_bytes: int,
    slab_channels: int = SLAB_CHANNELS,
) -> int:
    """The most that a layer holds for one row block, beside weights and residual streams: in its Mix-FFN.

    Its hidden channels are made a slab of at most `slab_channels` at a time (banded/transformer/); the gated half of
    them exists for the whole row block, and four rows of both halves in line buffers. The text's keys and values, the
    attention's sums and what is laid out of the depthwise convolution come on top.
    """
    width, hidden = spec.width, spec.hidden_channels
    slabs = -(-hidden // slab_channels)
    slab = -(-hidden // (slabs * SLAB_MULTIPLE)) * SLAB_MULTIPLE
    row_block = band_rows * hidden + (3 * band_rows + 2) * slab + (2 * band_rows + 1) * width + 4 * hidden
    keys_and_values = 2 * tokens * spec.cross_width
    small = 20 * hidden + 20 * width
    sums = 4 * width * (spec.attention_head_dim + 1)
    return (columns * row_block + keys_and_values + small) * element_bytes + sums
