"""Row blocks become a picture file.

    target = check_target(Path("dusk.png"), 4096, 4096)      # refuses here, before any work
    write_image(target, row_blocks, parameters)  # row blocks: uint8 [rows, width, 3], top to bottom

Row blocks stream into a raw scratch of 3 bytes a pixel beside the target; libvips then encodes from the scratch, top to
bottom, into a hidden file that is renamed over the final name once it is whole. Memory follows the width, not the
height, except for the levels of a TIFF pyramid (up to about 130 MiB; larger ones wait in the temporary folder) and
for WebP, whose encoder holds the whole picture: 0.1 to 0.4 GiB at 4096x4096, about 16 times that at its largest.

4096x4096 on one core of a server: PNG 1.7 s, JPEG 0.3 s, WebP 2 s (noise: 4 s), TIFF 1.2 s, Deep Zoom 0.7 s.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from handscroll.files import discard, lock_folder, open_new, part_beside, sync_file, sync_folder, write_all
from handscroll.pictures.encoding import encode_picture
from handscroll.pictures.metadata import png_chunk
from handscroll.pictures.targets import EXCHANGING, Target, check_files_folder, output_errors
from handscroll.pictures.vips import load_vips
from handscroll.threads import POLL_SECONDS, run_watched


def write_image(
    target: Target,
    row_blocks: Iterable[np.ndarray],
    parameters: str = "",
    *,
    quality: int | None = None,
    on_rows: Callable[[int], None] | None = None,
    on_wait: Callable[[], None] = lambda: None,
    part: Path | None = None,
    beside: bool = False,
) -> Path:
    """Write `row_blocks` (uint8 [rows, width, 3], top to bottom, any number of rows each) and return the file's path.

    `parameters` is stored in the file for `read_parameters` and other image tools. `quality`, 1 to 100, is for JPEG,
    WebP and Deep Zoom tiles; PNG and TIFF are lossless. `on_rows` is told after each row block how many rows have come.
    `on_wait` is called every tenth of a second while the file is encoded; raising there stops the encoder at once, but
    for WebP, which is encoded in one piece.

    The file appears whole or not at all; an older one stays until then. Raises ValueError for row blocks that do not
    make up the picture, OutputError where it cannot be written, OutOfMemoryError; what `row_blocks`, `on_rows` or
    `on_wait` raise passes through unchanged. Until it is whole it is called `part`, a name on the same file system that
    nobody else uses, and the scratch has that name with the suffix `.rows`; what a killed process left there is
    replaced. Left out, hidden names beside it.

    beside: encode on a thread while rows come, without a scratch, to the same bytes. That is for rows that another
    device makes: on a CPU the encoder and those who make rows would take each other's cores, and memory on top.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality is 1 to 100, not {quality}")
    vips = load_vips()
    final = target.final_path
    part = part or part_beside(final)
    parameters = parameters.replace("\0", "").encode("utf-8", "replace").decode()
    with contextlib.ExitStack() as cleanup:
        with output_errors(target):
            for leftover in (part, part.with_suffix(".rows")):
                discard(leftover)
        if beside:
            cleanup.callback(discard, part)
            encoder = _Encoder(target, lambda image: encode_picture(image, target, part, parameters, quality), on_wait)
            with encoder:
                _receive(target, row_blocks, encoder.write, on_rows)
        else:
            with output_errors(target):
                scratch, scratch_name = _open_scratch(part.with_suffix(".rows"), cleanup)
            _receive(target, row_blocks, lambda row_block: write_all(scratch, row_block), on_rows)
            cleanup.callback(discard, part)
            with output_errors(target, vips.Error):
                image = _picture(scratch_name, target)

            def encode() -> None:
                with output_errors(target, vips.Error):
                    encode_picture(image, target, part, parameters, quality)

            run_watched(encode, on_wait, lambda: image.set_kill(True))
        with output_errors(target, vips.Error):
            publish(target, part, final)
    return target.path


def _open_scratch(path: Path, cleanup: contextlib.ExitStack) -> tuple[int, str]:
    """An empty scratch file: its descriptor and the name to read it by.

    Where the system names open files, it is unlinked at once, so that not even a killed process leaves it behind.
    """
    scratch = open_new(path)
    cleanup.callback(discard, path)
    cleanup.callback(os.close, scratch)
    by_descriptor = f"/proc/self/fd/{scratch}"
    if not os.path.exists(by_descriptor):
        return scratch, str(path)
    os.unlink(path)
    return scratch, by_descriptor


def _receive(
    target: Target,
    row_blocks: Iterable[np.ndarray],
    write: Callable[[np.ndarray], None],
    on_rows: Callable[[int], None] | None,
) -> None:
    """Hands contiguous row blocks of a row and more to `write`, after a look at each, and counts their rows."""
    rows = 0
    for row_block in row_blocks:
        if row_block.dtype != np.uint8 or row_block.ndim != 3 or row_block.shape[1:] != (target.width, 3):
            found = f"{row_block.dtype} {list(row_block.shape)}"
            raise ValueError(f"a row block must be uint8 [rows, {target.width}, 3], not {found}")
        rows += len(row_block)
        if rows > target.height:
            raise ValueError(f"the row blocks hold more than the picture's {target.height} rows")
        if len(row_block) == 0:
            continue
        with output_errors(target):
            write(np.ascontiguousarray(row_block))
        if on_rows is not None:
            on_rows(rows)
    if rows != target.height:
        raise ValueError(f"the row blocks hold {rows} rows, the picture has {target.height}")


class _Encoder:
    """Encodes on a thread the row blocks that are written to it, from top to bottom.

    libvips reads no raw rows from a pipe, so they go through it as a PNG that is not compressed, at 0.5 GB/s. A context
    manager, left when all rows are written, or none will come any more; raises what the encoder raised. `on_wait` is
    called while the last of them are encoded.
    """

    def __init__(self, target: Target, encode: Callable[[Any], None], on_wait: Callable[[], None]) -> None:
        self.target, self.encode, self.on_wait = target, encode, on_wait
        self.image: Any = None
        self.error: BaseException | None = None
        self.stored = zlib.compressobj(0)

    def __enter__(self) -> Self:
        self.read_end, self.write_end = os.pipe()
        self.thread = threading.Thread(target=self._run, name="encoder")
        self.thread.start()
        header = struct.pack(">IIBBBBB", self.target.width, self.target.height, 8, 2, 0, 0, 0)
        write_all(self.write_end, b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header))
        return self

    def _run(self) -> None:
        vips = load_vips()
        try:
            with output_errors(self.target, vips.Error):
                source = vips.Source.new_from_descriptor(self.read_end)
                self.image = vips.Image.new_from_source(source, "", access="sequential", fail_on="truncated")
                self.encode(self.image.copy(xres=1, yres=1))  # as of raw rows, for which there is no resolution
        except BaseException as error:
            self.error = error
        while os.read(self.read_end, 2**16):  # or who writes would wait for ever
            pass
        os.close(self.read_end)

    def write(self, row_block: np.ndarray) -> None:
        if self.error is not None:
            raise self.error
        unfiltered = np.zeros((len(row_block), 1 + 3 * row_block.shape[1]), np.uint8)
        unfiltered[:, 1:] = row_block.reshape(len(row_block), -1)
        write_all(self.write_end, png_chunk(b"IDAT", self.stored.compress(unfiltered.data)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            write_all(self.write_end, png_chunk(b"IDAT", self.stored.flush()) + png_chunk(b"IEND", b""))
        os.close(self.write_end)
        try:
            while self.thread.is_alive() and error is None:
                self.thread.join(POLL_SECONDS)
                self.on_wait()
        except BaseException:
            if self.image is not None:
                self.image.set_kill(True)
            raise
        finally:
            self.thread.join()
        if error is None and self.error is not None:
            raise self.error


def _picture(scratch_name: str, target: Target) -> Any:
    image = load_vips().Image
    rows = image.rawload(
        scratch_name, target.width, target.height, 3, access="sequential", interpretation="srgb", revalidate=True
    )
    # Asked directly, a raw file is mapped whole and every page of it counts as ours; a join reads through a window.
    return image.arrayjoin([rows], across=1)


def publish(target: Target, part: Path, final: Path) -> None:
    sync_file(part / "picture.dzi" if target.format == "dzi" else part)
    with lock_folder(final.parent):
        if target.format == "dzi":
            _publish_pair(target, part, final)
        else:
            os.replace(part, final)
        sync_folder(final.parent)


def _publish_pair(target: Target, part: Path, final: Path) -> None:
    """Move the tiles into place, then the index. At no time does an index stand beside another picture's tiles.

    Meanwhile the tiles are marked, so that whoever comes after a killed process knows them for ours.
    """
    files = final.with_name(target.files_folder.name)
    check_files_folder(target, final)
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
