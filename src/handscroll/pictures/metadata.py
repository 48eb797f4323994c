"""How a picture was made: the text that is stored in its file, and reading it back."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handscroll.errors import FormatError, OutOfMemoryError, is_out_of_memory
from handscroll.pictures.formats import DZI, FORMATS, JPEG, PNG, TIFF, WEBP, Format, quality_not_used
from handscroll.pictures.vips import load_vips

EXIF_TEXT_UNITS = 32_000  # UTF-16 code units of a JPEG or WebP comment: one JPEG segment is at most 65533 bytes
CUT = " [...]"
KEYWORD = "parameters"  # the PNG text chunk that image tools look for


def parameters_text(
    prompt: str = "",
    negative: str = "",
    *,
    width: int,
    height: int,
    version: str,
    memory_mode: str,
    exact: bool,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    model: str | None = None,
    precision: str = "",
    composed: str = "",
    revision: str = "",
    autoencoder: str = "",
    prompt_read: str = "",
    negative_read: str = "",
) -> str:
    """How a picture was made, in the lines that image tools read; what is not known is left out.

    version: handscroll's own, such as 0.1.0. composed: the size, as 512x512, at which a picture began that grew; image
    tools know it as the first pass. revision: the commit of a model that came from the hub. autoencoder: what decoded
    it, where that is not the model's own. prompt_read and negative_read: as `298 of 468 tokens`, where they were cut.
    """
    told = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": None if guidance is None else f"{guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "First pass size": composed,
        "Model": model,
        "Model revision": revision,
        "VAE": autoencoder,
        "Precision": precision,
        "Prompt read": prompt_read,
        "Negative prompt read": negative_read,
        "Version": f"handscroll {version}",
        "Memory mode": memory_mode,
        "Exact": "true" if exact else "false",
    }
    fields = {name: value for name, value in told.items() if value is not None and value != ""}
    lines = [prompt.strip()] if prompt.strip() else []
    if negative.strip():
        lines.append(f"Negative prompt: {negative.strip()}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\r\n') else value


def read_parameters(path: Path) -> str:
    """What `write_image` stored as `parameters`, or "" where the file holds none.

    Raises FormatError for a file that is not a picture of a known suffix, OSError where it cannot be opened.
    """
    path = Path(path)
    known = _format_of(path)
    with open(path, "rb") as file:
        if known is PNG:
            return _read_png_text(path, file)
    if known is DZI:
        text = path.with_name(f"{path.stem}_files") / f"{KEYWORD}.txt"
        return text.read_bytes().decode("utf-8", "replace") if text.exists() else ""
    image = _opened(path, known)
    if known is TIFF:
        return image.get("image-description") if image.get_typeof("image-description") else ""
    return read_user_comment(image.get("exif-data")) if image.get_typeof("exif-data") else ""


def read_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture's file in pixels; no pixel is read. Raises as `read_parameters`."""
    known = _format_of(path)
    if known is not DZI:
        image = _opened(path, known)
        return image.width, image.height
    index = path.read_bytes()[:4096]
    sides = [re.search(rb'\b%s="(\d{1,9})"' % side, index) for side in (b"Width", b"Height")]
    if sides[0] is None or sides[1] is None:
        raise FormatError(f"cannot read {path}: not the index of a Deep Zoom picture")
    return int(sides[0][1]), int(sides[1][1])


def _format_of(path: Path) -> Format:
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise FormatError(f"cannot read {path}: use one of {' '.join(FORMATS)}")
    return known


def _opened(path: Path, known: Format) -> Any:
    vips = load_vips()
    try:
        return vips.Image.new_from_file(str(path), access="sequential", revalidate=True)
    except vips.Error as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"out of memory while reading {path}; close other programs") from error
        raise FormatError(f"cannot read {path}: not a {known.title} picture, or a damaged one") from error


def _read_png_text(path: Path, file: Any) -> str:
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        raise FormatError(f"cannot read {path}: not a PNG picture")
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, os.SEEK_CUR)
            continue
        keyword, _, body = file.read(size + 4)[:-4].partition(b"\0")
        if keyword != KEYWORD.encode():
            continue
        packed, charset = kind == b"zTXt", "latin-1"
        if kind == b"iTXt":
            packed, charset = body[:1] == b"\1", "utf-8"
            body = body[2:].split(b"\0", 2)[-1]
        elif packed:
            body = body[1:]
        try:
            # A few kilobytes can unpack to gigabytes.
            return (zlib.decompressobj().decompress(body, 1 << 24) if packed else body).decode(charset, "replace")
        except zlib.error:
            raise FormatError(f"cannot read {path}: its text is broken") from None
    return ""


def read_user_comment(exif: bytes) -> str:
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "<")

    def entry(ifd: int, wanted: int) -> tuple[int, int]:
        """Size in bytes and position of an entry's value; 0, 0 where there is none."""
        for at in range(ifd + 2, ifd + 2 + 12 * struct.unpack_from(order + "H", tiff, ifd)[0], 12):
            tag, _, count, value = struct.unpack_from(order + "HHII", tiff, at)
            if tag == wanted:
                return count, value
        return 0, 0

    try:
        _, exif_ifd = entry(struct.unpack_from(order + "I", tiff, 4)[0], 0x8769)
        size, start = entry(exif_ifd, 0x9286) if exif_ifd else (0, 0)
    except struct.error:
        return ""
    charset, text = tiff[start : start + min(size, 8)], tiff[start + 8 : start + size]
    if charset.startswith(b"UNICODE"):
        return text.decode("utf-16-be" if order == ">" else "utf-16-le", "replace")
    return text.decode("utf-8", "replace").rstrip("\0")


def not_in_file(suffix: str, quality: int | None, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """A line for the user for each thing that a format's file does not take, or not whole.

    suffix: one of `FORMATS`. facts: the arguments of `parameters_text`.
    """
    known, unused = FORMATS[suffix.lower()], quality_not_used(suffix, quality)
    if known not in (JPEG, WEBP) or _units(parameters_text(**facts)) <= EXIF_TEXT_UNITS:
        return unused
    return (
        *unused,
        f"the prompt is longer than a {known.title} file holds: there it is cut, and its settings are whole",
    )


def _shortened(text: str) -> str:
    """As much of `parameters_text` as an EXIF block holds: of the prompts the beginning, and the last line whole."""
    if _units(text) <= EXIF_TEXT_UNITS:
        return text
    _, _, told = text.rpartition("\n")
    end = f"{CUT}\n{told}" if _units(told) < EXIF_TEXT_UNITS // 2 else ""
    units = text.encode("utf-16-be")[: 2 * (EXIF_TEXT_UNITS - _units(end))]
    return units.decode("utf-16-be", "ignore") + end


def _units(text: str) -> int:
    return len(text.encode("utf-16-be", "surrogatepass")) // 2


def png_text_chunk(text: str) -> bytes:
    try:
        kind, body = b"tEXt", KEYWORD.encode() + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        kind, body = b"iTXt", KEYWORD.encode() + b"\0\0\0\0\0" + text.encode()
    return png_chunk(kind, body)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def exif_block(text: str) -> bytes:
    """An EXIF block with nothing but the user comment: IFD0 at 8 points to the Exif IFD at 26, the comment is at 44."""
    comment = b"UNICODE\0" + _shortened(text).encode("utf-16-be")
    ifd0 = struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)
    exif_ifd = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + ifd0 + exif_ifd + comment
