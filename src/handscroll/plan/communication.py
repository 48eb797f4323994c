"""What ranks that make bands of a picture send each other: bytes and messages in closed form, and what that takes.

Of a transformer's layer and branch: a row of tokens to each neighbour, for the Mix-FFN's depthwise convolution, and the
nodes of the attention's sums, which every rank sends to all others. Of an autoencoder: once for each map that is kept
the rows that others need beside their own, and the nodes of each attention's sums. Moving keys and values around
instead, as a ring attention does, sends the whole map a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from handscroll.bands import Bands, common, messages, whole_nodes
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.decode import DecodeStage
from handscroll.plan.decoder_shape import DecoderShape
from handscroll.plan.denoise import Sampling
from handscroll.plan.precision import BYTES


@dataclass(frozen=True, slots=True)
class Link:
    """Between two ranks, in each direction. The defaults are those of a network of 100 Gbit/s."""

    bytes_a_second: float = 12.5e9
    latency_s: float = 20e-6


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends. A message is a tensor to one other rank; what is gathered goes to each of them."""

    halo_bytes: int = 0
    halo_messages: int = 0
    gathered_bytes: int = 0
    gathered_messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        names = [field.name for field in dataclasses.fields(self)]
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in names))

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(getattr(self, field.name) * times for field in dataclasses.fields(self)))

    @property
    def bytes(self) -> int:
        return self.halo_bytes + self.gathered_bytes

    @property
    def messages(self) -> int:
        return self.halo_messages + self.gathered_messages

    def seconds(self, link: Link) -> float:
        """As if nothing of it were sent while a rank computes, and a rank sent one message after another."""
        return self.bytes / link.bytes_a_second + self.messages * link.latency_s


def step_traffic(spec: TransformerSpec, job: Sampling, rank: int) -> Traffic:
    """Of a step's forwards, with what is predicted, which all ranks get whole."""
    bands, element_bytes = Bands.of(job.rows, job.ranks), BYTES[job.precision]
    neighbours = (rank > 0) + (rank + 1 < job.ranks)
    others = job.ranks - 1
    node_bytes = 4 * spec.width * (spec.attention_head_dim + 1)
    a_layer = Traffic(
        neighbours * job.columns * spec.width * element_bytes,
        neighbours,
        others * _most_nodes(bands) * node_bytes,
        others,
    )
    positions = max(map(len, bands)) * job.columns
    predicted_bytes = positions * spec.patch_size**2 * spec.out_channels * element_bytes
    predicted = Traffic(gathered_bytes=others * predicted_bytes, gathered_messages=others)
    return (a_layer * spec.num_layers + predicted) * job.branches


def sweeps_traffic(shape: DecoderShape, stage: DecodeStage, rank: int) -> Traffic:
    """Of decoding or encoding a picture, without the picture or latent that comes out."""
    bands, total = Bands.of(shape.rows, shape.ranks), Traffic()
    for index in range(1, len(shape)):
        attention = shape.sweeps[index][0]
        of_map = bands.scaled(attention.scale)
        sums_bytes = 4 * attention.inner * (attention.head_dim + 1) * (1 + len(attention.scales)) * shape.batch
        nodes_bytes = (shape.ranks - 1) * _most_nodes(of_map) * sums_bytes
        total += Traffic(gathered_bytes=nodes_bytes, gathered_messages=shape.ranks - 1)
        readers = [reader for reader, start in enumerate(stage.starts) if start == index]
        if readers:
            total += _halo_traffic(shape, index, readers, of_map, rank)
    return total


def _halo_traffic(shape: DecoderShape, index: int, readers: Iterable[int], bands: Bands, rank: int) -> Traffic:
    halo_rows = max(shape.halo_rows(index, reader)[0] for reader in readers)
    needed = [common(range(own.start - halo_rows, own.stop + halo_rows), range(bands.height)) for own in bands]
    sent = [len(message.rows) for message in messages(bands, needed) if message.sender == rank]
    row_bytes = shape.map_bytes(index) // shape.map_rows(index)
    return Traffic(sum(sent) * row_bytes, len(sent))


def _most_nodes(bands: Bands) -> int:
    return max(len(whole_nodes(rows)) for rows in bands)


def keys_and_values_bytes(spec: TransformerSpec, job: Sampling) -> int:
    """What a step's ring attention moves from rank to rank: the keys and values of every layer and branch, whole."""
    positions = job.rows * job.columns
    return 2 * positions * spec.width * BYTES[job.precision] * spec.num_layers * job.branches
