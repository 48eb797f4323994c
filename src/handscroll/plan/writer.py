"""What encoding a picture's file takes of this process's memory, by format.

Fitted to libvips 8.18 from above, on noise from 2048x2048 to 16384x4096: writers keep some rows, so they grow with
the width; WebP alone holds the whole picture and its encoder's planes.
"""

from __future__ import annotations

from handscroll.plan.inputs import MIB

WRITER_BYTES = 4 * MIB
BYTES_A_COLUMN = {".tif": 3300, ".tiff": 3300, ".dzi": 4700}
BYTES_A_COLUMN_ELSE = 2500
WEBP_BYTES_A_PIXEL = 26


def writer_bytes(suffix: str, width: int, height: int) -> int:
    """For a picture of width x height pixels in the format of a file's ending, such as `.png`."""
    if suffix.lower() == ".webp":
        return WRITER_BYTES + WEBP_BYTES_A_PIXEL * width * height
    return WRITER_BYTES + BYTES_A_COLUMN.get(suffix.lower(), BYTES_A_COLUMN_ELSE) * width
