"""Maps between two sweeps that are not kept on the device: in host memory, or in a scratch file.

Both are `RowMap`s, to be made by the `new_map` of `autoencoder.decode_rows`. Rows come back bit for bit as they were
written, in any dtype and on the device that they came from.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from handscroll.banded.rows import RowBlock, RowMap
from handscroll.errors import OutputError
from handscroll.files import write_all
from handscroll.limits import MAP_CHUNK_BYTES
from handscroll.plan.decode import DecodeStage
from handscroll.plan.store import Store
from handscroll.system import free_disk_bytes
from handscroll.units import gibibytes

# A row block that is not contiguous is written in pieces of about this size, and never copied as a whole.
COPY_BYTES = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HostMap(RowMap):
    """A device's map in host memory, pinned where the device is CUDA; on a CPU no different from a `RowMap`.

    Row blocks are copied one by one, to the host when they are written and back when they are read.
    """

    def __init__(self, height: int, chunk_bytes: int = MAP_CHUNK_BYTES) -> None:
        super().__init__(height, chunk_bytes)
        self.device = torch.device("cpu")

    def new_chunk(self, row_block: Tensor, rows: int) -> Tensor:
        self.device = row_block.device
        batch, _, width, channels = row_block.shape
        shape, on_cuda = (batch, rows, width, channels), row_block.device.type == "cuda"
        # Pinning makes a context on the current device where there is none.
        with torch.cuda.device(row_block.device) if on_cuda else nullcontext():
            return torch.empty(shape, dtype=row_block.dtype, device="cpu", pin_memory=on_cuda)

    def row_blocks(self, strip_rows: int, keep: bool = False) -> Iterator[Tensor]:
        for row_block in super().row_blocks(strip_rows, keep):
            # From pinned memory the copy does not wait; PyTorch keeps the memory until it has ended.
            held = [row_block.to(self.device, non_blocking=row_block.is_pinned())]
            del row_block
            yield held.pop()


class DiskMap(RowMap):
    """A map in a scratch file, which has no name: nothing is left behind however the process ends.

    folder: where the file is, the system's temporary folder if None (which some systems keep in memory). The file is
    read and written, not mapped, so that no part of it counts as the process's memory. Its room, `map_bytes`, is given
    back by `close`, and read rows are not given back before. Writing raises OutputError where the folder is full or
    cannot be written to.
    """

    def __init__(self, height: int, folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__(height)
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.like: Tensor | None = None  # no rows, of the map's batch, width, channels, dtype and device
        try:
            self.file: BinaryIO = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"no scratch file can be made in {self.folder}: {error.strerror}") from None

    @property
    def row_bytes(self) -> int:
        """One row of one image of the batch; 0 before the first row is written."""
        return 0 if self.like is None else self.like.element_size() * self.like.shape[2:].numel()

    @property
    def map_bytes(self) -> int:
        """The size of the file once all rows are written; 0 before the first row is written."""
        return 0 if self.like is None else self.like.shape[0] * self.height * self.row_bytes

    def write(self, row_block: RowBlock) -> None:
        if row_block is None or not row_block.shape[1]:
            return
        if self.like is None:
            self.like = row_block.new_empty(row_block.shape[0], 0, *row_block.shape[2:])
            self._check_room()
        step = max(1, COPY_BYTES // self.row_bytes)
        try:
            for index, image in enumerate(row_block):
                pieces = [image] if image.is_contiguous() and image.device.type == "cpu" else image.split(step)
                self.file.seek((index * self.height + self.rows_written) * self.row_bytes)
                for piece in pieces:
                    write_all(self.file.fileno(), _bytes_of(piece.cpu().contiguous()))
        except OSError as error:
            raise self._failed(error) from None
        self.rows_written += row_block.shape[1]

    def row_blocks(self, strip_rows: int, keep: bool = False) -> Iterator[Tensor]:
        if self.like is None:
            return
        batch, _, width, channels = self.like.shape
        for top in range(0, self.rows_written, strip_rows):
            rows = min(strip_rows, self.rows_written - top)
            # New memory for each row block, since a residual branch may hold on to rows of the last one.
            held = [torch.empty(batch, rows, width, channels, dtype=self.like.dtype)]
            try:
                for index in range(batch):
                    offset = (index * self.height + top) * self.row_bytes
                    self.file.seek(offset)
                    _read_all(self.file, _bytes_of(held[0][index]))
                    _read_ahead(self.file, offset + rows * self.row_bytes, rows * self.row_bytes)
            except OSError as error:
                raise self._failed(error) from None
            yield held.pop().to(self.like.device)
        if not keep:
            self.close()

    def close(self) -> None:
        self.file.close()
        self.like = None

    def _check_room(self) -> None:
        """Fails before the first row where the map cannot fit."""
        try:
            free_bytes = free_disk_bytes(self.folder)
        except OSError:
            return  # then the first write that does not fit will tell
        if free_bytes is not None and free_bytes < self.map_bytes:
            raise self._failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def _failed(self, error: OSError) -> OutputError:
        if error.errno in _FULL:
            return OutputError(
                f"the scratch folder {self.folder} is full: a map needs {self.map_bytes} bytes "
                f"({gibibytes(self.map_bytes, decimals=2)}) there; make room or name another folder"
            )
        return OutputError(f"the scratch file in {self.folder} failed: {error.strerror or error}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory, whatever its dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "it is shorter than what was written")
        data = data[count:]


def _read_ahead(file: BinaryIO, offset: int, count: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)


def new_map(store: Store | None, height: int, scratch: Path | None) -> RowMap:
    """A map of so many rows where the plan wants it (None: nowhere else than in memory)."""
    match store:
        case "host":
            return HostMap(height)
        case "disk":
            return DiskMap(height, scratch)
    return RowMap(height)


def map_maker(stage: DecodeStage | None, scratch: Path | None) -> Callable[[int, int], RowMap]:
    """Makes the map that a sweep starts from, by the sweep's number and the map's height, where the plan wants it."""
    return lambda index, height: new_map(stage.sweeps[index].store if stage else "memory", height, scratch)
