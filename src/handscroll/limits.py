"""Constants that several rooms share, each once. Imports nothing."""

from __future__ import annotations

# Of fp32 pixels, converted to or from 8 bits at a time.
PIXEL_PIECE_BYTES = 2**20
# Weights of another dtype than is wanted are read through a buffer of this size.
STAGING_BYTES = 16 * 2**20
