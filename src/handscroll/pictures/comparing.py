"""How far two pictures of one size are from each other, and a page that shows both under a slider."""

from __future__ import annotations

import base64
import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handscroll.errors import FormatError, SizeError
from handscroll.files import write_whole
from handscroll.units import first_line, one_line

if TYPE_CHECKING:
    import pyvips

PEAK = 255.0
# Of SSIM as it was published: a Gaussian window of 11x11, and two constants that keep small numbers from dividing.
WINDOW_SIGMA, WINDOW_LEAST = 1.5, 0.008
SSIM_CONSTANTS = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
# A page holds pictures in itself: larger ones are made smaller for it, figures are always of the whole.
PAGE_PX = 2048


@dataclass(frozen=True, slots=True)
class Comparison:
    """psnr: decibels, infinite where all samples are equal. ssim: 1 where they are; of grey values, the mean.

    largest: of all samples' differences, in steps of 8 bits; differing: the share of samples that differ at all.
    """

    width: int
    height: int
    psnr: float
    ssim: float
    largest: int
    differing: float

    def as_dict(self) -> dict[str, Any]:
        psnr = None if math.isinf(self.psnr) else self.psnr
        return {
            "width": self.width,
            "height": self.height,
            "psnr": psnr,
            "ssim": self.ssim,
            "largest": self.largest,
            "differing": self.differing,
        }


def compare_pictures(one: Path, other: Path) -> Comparison:
    """Of two picture files, by libvips row by row: no picture is ever whole in memory.

    PSNR: 10 log10(255^2 / mean squared difference). SSIM: Wang et al. 2004, doi 10.1109/TIP.2003.819861. Raises
    FormatError for what is no picture, SizeError for two of different sizes.
    """
    first, second = _opened(one), _opened(other)
    if (first.width, first.height) != (second.width, second.height):
        raise SizeError(
            f"{one} is {first.width}x{first.height} and {other} {second.width}x{second.height}; "
            "pictures of one size can be compared"
        )
    difference = (first.cast("short") - second.cast("short")).abs()
    error = float((difference.cast("float") ** 2).avg())
    return Comparison(
        first.width,
        first.height,
        math.inf if error == 0 else 10 * math.log10(PEAK**2 / error),
        1.0 if error == 0 else _ssim(first, second),
        int(difference.max()),
        float((difference > 0).ifthenelse(1, 0).cast("float").avg()),
    )


def write_page(one: Path, other: Path, found: Comparison, page: Path) -> None:
    """One HTML file with both pictures under a slider, and their difference made brighter. Raises OSError."""
    first, second = _opened(one), _opened(other)
    scale = min(1.0, PAGE_PX / max(first.width, first.height))
    if scale < 1:
        first, second = first.resize(scale), second.resize(scale)
    difference = (first.cast("short") - second.cast("short")).abs()
    gain = max(1, int(PEAK // max(1, difference.max())))
    bright = (difference * gain).cast("uchar")
    shown = {"A": _as_url(first), "B": _as_url(second), "D": _as_url(bright)}
    psnr = "equal" if math.isinf(found.psnr) else f"{found.psnr:.2f} dB"
    facts = f"PSNR {psnr}, SSIM {found.ssim:.4f}, largest difference {found.largest} of 255"
    facts += f", {found.differing:.1%} of samples differ"
    if scale < 1:
        facts += f"; shown at {first.width}x{first.height} of {found.width}x{found.height}"
    text = _PAGE.format(
        one=html.escape(one_line(one.name)),
        other=html.escape(one_line(other.name)),
        facts=html.escape(facts),
        width=first.width,
        height=first.height,
        gain=gain,
        **shown,
    )
    write_whole(page, [text.encode()])


def _opened(path: Path) -> pyvips.Image:
    """Three bands of 8 bits."""
    import pyvips

    try:
        picture = pyvips.Image.new_from_file(str(path))
        picture = picture.flatten(background=[255] * (picture.bands - 1)) if picture.hasalpha() else picture
        return picture.colourspace("srgb")[:3].cast("uchar")
    except pyvips.Error as error:
        reason = "is not there" if not path.exists() else first_line(error)
        raise FormatError(f"{path}: no picture that can be compared: {reason}") from error


def _ssim(one: pyvips.Image, other: pyvips.Image) -> float:
    first, second = (each.colourspace("b-w").cast("float") for each in (one, other))

    def mean(values: pyvips.Image) -> pyvips.Image:
        return values.gaussblur(WINDOW_SIGMA, min_ampl=WINDOW_LEAST, precision="float")

    of_first, of_second = mean(first), mean(second)
    first_spread = mean(first * first) - of_first * of_first
    second_spread = mean(second * second) - of_second * of_second
    both = mean(first * second) - of_first * of_second
    level, contrast = SSIM_CONSTANTS
    above = (of_first * of_second * 2 + level) * (both * 2 + contrast)
    below = (of_first * of_first + of_second * of_second + level) * (first_spread + second_spread + contrast)
    return float((above / below).avg())


def _as_url(picture: pyvips.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.write_to_buffer(".png", strip=True)).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{one} and {other}</title>
<style>
body {{ margin: 1rem; font: 16px/1.4 system-ui, sans-serif; background: #fff; color: #24292f; }}
.frame {{ position: relative; max-width: {width}px; }}
.frame img {{ display: block; width: 100%; height: auto; }}
.frame img.over {{ position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 50%); }}
.frame hr {{ position: absolute; top: 0; bottom: 0; left: 50%; margin: 0; border: 0; width: 2px; background: #fff;
  box-shadow: 0 0 2px #000; }}
input {{ width: 100%; max-width: {width}px; display: block; margin: .5rem 0; }}
</style></head><body>
<p>Left: {one}. Right: {other}.<br>{facts}.</p>
<label>Where one ends and the other begins <input id="at" type="range" min="0" max="100" value="50"></label>
<div class="frame"><img src="{A}" width="{width}" height="{height}" alt="{one}">
<img class="over" id="over" src="{B}" alt="{other}"><hr id="line"></div>
<p>Difference, {gain} times as bright:</p>
<div class="frame"><img src="{D}" width="{width}" height="{height}" alt="difference"></div>
<script>
const [at, over, line] = ["at", "over", "line"].map((id) => document.getElementById(id));
function show() {{ over.style.clipPath = `inset(0 0 0 ${{at.value}}%)`; line.style.left = `${{at.value}}%`; }}
at.addEventListener("input", show); show();
</script></body></html>
"""
