"""Sizes that several rooms must agree on, each once. A leaf: imports nothing.

Bytes are given for tensors. Those for CUDA are larger, since there every row block costs its launches.
"""

from __future__ import annotations

# A map between two sweeps is held, spilled and freed in pieces of this size: a sweep that reads one map and writes the
# next holds two pieces more than one map. The plan counts them.
MAP_CHUNK_BYTES = 16 * 2**20

# A row block of the autoencoder whose largest activation is this big: beyond it nothing gets faster.
STRIP_BYTES, CUDA_STRIP_BYTES = 16 * 2**20, 256 * 2**20

# A row block of the transformer whose widest activation, the Mix-FFN's hidden channels, is this big: beyond it nothing
# gets faster (on a CPU 4 rows of 128 tokens in bf16 are enough; a GPU wants more to do at a time).
BAND_BYTES, CUDA_BAND_BYTES = 16 * 2**20, 256 * 2**20

# Hidden channels that the Mix-FFN makes at a time, values and gates each: few enough to stay small beside the row
# block, enough for full speed. Slabs are multiples of what a vector register holds: no element is an odd one out.
SLAB_CHANNELS, CUDA_SLAB_CHANNELS, SLAB_MULTIPLE = 1120, 2816, 32

# Weights of another dtype than theirs are read through a buffer of this size.
STAGING_BYTES = 16 * 2**20

# Buffers for the layers that pass through a CUDA device: one that is computed with, one that is being filled.
SLOTS = 2

# Of fp32 pixels, converted to or from 8 bits at a time.
PIXEL_PIECE_BYTES = 2**20

# The largest number of 8 bits: of int8 as it is used, whose -128 is left out, and of fp8 (e4m3).
LARGEST = {"int8": 127.0, "fp8": 448.0}


def few_heights(rows: int) -> int:
    """The next of 4, 6, 8, 12, 16, 24, 32, ...: rows that a convolution makes on a CUDA device, some to be cut off.

    For every new shape cuDNN chooses a way, which takes it about 50 ms: a decode at 4096x4096 has 179 shapes where row
    blocks are cut as they come (at the edges, of every level), and its first run took 9 s instead of half a second.
    """
    step = 1 << max(0, rows.bit_length() - 2)
    return max(4, -(-rows // step) * step)


def few_heights_below(rows: int) -> int:
    """The last of 1, 2, 3, 4, 6, 8, 12, ... that is not above `rows`: row blocks of it are never cut off."""
    step = 1 << max(0, rows.bit_length() - 2)
    return rows // step * step


def tree_nodes(rows: int) -> int:
    """How many sums exist at a time, at most, while those of so many rows are added in pairs, pairs in pairs, ..."""
    return rows.bit_length() + 1
