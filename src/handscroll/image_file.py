"""Strips of rows become a picture file.

    target = check_target(Path("dusk.png"), 4096, 4096)      # refuses here, before any work
    write_image(target, strips, parameters)                  # strips: uint8 [rows, width, 3], top to bottom

Strips stream into a raw scratch of 3 bytes a pixel beside the target; libvips then encodes from the scratch, top to
bottom, into a hidden file that is renamed over the final name once it is whole. Memory follows the width, not the
height, except for the levels of a TIFF pyramid (up to about 130 MiB; larger ones wait in the temporary folder) and
for WebP, whose encoder holds the whole picture: 0.1 to 0.4 GiB at 4096x4096, about 16 times that at its largest.

4096x4096 on one core of a server: PNG 1.7 s, JPEG 0.3 s, WebP 2 s (noise: 4 s), TIFF 1.2 s, Deep Zoom 0.7 s.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from handscroll.errors import FormatError, OutputError, SizeError

EXCHANGING = ".exchanging"  # in a folder of Deep Zoom tiles: its index is gone, or not there yet
KEYWORD = "parameters"  # the PNG text chunk that image tools look for
EXIF_TEXT_UNITS = 32_000  # UTF-16 code units of a JPEG or WebP comment: one JPEG segment is at most 65533 bytes
DEFAULT_QUALITY = {"jpeg": 95, "webp": 90, "dzi": 90}

# Every row filter, level 6, against level 1 with one filter (4096x4096): gradient 1.8 MB in 0.8 s against 9.0 MB in
# 0.2 s, gradient with grain 20.5 MB in 1.5 s against 33.8 MB in 0.4 s, noise 50.4 MB in 1.4 s against 53.2 MB in 0.6 s.
PNG_OPTIONS = {"compression": 6, "filter": 0xF8}
# Level 6 is 2 % smaller than level 3 and takes twice as long.
TIFF_OPTIONS = {
    "tile": True,
    "tile_width": 256,
    "tile_height": 256,
    "pyramid": True,
    "bigtiff": True,
    "compression": "deflate",
    "predictor": "horizontal",
    "level": 3,
}
TIFF_LEVEL_IN_MEMORY_BYTES = 100 << 20  # libvips keeps larger levels of a pyramid in the temporary folder


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


@dataclass(frozen=True)
class Target:
    """A file name that can hold the picture. `format` is png, jpeg, webp, tiff or dzi."""

    path: Path
    format: str
    width: int
    height: int

    @property
    def scratch_bytes(self) -> int:
        return self.width * self.height * 3

    @property
    def needed_bytes(self) -> int:
        """Disk wanted while writing: the scratch and an estimate of the file."""
        return self.scratch_bytes + round(self.width * self.height * self._known.bytes_per_pixel)

    @property
    def files_folder(self) -> Path:
        """Where a Deep Zoom picture keeps its tiles."""
        return self.path.with_name(f"{self.path.stem}_files")

    @property
    def final_path(self) -> Path:
        """Where the file really goes: behind a symbolic link, the file it points to is the one to replace."""
        path = self.path.absolute()
        return path if self.format == "dzi" else Path(os.path.realpath(path))

    @property
    def _known(self) -> Format:
        return FORMATS[self.path.suffix.lower()]


def check_target(path: Path, width: int, height: int) -> Target:
    """Refuse a file that could not be written, before any work is done. `width` and `height` are in pixels.

    Raises FormatError (no writer for the suffix), SizeError (no picture, or more pixels a side than the format holds)
    or OutputError (a folder in the way, no such folder, no permission, too little free disk).
    """
    path = Path(path)
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        suffix = f"{path.suffix!r} is not a suffix handscroll writes" if path.suffix else "the file name has no suffix"
        raise FormatError(f"cannot tell the format of {path}: {suffix}; use one of {' '.join(FORMATS)}")
    _check_size(known, width, height)
    target = Target(path, known.name, width, height)
    try:
        str(path).encode()
        _check_place(target)
    except OSError as error:
        raise OutputError(_reason(target, error)) from error
    except ValueError as error:  # a null byte, or bytes that are no text
        raise OutputError(f"cannot write {str(path)!r}: not a valid file name; choose another") from error
    return target


def _check_size(known: Format, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise SizeError(f"{width}x{height} is not a picture: width and height must be at least 1 pixel")
    if max(width, height) > known.max_side_px:
        wide_enough = [suffix for suffix, other in FORMATS.items() if other.max_side_px >= max(width, height)]
        advice = f"use {' '.join(wide_enough)}" if wide_enough else "make it smaller"
        limit = f"{known.title} holds at most {known.max_side_px} pixels a side"
        raise SizeError(f"{limit}, {width}x{height} was asked for: {advice}")


def _check_place(target: Target) -> None:
    path, folder = target.path, target.path.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise OutputError(f"cannot write {path}: the folder {folder} {what}")
    with contextlib.suppress(FileNotFoundError):
        os.lstat(target.files_folder if target.format == "dzi" else path)  # a name too long shows here
    with _folder_lock(folder):
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; choose another name")
        if path.exists():
            if not stat.S_ISREG(path.stat().st_mode):
                raise OutputError(f"cannot write {path}: it is not a regular file; choose another name")
            os.close(os.open(path, os.O_WRONLY))
        if target.format == "dzi":
            _check_files_folder(target, path)
    # Permission bits say little to root, on network shares and on read-only mounts: try it.
    with tempfile.TemporaryFile(dir=target.final_path.parent):  # without a name, where the system can
        pass
    _check_free(path, folder, target.needed_bytes)
    if target.format == "tiff" and target.scratch_bytes // 4 > TIFF_LEVEL_IN_MEMORY_BYTES:
        _check_free(path, Path(tempfile.gettempdir()), target.scratch_bytes // 3)


def _check_files_folder(target: Target, index: Path) -> None:
    files = target.files_folder
    ours = files.is_dir() and not files.is_symlink() and (index.exists() or (files / EXCHANGING).exists())
    if os.path.lexists(files) and not ours:
        raise OutputError(f"cannot write {target.path}: {files} is in the way and is not its older picture; move it")


def _check_free(path: Path, folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        figures = f"needs {_human(needed_bytes)} in {folder}, {_human(free_bytes)} is free"
        raise OutputError(f"not enough disk to write {path}: {figures}; free some space or choose another folder")


def write_image(
    target: Target,
    strips: Iterable[np.ndarray],
    parameters: str = "",
    *,
    quality: int | None = None,
    on_rows: Callable[[int], None] | None = None,
    part: Path | None = None,
    beside: bool = False,
) -> Path:
    """Write `strips` (uint8 [rows, width, 3], top to bottom, any number of rows each) and return the file's path.

    `parameters` is stored in the file for `read_parameters` and other image tools. `quality`, 1 to 100, is for JPEG,
    WebP and Deep Zoom tiles; PNG and TIFF are lossless. `on_rows` is told the rows received so far after each strip.

    The file appears whole or not at all; an older one stays until then. Raises ValueError for strips that do not make
    up the picture, OutputError where it cannot be written; what `strips` or `on_rows` raise passes through unchanged.
    Until it is whole it is called `part`, a name on the same file system that nobody else uses, and the scratch has
    that name with the suffix `.rows`; what a killed process left there is replaced. Left out, hidden names beside it.

    beside: encode on a thread while rows come, without a scratch, to the same bytes. That is for rows that another
    device makes: on a CPU the encoder and those who make rows would take each other's cores, and memory on top.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality is 1 to 100, not {quality}")
    vips = _vips()
    final = target.final_path
    # The name is shortened because the file system may hold no longer one than the target's own.
    part = part or final.with_name(f".{final.name[:40]}.{os.getpid()}-{secrets.token_hex(6)}.part")
    parameters = parameters.replace("\0", "").encode("utf-8", "replace").decode()
    with contextlib.ExitStack() as cleanup:
        with _output_errors(target):
            for leftover in (part, part.with_suffix(".rows")):
                _discard(leftover)
        if beside:
            cleanup.callback(_discard, part)
            encoder = _Encoder(target, lambda image: _encode(image, target, part, parameters, quality))
            with encoder:
                _receive(target, strips, encoder.write, on_rows)
        else:
            with _output_errors(target):
                scratch, scratch_name = _open_scratch(part.with_suffix(".rows"), cleanup)
            _receive(target, strips, lambda strip: _write_all(scratch, strip), on_rows)
            cleanup.callback(_discard, part)
            with _output_errors(target, vips.Error):
                _encode(_picture(scratch_name, target), target, part, parameters, quality)
        with _output_errors(target, vips.Error):
            _publish(target, part, final)
    return target.path


def _open_scratch(path: Path, cleanup: contextlib.ExitStack) -> tuple[int, str]:
    """An empty scratch file: its descriptor and the name to read it by.

    Where the system names open files, it is unlinked at once, so that not even a killed process leaves it behind.
    """
    scratch = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    cleanup.callback(_discard, path)
    cleanup.callback(os.close, scratch)
    by_descriptor = f"/proc/self/fd/{scratch}"
    if not os.path.exists(by_descriptor):
        return scratch, str(path)
    os.unlink(path)
    return scratch, by_descriptor


def _receive(
    target: Target,
    strips: Iterable[np.ndarray],
    write: Callable[[np.ndarray], None],
    on_rows: Callable[[int], None] | None,
) -> None:
    """Hands contiguous strips of a row and more to `write`, after a look at each, and counts their rows."""
    rows = 0
    for strip in strips:
        if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[1:] != (target.width, 3):
            found = f"{strip.dtype} {list(strip.shape)}"
            raise ValueError(f"a strip must be uint8 [rows, {target.width}, 3], not {found}")
        rows += len(strip)
        if rows > target.height:
            raise ValueError(f"the strips hold more than the picture's {target.height} rows")
        if len(strip) == 0:
            continue
        with _output_errors(target):
            write(np.ascontiguousarray(strip))
        if on_rows is not None:
            on_rows(rows)
    if rows != target.height:
        raise ValueError(f"the strips hold {rows} rows, the picture has {target.height}")


def _write_all(descriptor: int, data: Any) -> None:
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


class _Encoder:
    """Encodes on a thread the strips that are written to it, from top to bottom.

    libvips reads no raw rows from a pipe, so they go through it as a PNG that is not compressed, at 0.5 GB/s. A context
    manager, left when all rows are written, or none will come any more; raises what the encoder raised.
    """

    def __init__(self, target: Target, encode: Callable[[Any], None]) -> None:
        self.target, self.encode = target, encode
        self.error: BaseException | None = None
        self.stored = zlib.compressobj(0)

    def __enter__(self) -> Self:
        self.read_end, self.write_end = os.pipe()
        self.thread = threading.Thread(target=self._run, name="encoder")
        self.thread.start()
        header = struct.pack(">IIBBBBB", self.target.width, self.target.height, 8, 2, 0, 0, 0)
        _write_all(self.write_end, b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header))
        return self

    def _run(self) -> None:
        vips = _vips()
        try:
            with _output_errors(self.target, vips.Error):
                source = vips.Source.new_from_descriptor(self.read_end)
                image = vips.Image.new_from_source(source, "", access="sequential", fail_on="truncated")
                self.encode(image.copy(xres=1, yres=1))  # as of raw rows, for which there is no resolution
        except BaseException as error:
            self.error = error
        while os.read(self.read_end, 2**16):  # or who writes would wait for ever
            pass
        os.close(self.read_end)

    def write(self, strip: np.ndarray) -> None:
        if self.error is not None:
            raise self.error
        unfiltered = np.zeros((len(strip), 1 + 3 * strip.shape[1]), np.uint8)
        unfiltered[:, 1:] = strip.reshape(len(strip), -1)
        _write_all(self.write_end, _png_chunk(b"IDAT", self.stored.compress(unfiltered.data)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            _write_all(self.write_end, _png_chunk(b"IDAT", self.stored.flush()) + _png_chunk(b"IEND", b""))
        os.close(self.write_end)
        self.thread.join()
        if error is None and self.error is not None:
            raise self.error


def _vips() -> Any:
    import pyvips

    # A remembered operation would keep the scratch open, and its disk taken, after the picture is written.
    pyvips.cache_set_max(0)
    return pyvips


def _picture(scratch_name: str, target: Target) -> Any:
    image = _vips().Image
    rows = image.rawload(
        scratch_name, target.width, target.height, 3, access="sequential", interpretation="srgb", revalidate=True
    )
    # Asked directly, a raw file is mapped whole and every page of it counts as ours; a join reads through a window.
    return image.arrayjoin([rows], across=1)


def _encode(image: Any, target: Target, part: Path, parameters: str, quality: int | None) -> None:
    q = quality or DEFAULT_QUALITY.get(target.format)
    if target.format == "png":
        _encode_png(image, part, parameters)
    elif target.format == "tiff":
        _describe(image, "image-description", parameters).tiffsave(str(part), **TIFF_OPTIONS)
    elif target.format == "dzi":
        part.mkdir()
        image.dzsave(str(part / "picture"), suffix=f".jpg[Q={q}]", keep="none")
        (part / "picture_files" / "vips-properties.xml").unlink(missing_ok=True)  # the date, and nothing of ours
        if parameters:
            (part / "picture_files" / f"{KEYWORD}.txt").write_text(parameters, encoding="utf-8", newline="")
    else:
        image = _describe(image, "exif-data", _exif(parameters) if parameters else b"")
        # Progressive or optimised JPEG would hold the whole picture.
        (image.jpegsave if target.format == "jpeg" else image.webpsave)(str(part), Q=q)


def _describe(image: Any, field: str, value: str | bytes) -> Any:
    if not value:
        return image
    types = _vips().GValue
    image = image.copy()
    image.set_type(types.gstr_type if isinstance(value, str) else types.blob_type, field, value)
    return image


def _encode_png(image: Any, part: Path, parameters: str) -> None:
    """libvips writes text as UTF-8 where PNG says Latin-1, so the chunk is put in here, before the pixels.

    Room for it is left at the front; then the first 33 bytes, signature and IHDR, move there and the chunk follows.
    """
    chunk = _png_text_chunk(parameters) if parameters else b""
    with open(part, "x+b", buffering=0) as file:
        file.seek(len(chunk))
        image.write_to_target(_vips().Target.new_to_descriptor(file.fileno()), ".png", **PNG_OPTIONS)
        file.seek(len(chunk))
        head = file.read(33)
        file.seek(0)
        file.write(head + chunk)


def _png_text_chunk(text: str) -> bytes:
    try:
        kind, body = b"tEXt", KEYWORD.encode() + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        kind, body = b"iTXt", KEYWORD.encode() + b"\0\0\0\0\0" + text.encode()
    return _png_chunk(kind, body)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _exif(text: str) -> bytes:
    """An EXIF block with nothing but the user comment: IFD0 at 8 points to the Exif IFD at 26, the comment is at 44."""
    units = text.encode("utf-16-be")[: 2 * EXIF_TEXT_UNITS]
    comment = b"UNICODE\0" + units.decode("utf-16-be", "ignore").encode("utf-16-be")
    ifd0 = struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)
    exif_ifd = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + ifd0 + exif_ifd + comment


def _publish(target: Target, part: Path, final: Path) -> None:
    index = part / "picture.dzi" if target.format == "dzi" else part
    with open(index, "r+b") as file:
        os.fsync(file.fileno())
    with _folder_lock(final.parent) as folder:
        if target.format == "dzi":
            _publish_pair(target, part, final)
        else:
            os.replace(part, final)
        if folder is not None:
            with contextlib.suppress(OSError):
                os.fsync(folder)


def _publish_pair(target: Target, part: Path, final: Path) -> None:
    """Move the tiles into place, then the index. At no time does an index stand beside another picture's tiles.

    Meanwhile the tiles are marked, so that whoever comes after a killed process knows them for ours.
    """
    files = final.with_name(target.files_folder.name)
    _check_files_folder(target, final)
    moves = [
        (final, part / "older.dzi"),
        (files, part / "older_files"),
        (part / "picture_files", files),
        (part / "picture.dzi", final),
    ]
    with contextlib.ExitStack() as undo:
        for tiles in (files, part / "picture_files"):
            if tiles.is_dir():
                (tiles / EXCHANGING).touch()
                undo.callback((tiles / EXCHANGING).unlink, missing_ok=True)
        for source, destination in moves:
            if os.path.lexists(source):
                os.rename(source, destination)
                undo.callback(os.rename, destination, source)
        undo.pop_all()
    (files / EXCHANGING).unlink()


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[int | None]:
    """Hold the folder against other writers of handscroll; where folders cannot be locked, carry on without."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _output_errors(target: Target, *library_errors: type[Exception]) -> Iterator[None]:
    caught: tuple[type[Exception], ...] = (OSError, *library_errors)
    try:
        yield
    except caught as error:
        raise OutputError(_reason(target, error)) from error


def _reason(target: Target, error: Exception) -> str:
    """One line on what went wrong. libvips passes the system's reasons on as text only."""
    path, folder, needed = target.path, target.path.parent, _human(target.needed_bytes)
    number = error.errno if isinstance(error, OSError) else None
    text = " ".join(str(error).split())

    def is_about(*numbers: int) -> bool:
        return number in numbers or (number is None and any(os.strerror(each) in text for each in numbers))

    if is_about(errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing {path}: needs {needed} free in {folder}; free some or choose another folder"
    if is_about(errno.EFBIG):
        return f"file size limit reached while writing {path}: needs {needed}; raise the limit (ulimit -f)"
    if not folder.is_dir():
        return f"cannot write {path}: the folder {folder} has gone; create it again or choose another"
    if is_about(errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write {path}: no permission to write it; change that or choose another folder"
    return f"cannot write {path}: {(error.strerror if isinstance(error, OSError) else None) or text}"


def _human(size_bytes: float) -> str:
    unit = 0
    while size_bytes >= 1024 and unit < 4:
        size_bytes, unit = size_bytes / 1024, unit + 1
    return f"{size_bytes:.{min(unit, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def parameters_text(
    prompt: str,
    negative: str,
    *,
    steps: int,
    sampler: str,
    guidance: float,
    seed: int,
    width: int,
    height: int,
    model: str,
    version: str,
    memory_mode: str,
    exact: bool,
    precision: str = "",
    composed: str = "",
) -> str:
    """How a picture was made, in the lines that image tools read. `version` is handscroll's own, such as 0.1.0.

    composed: the size, as 512x512, at which a picture began that grew; image tools know it as the first pass.
    """
    fields = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": f"{guidance:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        **({"First pass size": composed} if composed else {}),
        "Model": model,
        **({"Precision": precision} if precision else {}),
        "Version": f"handscroll {version}",
        "Memory mode": memory_mode,
        "Exact": "true" if exact else "false",
    }
    lines = [prompt.strip()]
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
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise FormatError(f"cannot read {path}: use one of {' '.join(FORMATS)}")
    with open(path, "rb") as file:
        if known is PNG:
            return _read_png_text(path, file)
    if known is DZI:
        text = path.with_name(f"{path.stem}_files") / f"{KEYWORD}.txt"
        return text.read_bytes().decode("utf-8", "replace") if text.exists() else ""
    vips = _vips()
    try:
        image = vips.Image.new_from_file(str(path), access="sequential", revalidate=True)
    except vips.Error as error:
        raise FormatError(f"cannot read {path}: not a {known.title} picture, or a damaged one") from error
    if known is TIFF:
        return image.get("image-description") if image.get_typeof("image-description") else ""
    return _read_user_comment(image.get("exif-data")) if image.get_typeof("exif-data") else ""


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
        # A few kilobytes can unpack to gigabytes.
        return (zlib.decompressobj().decompress(body, 1 << 24) if packed else body).decode(charset, "replace")
    return ""


def _read_user_comment(exif: bytes) -> str:
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
