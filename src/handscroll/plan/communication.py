"""What ranks that make bands of a picture send each other: bytes and messages in closed form, and what that takes.

Of a transformer's layer and branch: a row of tokens to each neighbour, for the Mix-FFN's depthwise convolution, and a
slice of the attention's sums to each rank, which adds it for all and sends what it comes to. Of an autoencoder: once
for each map that is kept the rows that others need beside their own, and each attention's sums. Moving keys and values
around instead, as a ring attention does, sends the whole map a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from handscroll.bands import Bands, common, messages, whole_nodes
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.decode import DecodeStage
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import Sampling, bands_of_branches, halo_row_flops, row_flops
from handscroll.plan.inputs import Rates
from handscroll.plan.plan import Plan
from handscroll.plan.precision import BYTES

# Rates of devices of the same kind differ by less, as they are measured.
ALIKE = 1.25


@dataclass(frozen=True, slots=True)
class Link:
    """Between two ranks, in each direction. The defaults are those of a network of 100 Gbit/s."""

    bytes_a_second: float = 12.5e9
    latency_s: float = 20e-6


def speeds_of(rates: Sequence[Rates], kinds: Sequence[str]) -> tuple[float, ...]:
    """How fast each rank is beside the others, 1 for the fastest, by what it multiplies in a second in the type that it
    multiplies fastest. Empty where no two differ by more than measuring does.

    kinds: what each runs on; those of one kind are taken for equally fast, at the median of what they measured.
    """
    measured = [max(each.fp32_flops, each.bf16_flops, each.fp16_flops) for each in rates]
    of_kind = {
        kind: median(rate for rate, other in zip(measured, kinds, strict=True) if other == kind) for kind in set(kinds)
    }
    if max(of_kind.values()) < ALIKE * min(of_kind.values()):
        return ()
    return tuple(round(of_kind[kind] / max(of_kind.values()), 3) for kind in kinds)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends. A message is a tensor to one other rank; what is gathered goes to each of them. rounds: how
    often ranks wait for each other: messages of one round are on their way at the same time.
    """

    traded_bytes: int = 0
    traded_messages: int = 0
    gathered_bytes: int = 0
    gathered_messages: int = 0
    rounds: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        names = [field.name for field in dataclasses.fields(self)]
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in names))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(getattr(self, field.name) * times for field in dataclasses.fields(self)))

    @property
    def bytes(self) -> int:
        return self.traded_bytes + self.gathered_bytes

    @property
    def messages(self) -> int:
        return self.traded_messages + self.gathered_messages

    def seconds(self, link: Link) -> float:
        """As if nothing of it were sent while a rank computes."""
        return self.bytes / link.bytes_a_second + self.rounds * link.latency_s


def step_traffic(spec: TransformerSpec, job: Sampling, tokens: Sequence[int], rank: int) -> Traffic:
    """Of a step's forwards, with what is predicted, which all ranks get whole; tokens: of each branch's text."""
    element_bytes, total = BYTES[job.precision], Traffic()
    if job.ranks == 1:
        return total
    for bands in bands_of_branches(spec, job.rows, job.columns, tokens, job.ranks, job.speeds):
        neighbours = _neighbours(bands, rank)
        rows = Traffic(neighbours * job.columns * spec.width * element_bytes, neighbours, rounds=1)
        total += (rows + _sums_traffic(bands, rank, spec.width * (spec.attention_head_dim + 1))) * spec.num_layers
        positions = max(map(len, bands)) * job.columns
        predicted_bytes = positions * spec.patch_size**2 * spec.out_channels * element_bytes
        others = job.ranks - 1
        total += Traffic(gathered_bytes=others * predicted_bytes, gathered_messages=others, rounds=1)
    return total


def step_flops(spec: TransformerSpec, job: Sampling, tokens: Sequence[int], rank: int) -> float:
    """Of a step's forwards, the work of one rank."""
    total = 0.0
    of_branches = bands_of_branches(spec, job.rows, job.columns, tokens, job.ranks, job.speeds)
    for bands, count in zip(of_branches, tokens, strict=True):
        total += len(bands.rows(rank)) * row_flops(spec, job.columns, count)
        total += _neighbours(bands, rank) * halo_row_flops(spec, job.columns)
    return total * spec.num_layers


def _neighbours(bands: Bands, rank: int) -> int:
    return sum(other is not None for other in bands.neighbours(rank))


def sweeps_traffic(shape: DecoderShape, stage: DecodeStage, rank: int) -> Traffic:
    """Of decoding or encoding a picture, without the picture or latent that comes out."""
    bands, total = shape.bands, Traffic()
    if shape.ranks == 1:
        return total
    for index in range(1, len(shape)):
        attention = shape.sweeps[index][0]
        of_map = bands.scaled(attention.scale)
        sums = attention.inner * (attention.head_dim + 1) * (1 + len(attention.scales)) * shape.batch
        total += _sums_traffic(of_map, rank, sums)
        if index in stage.starts:
            total += _halo_traffic(shape, index, stage.starts, of_map, rank)
    return total


def _halo_traffic(shape: DecoderShape, index: int, starts: Sequence[int], bands: Bands, rank: int) -> Traffic:
    halo_rows = shape.map_halo_rows(index, starts)
    needed = [common(range(own.start - halo_rows, own.stop + halo_rows), range(bands.height)) for own in bands]
    sent = [len(message.rows) for message in messages(bands, needed) if message.sender == rank]
    row_bytes = shape.map_bytes(index) // shape.map_rows(index)
    return Traffic(sum(sent) * row_bytes, len(sent), rounds=1)


def _sums_traffic(bands: Bands, rank: int, sums: int) -> Traffic:
    """Of so many sums in fp32: a slice of each of the own nodes to every rank, and what the own slice comes to."""
    size = -(-sums // len(bands))
    slices = [max(0, min(size, sums - size * each)) for each in range(len(bands))]
    sent = [each for other, each in enumerate(slices) if each and other != rank]
    others = len(bands) - 1
    return Traffic(4 * len(whole_nodes(bands.rows(rank))) * sum(sent), len(sent), 4 * size * others, others, rounds=2)


def keys_and_values_bytes(spec: TransformerSpec, job: Sampling) -> int:
    """What a step's ring attention moves from rank to rank: the keys and values of every layer and branch, whole."""
    positions = job.rows * job.columns
    return 2 * positions * spec.width * BYTES[job.precision] * spec.num_layers * job.branches


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several ranks does of a stage: a step of denoising, or decoding a picture.

    flops: of the rank with most to do. seconds: its own, sending among them. efficiency: of a rank's time, the share
    in which one rank alone would do the same work; 1 where nothing is done twice and nothing is waited for.
    """

    name: str
    flops: float
    traffic: Traffic
    seconds: float
    efficiency: float


def shares(plan: Plan, spec: CheckpointSpec, tokens: Sequence[int], rates: Rates, link: Link) -> list[Share]:
    """A step at the plan's size, and decoding it. tokens: of each branch's text."""
    job, shape = _step_and_decode(plan, spec, tokens)
    alone = dataclasses.replace(job, ranks=1, speeds=())
    of_step = most_of_step(spec.transformer, alone, tokens), most_of_step(spec.transformer, job, tokens)
    found = [_share("step", *of_step, rates.flops(job.precision), link, plan.ranks)]
    if plan.decoding is not None:
        alone_shape = dataclasses.replace(shape, ranks=1, speeds=())
        of_sweeps = most_of_sweeps(alone_shape, plan.decoding), most_of_sweeps(shape, plan.decoding)
        found.append(_share("decode", *of_sweeps, rates.flops(plan.precision.autoencoder), link, plan.ranks))
    return found


@dataclass(frozen=True, slots=True)
class Shared:
    """What several ranks do of a picture: `shares` of the one with most to do, and the part of each. Empty for one."""

    shares: tuple[Share, ...] = ()
    parts: tuple[RankPart, ...] = ()

    @classmethod
    def of(cls, plan: Plan, spec: CheckpointSpec, tokens: Sequence[int], rates: Rates, link: Link) -> Shared:
        """At the plan's size. tokens: of each branch's text."""
        return cls(tuple(shares(plan, spec, tokens, rates, link)), tuple(rank_parts(plan, spec, tokens)))


@dataclass(frozen=True, slots=True)
class RankPart:
    """What one of several ranks has to do: the picture's rows from `first_row` to before `stop_row`, in pixels; of all
    work of a step its part, 0 to 1, halos that are made twice included; and the bytes that it sends.
    """

    rank: int
    first_row: int
    stop_row: int
    step_part: float
    step_sent_bytes: int
    decode_sent_bytes: int


def rank_parts(plan: Plan, spec: CheckpointSpec, tokens: Sequence[int]) -> list[RankPart]:
    """Of every rank, at the plan's size. tokens: of each branch's text."""
    job, shape = _step_and_decode(plan, spec, tokens)
    alone = step_flops(spec.transformer, dataclasses.replace(job, ranks=1, speeds=()), tokens, 0)
    pixels = shape.bands.scaled(spec.autoencoder.spatial_compression_ratio)
    found = []
    for rank in range(plan.ranks):
        rows = common(pixels.rows(rank), range(plan.height))
        step_part = step_flops(spec.transformer, job, tokens, rank) / alone
        sent = step_traffic(spec.transformer, job, tokens, rank).bytes
        decoding = 0 if plan.decoding is None else sweeps_traffic(shape, plan.decoding, rank).bytes
        found.append(RankPart(rank, rows.start, rows.stop, step_part, sent, decoding))
    return found


def _step_and_decode(plan: Plan, spec: CheckpointSpec, tokens: Sequence[int]) -> tuple[Sampling, DecoderShape]:
    """A step and the decoding of a plan, as its ranks share them."""
    patch = spec.transformer.patch_size
    sharing: dict[str, Any] = {"ranks": plan.ranks, "speeds": plan.speeds}
    rows, columns = plan.latent_height // patch, plan.latent_width // patch
    job = Sampling(rows, columns, max(tokens), 1, len(tokens), plan.precision.transformer, **sharing)
    element_bytes = BYTES[plan.precision.autoencoder]
    return job, DecoderShape(spec.autoencoder, plan.latent_height, plan.latent_width, element_bytes, **sharing)


# Work, and what is sent: of the rank that has most of each.
Most = tuple[float, Traffic]


def most_of_step(spec: TransformerSpec, job: Sampling, tokens: Sequence[int]) -> Most:
    flops = max(step_flops(spec, job, tokens, rank) for rank in range(job.ranks))
    traffic = (step_traffic(spec, job, tokens, rank) for rank in range(job.ranks))
    return flops, max(traffic, key=lambda each: each.bytes)


def most_of_sweeps(shape: DecoderShape, stage: DecodeStage) -> Most:
    sweeps = enumerate(stage.sweeps)
    flops = sum(shape.pass_shape(sweep.start, index, sweep.strip_rows).flops for index, sweep in sweeps)
    traffic = (sweeps_traffic(shape, stage, rank) for rank in range(shape.ranks))
    return flops, max(traffic, key=lambda each: each.bytes)


def _share(name: str, alone: Most, shared: Most, flops_a_second: float, link: Link, ranks: int) -> Share:
    flops, traffic = shared
    seconds = flops / flops_a_second + traffic.seconds(link)
    return Share(name, flops, traffic, seconds, alone[0] / flops_a_second / ranks / seconds)
