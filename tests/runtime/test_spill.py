"""Maps come back bit for bit from wherever they were put, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handscroll.banded.rows import RowMap, cut
from handscroll.errors import OutputError
from handscroll.runtime import maps
from handscroll.runtime.maps import DiskMap, HostMap

KINDS: dict[str, Callable[[int], RowMap]] = {
    "host": lambda height: HostMap(height, chunk_bytes=100),
    "disk": lambda height: DiskMap(height),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn)


def random(
    height: int, batch: int = 2, width: int = 5, channels: int = 3, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, height, width, channels, generator=generator).to(dtype)


def bits(map_: Tensor) -> Tensor:
    return map_.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strip_rows", [1, 3, 20])
def test_bit_for_bit_in_every_type(kind: str, dtype: torch.dtype, strip_rows: int) -> None:
    map_ = random(7, dtype=dtype)
    kept = KINDS[kind](7)
    for row_block in [None, *cut(map_, 2)]:
        kept.write(row_block)
    for keep in (True, True, False):
        row_blocks = list(kept.row_blocks(strip_rows, keep=keep))
        assert [row_block.shape[1] for row_block in row_blocks] == [
            row_block.shape[1] for row_block in cut(map_, strip_rows)
        ]
        assert all(row_block.dtype == dtype for row_block in row_blocks)
        assert torch.equal(bits(torch.cat(row_blocks, dim=1)), bits(map_))
    kept.close()
    kept.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy_bytes", [1, 200, 2**20])
def test_strips_that_are_views(kind: str, copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "COPY_BYTES", copy_bytes)
    map_ = random(6, width=10)[:, :, ::2]
    kept = KINDS[kind](6)
    for row_block in map_.split([1, 3, 2], dim=1):
        kept.write(row_block)
    row_blocks = list(kept.row_blocks(4))
    assert torch.equal(torch.cat(row_blocks, dim=1), map_)
    assert all(row_block.is_contiguous() for row_block in row_blocks) or kind == "host"


def test_strips_are_memory_of_their_own() -> None:
    """A residual branch holds on to rows of the row block before."""
    map_ = random(6)
    kept = DiskMap(6)
    kept.write(map_)
    row_blocks = list(kept.row_blocks(2, keep=True))
    row_blocks[1].zero_()
    assert torch.equal(row_blocks[0], map_[:, :2])
    assert torch.equal(torch.cat(list(kept.row_blocks(6)), dim=1), map_)


def test_one_map_is_read_while_another_is_written(tmp_path: Path) -> None:
    first, second = DiskMap(9, tmp_path), DiskMap(9, tmp_path)
    map_ = random(9)
    first.write(map_)
    for row_block in first.row_blocks(2):
        second.write(row_block * 2)
    assert torch.equal(torch.cat(list(second.row_blocks(4)), dim=1), map_ * 2)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    kept = DiskMap(3, tmp_path)
    kept.write(random(3))
    assert kept.map_bytes == random(3).nbytes
    assert os.fstat(kept.file.fileno()).st_size == kept.map_bytes
    assert not list(tmp_path.iterdir())
    kept.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_is_left_by_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from handscroll.runtime.maps import DiskMap\n"
        f"kept = DiskMap(64, {str(tmp_path)!r}); kept.write(torch.ones(1, 64, 64, 64))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_map_on_disk_is_not_resident() -> None:
    map_bytes = 64 * 2**20
    rows = torch.ones(1, 8, 64, 2048)  # 4 MiB
    kept = DiskMap(map_bytes // rows[0, 0].nbytes)
    kept.write(rows)
    before = _resident_bytes()
    for _ in range(15):
        kept.write(rows)
    for row_block in kept.row_blocks(8):
        assert row_block[0, 0, 0, 0] == 1
    assert _resident_bytes() - before < map_bytes // 2


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_one_line(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DiskMap(6, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(maps, "write_all", fail)
    with pytest.raises(OutputError, match=f"{tmp_path} is full: a map needs {random(6).nbytes} bytes") as caught:
        kept.write(random(6)[:, :1])
    assert "\n" not in str(caught.value)
    kept.close()


def test_a_map_that_cannot_fit_is_refused_before_its_first_row(tmp_path: Path) -> None:
    with closing(DiskMap(2**50, tmp_path)) as kept, pytest.raises(OutputError, match="TiB"):
        kept.write(random(1))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no scratch file can be made in .*nowhere"):
        DiskMap(6, tmp_path / "nowhere")


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    kept = DiskMap(6, tmp_path)
    kept.write(random(6))
    kept.file.truncate(100)
    with closing(kept), pytest.raises(OutputError, match="shorter"):
        list(kept.row_blocks(2))


def test_an_empty_map() -> None:
    kept = DiskMap(6)
    assert list(kept.row_blocks(2)) == []
    kept.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_map_comes_back_to_its_device(kind: str) -> None:
    map_ = random(7, dtype=torch.bfloat16).cuda()
    kept = KINDS[kind](7)
    for row_block in cut(map_, 2):
        kept.write(row_block)
    if isinstance(kept, HostMap):
        assert all(chunk.is_pinned() for chunk in kept.chunks)
    for keep in (True, False):
        row_blocks = list(kept.row_blocks(3, keep=keep))
        assert row_blocks[0].is_cuda
        assert torch.equal(torch.cat(row_blocks, dim=1), map_)
