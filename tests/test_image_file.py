"""pictures: every refusal, every format's pixels and text, and what is left behind when writing fails."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st

from handscroll.errors import FormatError, OutOfMemoryError, OutputError, SizeError
from handscroll.pictures import encoding, metadata, targets, writing
from handscroll.pictures.metadata import parameters_text, read_parameters
from handscroll.pictures.targets import check_target
from handscroll.pictures.writing import write_image
from permissions import obey_permissions

SOURCE = Path(writing.__file__).parent.parents[1]
SUFFIXES = [".png", ".jpg", ".webp", ".tif", ".dzi"]
TEXTS = ["plain words", "café, naïve\nNegative prompt: Straße", '山水画, "quoted" 🌄\nSteps: 20', "x" * 3000]


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, 128 + 100 * np.sin(x / 9 + seed) * np.cos(y / 7)], axis=-1)
    return smooth.astype(np.uint8)


def in_strips(pixels: np.ndarray, rows: int = 7) -> Iterator[np.ndarray]:
    for top in range(0, len(pixels), rows):
        yield pixels[top : top + rows]


def save(path: Path, pixels: np.ndarray, parameters: str = "", **options: Any) -> Path:
    target = check_target(path, pixels.shape[1], pixels.shape[0])
    return write_image(target, in_strips(pixels), parameters, **options)


def load(path: Path) -> np.ndarray:
    if path.suffix == ".dzi":
        tiles = path.with_name(f"{path.stem}_files")
        top = max(int(level.name) for level in tiles.iterdir() if level.is_dir())
        path = tiles / str(top) / "0_0.jpg"
    return pyvips.Image.new_from_file(str(path), revalidate=True).numpy()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def png_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + size
    return chunks


def run_python(
    code: str, *arguments: object, preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, preexec_fn=preexec_fn, capture_output=True, text=True, timeout=60, check=False
    )


# Refusals


@pytest.mark.parametrize("name", ["out", "out.bmp", "out.", ".png", "out.png.zip"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"\.png \.jpg \.jpeg \.webp \.tif \.tiff \.dzi") as refusal:
        check_target(tmp_path / name, 8, 8)
    assert "\n" not in str(refusal.value)


def test_suffixes_in_capitals_are_known(tmp_path: Path) -> None:
    assert check_target(tmp_path / "OUT.JPEG", 8, 8).format == "jpeg"
    assert load(save(tmp_path / "OUT.PNG", picture(9, 5))).shape == (5, 9, 3)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8)])
def test_an_empty_picture_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(SizeError, match="at least 1 pixel"):
        check_target(tmp_path / "out.png", *size)


@pytest.mark.parametrize(
    ("suffix", "limit", "instead"),
    [
        (".webp", 16_383, "use .png .jpg .jpeg .tif .tiff .dzi"),
        (".jpg", 65_500, "use .png .tif .tiff .dzi"),
        (".png", 100_000_000, "make it smaller"),
        (".tif", 100_000_000, "make it smaller"),
    ],
)
def test_a_formats_pixel_limit_is_refused(tmp_path: Path, suffix: str, limit: int, instead: str) -> None:
    for size in [(limit + 1, 1), (1, limit + 1)]:
        with pytest.raises(SizeError, match=f"{limit} pixels a side.*{instead}"):
            check_target(tmp_path / f"out{suffix}", *size)
    assert check_target(tmp_path / f"out{suffix}", limit, 1).width == limit


@pytest.mark.parametrize(("suffix", "limit"), [(".webp", 16_383), (".jpg", 65_500)])
def test_the_limit_itself_can_be_written(tmp_path: Path, suffix: str, limit: int) -> None:
    pixels = np.zeros((1, limit, 3), np.uint8)
    assert load(save(tmp_path / f"wide{suffix}", pixels)).shape == pixels.shape


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "folder.png": "it is a folder",
        "missing/out.png": "does not exist; create it first",
        "file/out.png": "is not a folder",
        "pipe.png": "not a regular file",
        "n" * 253 + ".png": "too long",
        "n" * 250 + ".dzi": "too long",
        "nul\0.png": "not a valid file name",
        "\udcff.png": "not a valid file name",
    }.items():
        with pytest.raises(OutputError, match=reason) as refusal:
            check_target(tmp_path / name, 8, 8)
        assert "\n" not in str(refusal.value)


def test_a_folder_or_file_without_permission_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    older = tmp_path / "older.png"
    older.write_text("older")
    older.chmod(0o444)
    locked.chmod(0o555)
    code = """
import os, sys
from pathlib import Path
from handscroll.errors import OutputError
from handscroll.pictures.targets import check_target
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    try:
        check_target(Path(name), 8, 8)
    except OutputError as error:
        print(error)
"""
    result = run_python(code, tmp_path, "locked/out.png", "older.png", preexec_fn=obey_permissions)
    assert result.stdout.count("no permission") == 2, result
    assert older.read_text() == "older"


def test_too_little_disk_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "free_disk_bytes", lambda folder: 3 << 19)
    with pytest.raises(OutputError, match=r"needs 80 MiB in .*, 1\.5 MiB is free; free some space"):
        check_target(tmp_path / "out.png", 4096, 4096)
    assert names(tmp_path) == set()


def test_the_temporary_folder_must_hold_a_large_pyramid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "free_disk_bytes", lambda folder: 1 << 40 if folder == tmp_path else 1 << 20)
    check_target(tmp_path / "out.tif", 4096, 4096)
    with pytest.raises(OutputError, match=r"needs 1\.0 GiB in .*, 1\.0 MiB is free"):
        check_target(tmp_path / "out.tif", 32768, 32768)


def test_a_stranger_where_deep_zoom_tiles_go_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page_files").mkdir()
    with pytest.raises(OutputError, match="page_files is in the way"):
        check_target(tmp_path / "page.dzi", 8, 8)
    target = check_target(tmp_path / "late.dzi", 8, 8)
    (tmp_path / "late_files").mkdir()
    (tmp_path / "late_files" / "precious").write_text("")
    with pytest.raises(OutputError, match="late_files is in the way"):
        write_image(target, [np.zeros((8, 8, 3), np.uint8)])
    assert names(tmp_path) == {"page_files", "late_files"}
    assert names(tmp_path / "late_files") == {"precious"}


def test_checking_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    older = tmp_path / "out.png"
    older.write_bytes(b"older")
    target = check_target(older, 32, 16)
    assert (target.path, target.format, target.width, target.height) == (older, "png", 32, 16)
    assert names(tmp_path) == {"out.png"}
    assert older.read_bytes() == b"older"


# Pixels


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_the_picture(tmp_path: Path, suffix: str) -> None:
    pixels = picture(120, 90)
    rows: list[int] = []
    path = save(tmp_path / f"a [1] %d é 山{suffix}", pixels, on_rows=rows.append)
    assert rows == [*range(7, 90, 7), 90]
    loaded = load(path)
    assert loaded.shape == pixels.shape
    difference = np.abs(loaded.astype(int) - pixels)
    assert difference.mean() < (0.1 if suffix in (".png", ".tif") else 3)
    if suffix in (".png", ".tif"):
        assert difference.max() == 0
    if suffix != ".dzi":
        assert names(tmp_path) == {path.name}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@settings(max_examples=25, deadline=None)
@given(
    suffix=st.sampled_from([".png", ".tif", ".jpg"]),
    width=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    layout=st.sampled_from(["C", "planes", "mirrored"]),
)
def test_any_partition_gives_the_same_pixels(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, width: int, cuts: list[int], layout: str
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    pixels = np.random.default_rng(width).integers(0, 256, (sum(cuts), width, 3), dtype=np.uint8)
    arranged = {
        "C": pixels,
        "planes": np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0),
        "mirrored": pixels[:, ::-1].copy()[:, ::-1],
    }[layout]
    target = check_target(folder / f"cut{suffix}", width, len(pixels))
    write_image(target, np.split(arranged, np.cumsum(cuts)[:-1]))
    whole = check_target(folder / f"whole{suffix}", width, len(pixels))
    write_image(whole, [pixels])
    assert target.path.read_bytes() == whole.path.read_bytes()
    if suffix != ".jpg":
        np.testing.assert_array_equal(load(target.path), pixels)


def test_tiff_is_a_tiled_pyramid_in_bigtiff(tmp_path: Path) -> None:
    path = save(tmp_path / "pyramid.tiff", picture(1100, 600), "p")
    assert path.read_bytes()[:4] == b"II+\0"
    image = pyvips.Image.new_from_file(str(path))
    assert image.get("n-pages") == 4
    assert image.get("tile-width") == 256
    last = pyvips.Image.new_from_file(str(path), page=3)
    assert (last.width, last.height) == (137, 75)


def test_deep_zoom_tiles_cover_the_picture(tmp_path: Path) -> None:
    save(tmp_path / "zoom.dzi", picture(600, 300), "how it was made")
    assert names(tmp_path) == {"zoom.dzi", "zoom_files"}
    assert 'Width="600"' in (tmp_path / "zoom.dzi").read_text()
    assert len(list((tmp_path / "zoom_files" / "10").iterdir())) == 6
    assert (tmp_path / "zoom_files" / "parameters.txt").read_text() == "how it was made"


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".dzi"])
def test_quality_changes_the_size(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (20, None, 100):
        folder = tmp_path / str(quality)
        folder.mkdir()
        save(folder / f"out{suffix}", noise, quality=quality)
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    assert sizes[0] < sizes[1] / 1.5 < sizes[2] / 1.6
    for quality in (0, 101):
        with pytest.raises(ValueError, match="1 to 100"):
            save(tmp_path / f"never{suffix}", noise, quality=quality)


@pytest.mark.parametrize(
    ("row_blocks", "reason"),
    [
        ([np.zeros((7, 9, 3), np.uint8)], "hold 7 rows, the picture has 8"),
        ([], "hold 0 rows"),
        ([np.zeros((4, 9, 3), np.uint8), np.zeros((5, 9, 3), np.uint8)], "more than the picture's 8 rows"),
        ([np.zeros((8, 8, 3), np.uint8)], r"not uint8 \[8, 8, 3\]"),
        ([np.zeros((8, 9, 4), np.uint8)], r"not uint8 \[8, 9, 4\]"),
        ([np.zeros((8, 9), np.uint8)], r"not uint8 \[8, 9\]"),
        ([np.zeros((8, 9, 3), np.float32)], r"not float32 \[8, 9, 3\]"),
    ],
)
def test_strips_that_do_not_make_up_the_picture(tmp_path: Path, row_blocks: list[np.ndarray], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_image(check_target(tmp_path / "out.png", 9, 8), row_blocks)
    assert names(tmp_path) == set()


# Text


@pytest.mark.parametrize("text", TEXTS)
def test_png_text_is_standard_and_before_the_pixels(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "text.png", picture(30, 20), text)
    chunks = png_chunks(path)
    kinds = [kind for kind, _ in chunks]
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    if text.isascii() or "é" in text:
        assert kinds.index(b"tEXt") < kinds.index(b"IDAT")
        assert dict(chunks)[b"tEXt"] == b"parameters\0" + text.encode("latin-1")
    else:
        assert kinds.index(b"iTXt") < kinds.index(b"IDAT")
        assert dict(chunks)[b"iTXt"] == b"parameters\0\0\0\0\0" + text.encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", ["", *TEXTS])
def test_text_comes_back(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"same name every time{suffix}"
    save(path, picture(20, 20), "older text")
    assert read_parameters(path) == "older text"
    save(path, picture(20, 20), text)
    assert read_parameters(path) == text


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_user_comment_is_standard_exif(tmp_path: Path, suffix: str) -> None:
    text = "山水 é 🌄"
    data = save(tmp_path / f"exif{suffix}", picture(20, 20), text).read_bytes()
    assert data.count(b"Exif\0\0") == 1
    assert b"UNICODE\0" + text.encode("utf-16-be") in data


def test_exif_from_elsewhere_is_read() -> None:
    comment = b"ASCII\0\0\0seen\0"
    entry = struct.pack("<HHHIII", 1, 0x8769, 4, 1, 26, 0) + struct.pack("<HHHIII", 1, 0x9286, 7, len(comment), 44, 0)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + comment
    assert metadata.read_user_comment(block) == "seen"
    for length in range(len(block) - len(comment)):
        assert metadata.read_user_comment(block[:length]) == ""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_awkward_text_is_no_reason_to_fail(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"odd{suffix}", picture(20, 20), "nul\0 and half a pair \ud83c")
    assert read_parameters(path) == "nul and half a pair ?"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_very_long_text_is_cut_to_what_exif_holds(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"long{suffix}", picture(20, 20), "x" + "🌄" * 40_000)
    assert read_parameters(path) == "x" + "🌄" * 15_999


def test_png_text_of_other_tools_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "plain.png", picture(8, 8))
    plain = path.read_bytes()
    for kind, body in [
        (b"zTXt", b"parameters\0\0" + zlib.compress("café".encode("latin-1"))),
        (b"iTXt", b"parameters\0\1\0fr\0param\xc3\xa8tres\0" + zlib.compress("café".encode())),
    ]:
        chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        path.write_bytes(plain[:-12] + chunk + plain[-12:])
        assert read_parameters(path) == "café"


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    for suffix in [".png", ".jpg", ".webp", ".tif"]:
        path = tmp_path / f"not{suffix}"
        path.write_text("words")
        with pytest.raises(FormatError, match="cannot read"):
            read_parameters(path)
        with pytest.raises(FileNotFoundError):
            read_parameters(tmp_path / f"missing{suffix}")
    with pytest.raises(FormatError, match=r"\.png"):
        read_parameters(tmp_path / "notes.txt")


def test_parameters_text_follows_the_convention() -> None:
    known: dict[str, Any] = {
        "steps": 20,
        "guidance": 4.5,
        "seed": 7,
        "width": 1024,
        "height": 512,
        "memory_mode": "rows",
    }
    text = parameters_text(
        "a red sun\n", "blur, noise", sampler="DPM++", model="sana", version="0.1", exact=True, **known
    )
    assert text == (
        "a red sun\nNegative prompt: blur, noise\nSteps: 20, Sampler: DPM++, CFG scale: 4.5, Seed: 7, "
        "Size: 1024x512, Model: sana, Version: handscroll 0.1, Memory mode: rows, Exact: true"
    )
    model = 'C:\\a, "b"\nç'
    text = parameters_text("p", " ", sampler="s", model=model, version="0.1", exact=False, **known)
    assert len(text.split("\n")) == 2
    assert f"Model: {json.dumps(model, ensure_ascii=False)}, Version" in text
    assert text.endswith("Exact: false")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [(1, 1), (300, 700), (2000, 30)], ids=str)
def test_encoding_beside_gives_the_same_file(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    pixels = picture(*size)
    after, beside = (save(tmp_path / f"{name}{suffix}", pixels, "words", beside=name == "b") for name in "ab")
    assert (load(after) == load(beside)).all()
    assert read_parameters(beside) == "words"
    if suffix != ".dzi":
        assert after.read_bytes() == beside.read_bytes()
    assert not [name for name in names(tmp_path) if name.startswith(".")]


# Failure


class Broken(OSError):
    pass


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("fault", [Broken(errno.ENOSPC, "mine"), KeyboardInterrupt(), GeneratorExit(), RuntimeError()])
def test_what_the_strips_raise_passes_through(tmp_path: Path, suffix: str, fault: BaseException, beside: bool) -> None:
    older = save(tmp_path / f"out{suffix}", picture(16, 16), "older")
    before, content = names(tmp_path), older.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield picture(16, 8)
        raise fault

    target = check_target(older, 16, 16)
    with pytest.raises(type(fault)) as caught:
        write_image(target, failing(), beside=beside)
    assert caught.value is fault
    assert names(tmp_path) == before
    assert older.read_bytes() == content
    assert read_parameters(older) == "older"


SAYS_MEMORY = r"^out of memory while writing [^\n]*; close other programs[^\n]*--size$"
MEMORY = (
    "unable to call VipsForeignSavePngFile\n  Error creating thread: Resource temporarily unavailable\n",
    "unable to call VipsForeignSaveWebpFile\n  vips_tracked: out of memory --- size == 48MB\n",
    "unable to call webpsave\n  webpsave: picture memory error\n",
    "VipsJpeg: Insufficient memory (case 4)\n",
    "Cannot allocate memory",
)


@pytest.mark.parametrize("said", MEMORY)
@pytest.mark.parametrize("name", ["out.png", "out.webp"])
@pytest.mark.parametrize("beside", [False, True])
def test_memory_that_runs_out_in_a_writer_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, name: str, beside: bool
) -> None:
    def failing(*_: object) -> None:
        raise pyvips.Error(said) if said != MEMORY[-1] else OSError(errno.ENOMEM, said)

    monkeypatch.setattr(writing, "encode_picture", failing)
    with pytest.raises(OutOfMemoryError, match=SAYS_MEMORY) as told:
        write_image(check_target(tmp_path / name, 8, 8), [np.zeros((8, 8, 3), np.uint8)], beside=beside)
    assert (".png, which takes the least" in str(told.value)) == name.endswith("webp")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_while_a_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise pyvips.Error(MEMORY[0])

    (tmp_path / "p.webp").touch()
    monkeypatch.setattr(pyvips.Image, "new_from_file", failing)
    with pytest.raises(OutOfMemoryError, match="out of memory while reading"):
        read_parameters(tmp_path / "p.webp")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    older = save(tmp_path / "out.png", picture(16, 16), "older")

    def failing(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, failing)
    expected = os.strerror(number) if number == errno.EIO else r"disk full while writing .* needs .* free in"
    with pytest.raises(OutputError, match=expected) as refusal:
        save(older, picture(16, 16), "newer")
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == {"out.png"}
    assert read_parameters(older) == "older"


@pytest.mark.parametrize("rows", [1, 4000], ids=["before the last row", "among rows that no buffer holds"])
def test_an_encoder_that_fails_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    older = save(tmp_path / "out.png", picture(16, 16), "older")

    def failing(*arguments: object) -> None:
        raise pyvips.Error(f"write error: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(encoding, "encode_png", failing)
    with pytest.raises(OutputError, match=r"disk full while writing .* needs .* free in"):
        save(older, picture(64, rows), beside=True)
    assert names(tmp_path) == {"out.png"}
    assert read_parameters(older) == "older"


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_an_older_deep_zoom_pair_survives_a_failed_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    path = save(tmp_path / "out.dzi", picture(16, 16), "older")
    content, calls, rename = path.read_bytes(), [], os.rename

    def failing(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == fails_at:
            raise OSError(errno.EIO, "gone")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match="gone"):
        save(path, picture(20, 20), "newer")
    assert names(tmp_path) == {"out.dzi", "out_files"}
    assert path.read_bytes() == content
    assert read_parameters(path) == "older"
    monkeypatch.undo()
    save(path, picture(20, 20), "newer")
    assert load(path).shape == (20, 20, 3)
    assert names(tmp_path) == {"out.dzi", "out_files"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_deleted_folder(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "short-lived"
    folder.mkdir()
    target = check_target(folder / f"out{suffix}", 8, 8)

    def deleting() -> Iterator[np.ndarray]:
        yield picture(8, 8)
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()

    with pytest.raises(OutputError, match="has gone; create it again"):
        write_image(target, deleting())


FULL = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from handscroll.errors import OutputError
from handscroll.pictures.targets import Target
from handscroll.pictures.writing import write_image
folder, suffix, limit_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit_bytes:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
formats = {".png": "png", ".jpg": "jpeg", ".webp": "webp", ".tif": "tiff", ".dzi": "dzi"}
try:
    target = Target(folder / f"out{suffix}", formats[suffix], 800, 800)
    write_image(target, (noise[y : y + 50] for y in range(0, 800, 50)), quality=100)
except OutputError as error:
    print(error)
"""


# The scratch is 1.83 MiB. Deep Zoom's files are all small, so only the scratch can meet a limit on the size of one.
@pytest.mark.parametrize(
    ("suffix", "limit_bytes"),
    [(".png", 1_000_000), (".dzi", 1_000_000), (".png", 1_921_000), (".tif", 1_921_000), (".jpg", 1_921_000)],
)
def test_a_limit_on_file_sizes(tmp_path: Path, suffix: str, limit_bytes: int) -> None:
    (tmp_path / f"out{suffix}").write_text("older")
    result = run_python(FULL, tmp_path, suffix, limit_bytes)
    assert result.stdout.startswith("file size limit reached while writing"), result
    assert result.stdout.count("\n") == 1
    assert names(tmp_path) == {f"out{suffix}"}
    assert (tmp_path / f"out{suffix}").read_text() == "older"


@pytest.mark.parametrize(("suffix", "size"), [(".png", "1m"), (".png", "3m"), (".tif", "3m"), (".dzi", "3m")])
def test_a_full_disk(tmp_path: Path, suffix: str, size: str) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here; simulated above")
    try:
        (tmp_path / f"out{suffix}").write_text("older")
        result = run_python(FULL, tmp_path, suffix, 0)
        assert result.stdout.startswith("disk full while writing"), result
        assert result.stdout.count("\n") == 1
        assert names(tmp_path) == {f"out{suffix}"}
        assert (tmp_path / f"out{suffix}").read_text() == "older"
        assert os.statvfs(tmp_path).f_bavail * 4096 > 900_000
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("suffix", [".png", ".dzi"])
def test_two_writers_of_one_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    failures: list[Exception] = []

    def keep_writing(side: int) -> None:
        try:
            for _ in range(10):
                save(path, picture(side, side), f"{side}")
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=keep_writing, args=(side,)) for side in (40, 60)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert load(path).shape == (int(read_parameters(path)), int(read_parameters(path)), 3)
    assert names(tmp_path) <= {"out.png", "out.dzi", "out_files"}


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "real" / "behind.png")
    for side in (8, 9):
        assert save(link, picture(side, side)) == link
        assert link.is_symlink()
        assert load(tmp_path / "real" / "behind.png").shape == (side, side, 3)
    assert names(tmp_path / "real") == {"behind.png"}


def test_the_scratch_is_hidden_and_given_back(tmp_path: Path) -> None:
    seen: list[str] = []

    def watching() -> Iterator[np.ndarray]:
        yield picture(8, 8)
        seen.extend(names(tmp_path))

    write_image(check_target(tmp_path / "out.png", 8, 8), watching())
    assert all(name.startswith(".out.png.") for name in seen)
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        links = [os.readlink(entry) for entry in descriptors.iterdir() if entry.is_symlink()]
        assert not [link for link in links if str(tmp_path) in link]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_unfinished_file_has_the_name_that_was_asked_for(tmp_path: Path, suffix: str) -> None:
    """And what a killed process left under that name is replaced."""
    room = tmp_path / "room"
    room.mkdir()
    part = room / "picture.part"
    if suffix == ".dzi":
        (part / "picture_files").mkdir(parents=True)
    else:
        part.write_text("left behind")
    part.with_suffix(".rows").write_text("left behind")
    seen: list[set[str]] = []

    def watching() -> Iterator[np.ndarray]:
        yield picture(16, 16)
        seen.append(names(tmp_path) - {"room"})

    target = check_target(tmp_path / f"out{suffix}", 16, 16)
    write_image(target, watching(), part=part)
    assert load(target.path).shape == (16, 16, 3)
    assert seen == [set()]
    assert names(room) == set()


DYING = """
import os, sys
import numpy as np
from pathlib import Path
from handscroll.pictures import encoding, metadata, targets, writing
path, part, dies_at, calls, rename = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [], os.rename

def dying(source, destination):
    calls.append(source)
    if len(calls) == dies_at:
        os._exit(9)
    rename(source, destination)

os.rename = dying
pixels = np.zeros((20, 20, 3), np.uint8)
writing.write_image(targets.check_target(path, 20, 20), [pixels], "newer", part=part)
"""


@pytest.mark.parametrize(("older", "dies_at"), [(False, 1), (False, 2), (True, 2), (True, 3), (True, 4)])
def test_a_deep_zoom_exchange_that_was_killed_can_be_made_again(tmp_path: Path, older: bool, dies_at: int) -> None:
    path = tmp_path / "out.dzi"
    if older:
        save(path, picture(16, 16), "older")
    assert run_python(DYING, path, tmp_path / "part", dies_at).returncode == 9
    assert not path.exists()
    write_image(check_target(path, 24, 24), [picture(24, 24)], "again", part=tmp_path / "part")
    assert load(path).shape == (24, 24, 3)
    assert read_parameters(path) == "again"
    assert names(tmp_path) == {"out.dzi", "out_files"}
    assert not (tmp_path / "out_files" / targets.EXCHANGING).exists()


def test_systems_that_do_not_name_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: not str(p).startswith("/proc") and exists(p))
    pixels = picture(30, 20)
    np.testing.assert_array_equal(load(save(tmp_path / "out.png", pixels)), pixels)
    assert names(tmp_path) == {"out.png"}


# Memory

PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from handscroll.pictures.targets import check_target
from handscroll.pictures.writing import write_image
path, width, height = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
block = np.random.default_rng(0).integers(0, 256, (64, width, 3), dtype=np.uint8)
row_blocks = (np.roll(block, y, axis=1)[: height - y] for y in range(0, height, 64))
write_image(check_target(path, width, height), row_blocks)
status = Path("/proc/self/status")  # getrusage counts the parent's peak too, from before it became this program
if status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_memory_follows_the_width_not_the_height(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tall{suffix}"
    small_bytes, tall_bytes = (int(run_python(PEAK, path, *size).stdout) for size in [(64, 64), (6000, 20000)])
    assert tall_bytes - small_bytes < 60 << 20  # the pixels are 343 MiB
    assert tall_bytes - small_bytes > 0


def test_importing_stays_light() -> None:
    result = run_python(
        "import sys, handscroll.pictures.writing, handscroll.pictures.metadata as _;"
        "print({'pyvips', 'torch'} & set(sys.modules))"
    )
    assert result.stdout == "set()\n", result
