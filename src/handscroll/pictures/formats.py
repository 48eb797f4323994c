"""The picture formats that are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """What is known of a format beforehand. `bytes_per_pixel` is a detailed picture's, not the worst case."""

    name: str
    title: str
    max_side_px: int
    bytes_per_pixel: float


VIPS_MAX_SIDE_PX = 100_000_000  # PNG and TIFF themselves go to 2^31 - 1
PNG = Format("png", "PNG", VIPS_MAX_SIDE_PX, 2.0)
JPEG = Format("jpeg", "JPEG", 65_500, 0.8)  # the format counts to 65535, the library that writes it to 65500
WEBP = Format("webp", "WebP", 16_383, 0.5)
TIFF = Format("tiff", "TIFF", VIPS_MAX_SIDE_PX, 2.7)
DZI = Format("dzi", "Deep Zoom", VIPS_MAX_SIDE_PX, 0.8)
FORMATS = {".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP, ".tif": TIFF, ".tiff": TIFF, ".dzi": DZI}
