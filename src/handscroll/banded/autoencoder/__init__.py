"""AutoencoderDC, decoder and encoder, as sweeps over rows.

Everything in a DC-AE is local but for its ReLU linear attentions, each of which needs two sums over the whole map
before its first output row (EfficientViT, arXiv 2205.14756). So the network is cut at its attentions: the sweep that
produces an attention's input also accumulates that attention's sums, from keys and values alone; the next sweep applies
them, from queries alone. Nothing is computed twice, and between two sweeps only one map exists.

Once its sums are known an attention is local, so a sweep need not start from the map just before it: it may repeat the
sweeps in between from an earlier, smaller map, in one go, and the maps that no sweep starts from never exist.

    sweep 0   latent -> convolutions -> map 0, sums of attention 0
    sweep i   map i-1 -> attention i-1 applied -> Mix-FFN, convolutions, upsampling -> map i, sums of attention i
    sweep n   map n-1 -> attention n-1 applied -> ... -> rows of pixels

The modules are diffusers' own; their weights are read and their `forward` is never called, except for an attention on
a map of at most `head_dim` pixels, where diffusers switches to quadratic attention and the map is tiny anyway.
"""

from __future__ import annotations

from handscroll.banded.autoencoder.run import Materialize, OnRows, decode_rows, encode, encode_row_blocks
from handscroll.banded.autoencoder.sweeps import Sweep, cut_at_barriers, strip_heights
from handscroll.banded.autoencoder.units import Attention, Local, Unit, decoder_units, encoder_units

__all__ = [
    "Attention",
    "Local",
    "Materialize",
    "OnRows",
    "Sweep",
    "Unit",
    "cut_at_barriers",
    "decode_rows",
    "decoder_units",
    "encode",
    "encode_row_blocks",
    "encoder_units",
    "strip_heights",
]
