"""The picture formats that are written."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from handscroll.errors import UsageError
from handscroll.units import check_range, shown


@dataclass(frozen=True)
class Format:
    """What is known of a format beforehand. `bytes_per_pixel` is a detailed picture's, not the worst case.

    `takes_quality`: it loses some of the picture, as much as a quality of 1 to 100 lets it; others are lossless.
    """

    name: str
    title: str
    max_side_px: int
    bytes_per_pixel: float
    takes_quality: bool = False


VIPS_MAX_SIDE_PX = 100_000_000  # PNG and TIFF themselves go to 2^31 - 1
PNG = Format("png", "PNG", VIPS_MAX_SIDE_PX, 2.0)
JPEG = Format(
    "jpeg", "JPEG", 65_500, 0.8, takes_quality=True
)  # the format counts to 65535, the library that writes it to 65500
WEBP = Format("webp", "WebP", 16_383, 0.5, takes_quality=True)
TIFF = Format("tiff", "TIFF", VIPS_MAX_SIDE_PX, 2.7)
DZI = Format("dzi", "Deep Zoom", VIPS_MAX_SIDE_PX, 0.8, takes_quality=True)
FORMATS = {".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP, ".tif": TIFF, ".tiff": TIFF, ".dzi": DZI}


def check_quality(quality: object) -> int | None:
    """A quality as a number of 1 to 100, None for the format's own. Raises UsageError for anything else."""
    if quality is None:
        return None
    if isinstance(quality, bool) or not isinstance(quality, numbers.Integral):
        raise UsageError(f"quality {shown(quality)} is not a whole number; use 1 to 100")
    check_range("quality", int(quality), 1, 100)
    return int(quality)


def quality_not_used(suffix: str, quality: int | None) -> tuple[str, ...]:
    """A line for the user where a format takes no quality and one was given; `suffix` is one of `FORMATS`."""
    known = FORMATS[suffix.lower()]
    return (
        () if quality is None or known.takes_quality else (f"quality {quality} is not used: {known.title} is lossless",)
    )
