"""Embeddings from the cache: the encoder's own bits, for the same question only, and never in the way."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from handscroll import Handscroll, Request, generate
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.runtime import text_cache
from handscroll.runtime.modules import load_module, load_tokenizer
from handscroll.runtime.text import encoded
from handscroll.runtime.text_cache import Text, load_text, save_text, text_key

Miniature = Callable[..., Path]
KEY = "0" * 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))


def a_text(dtype: torch.dtype = torch.float32, masked: bool = False, tokens: int = 5) -> Text:
    embeddings = torch.randn(1, tokens, 48).to(dtype)
    return Text(embeddings, torch.arange(tokens)[None] < 3 if masked else None)


def assert_same(ours: Text | None, theirs: Text) -> None:
    assert ours is not None
    assert ours.embeddings.dtype == theirs.embeddings.dtype
    assert ours.embeddings.equal(theirs.embeddings)
    if theirs.mask is None:
        assert ours.mask is None
    else:
        assert ours.mask is not None
        assert ours.mask.dtype is torch.bool
        assert ours.mask.equal(theirs.mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_saved_comes_back_to_the_bit(dtype: torch.dtype, masked: bool) -> None:
    text = a_text(dtype, masked)
    text.embeddings[0, 0, :3] = torch.tensor([-0.0, float("inf"), 1e-40])
    assert load_text(KEY) is None
    with torch.inference_mode():
        save_text(KEY, text)
        assert_same(load_text(KEY), text)
    other = a_text(dtype, not masked)
    save_text(KEY, other)
    assert_same(load_text(KEY), other)
    part = Text(text.embeddings[:, 1:, ::2], text.mask)
    save_text(KEY, part)
    assert_same(load_text(KEY), part)


def test_entries_are_their_owners_alone(cache: Path) -> None:
    umask = os.umask(0)
    try:
        save_text(KEY, a_text())
    finally:
        os.umask(umask)
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_broken_entry_is_none_and_is_replaced(cache: Path) -> None:
    text = a_text(masked=True)
    save_text(KEY, text)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    for broken in (b"", whole[:5], whole[:-1], whole + b"\0", bytes(flipped), b"\xff" * 100, b"{}" * 99):
        file.write_bytes(broken)
        assert load_text(KEY) is None
        save_text(KEY, text)
        assert_same(load_text(KEY), text)
    file.unlink()
    file.mkdir()
    assert load_text(KEY) is None
    save_text(KEY, text)
    assert [entry.name for entry in cache.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file in its place")
    save_text(KEY, a_text())
    assert load_text(KEY) is None
    cache.parent.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        save_text(KEY, a_text())
    assert list(cache.iterdir()) == []
    save_text("", a_text())
    assert load_text("") is None
    assert list(cache.iterdir()) == []


def test_what_was_used_longest_ago_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [str(number) * 64 for number in range(5)]
    for age, key in enumerate(keys[:4]):
        save_text(key, a_text(tokens=50))
        os.utime(cache / f"{key}.safetensors", (1000 + age, 1000 + age))
    (cache / ".abandoned.part").write_bytes(b"x")
    os.utime(cache / ".abandoned.part", (1000, 1000))
    (cache / ".begun.part").write_bytes(b"x")
    assert load_text(keys[0]) is not None  # used: now the youngest
    size = (cache / f"{keys[0]}.safetensors").stat().st_size
    monkeypatch.setattr(text_cache, "LIMIT_BYTES", 3 * size)
    save_text(keys[4], a_text(tokens=50))
    assert sorted(entry.name[:1] for entry in cache.iterdir()) == [".", "0", "3", "4"]
    monkeypatch.setattr(text_cache, "LIMIT_BYTES", size - 1)
    save_text(keys[1], a_text(tokens=50))
    assert not (cache / f"{keys[1]}.safetensors").exists()


def test_the_key_knows_all_that_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CheckpointSpec.from_folder(folder)
    key = text_key(spec, "a lake", "", torch.float32, CPU)
    assert text_key(CheckpointSpec.from_folder(folder), "a lake", "", torch.float32, CPU) == key
    moved = Path(shutil.copytree(folder, folder.parent / "elsewhere"))  # copies times of change, too
    assert text_key(CheckpointSpec.from_folder(moved), "a lake", "", torch.float32, CPU) == key
    others = [
        text_key(spec, "a lak", "", torch.float32, CPU),
        text_key(spec, "lake", "a ", torch.float32, CPU),
        text_key(spec, "a lake", "", torch.bfloat16, CPU),
        text_key(spec, "a lake", "", torch.float32, torch.device("cuda:0")),
        text_key(dataclasses.replace(spec, max_prompt_tokens=20), "a lake", "", torch.float32, CPU),
    ]
    assert others[3] == text_key(spec, "a lake", "", torch.float32, torch.device("cuda:1"))
    with monkeypatch.context() as patch:
        patch.setattr(text_cache, "FORMAT", 2)
        others.append(text_key(spec, "a lake", "", torch.float32, CPU))
    with monkeypatch.context() as patch:
        patch.setattr(text_cache, "release_of", lambda library: "0.1")
        others.append(text_key(spec, "a lake", "", torch.float32, CPU))
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        file = folder / name
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        others.append(text_key(spec, "a lake", "", torch.float32, CPU))
        file.write_bytes(before)
    assert text_key(spec, "a lake", "", torch.float32, CPU) == key
    os.utime(folder / "text_encoder" / "model.safetensors", (1, 1))
    others.append(text_key(spec, "a lake", "", torch.float32, CPU))
    assert len({key, *others}) == 1 + len(others)
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert text_key(spec, "a lake", "", torch.float32, CPU) == ""


def test_the_encoder_is_opened_on_a_miss_alone(folder: Path, cache: Path) -> None:
    spec = CheckpointSpec.from_folder(folder)
    opened = 0

    def encoder() -> tuple[torch.nn.Module, object]:
        nonlocal opened
        opened += 1
        return load_module(spec, "text_encoder", dtype=torch.float32, device="cpu"), load_tokenizer(spec)

    prompt = "a very Private lake"
    with torch.inference_mode():
        first = encoded(spec, prompt, "paint: ", torch.float32, encoder)
        assert_same(encoded(spec, f"  {prompt.upper()} ", "paint: ", torch.float32, encoder), first)
        assert opened == 1
        encoded(spec, prompt, "", torch.float32, encoder)
        assert opened == 2
        (cache / next(iter(os.listdir(cache)))).write_bytes(b"broken")
        assert_same(encoded(spec, prompt, "paint: ", torch.float32, encoder), first)
        encoded(spec, prompt, "", torch.float32, encoder)
        assert opened == 3
        empty = encoded(spec, "", "", torch.float32, encoder)
        assert_same(encoded(spec, "", "", torch.float32, encoder), empty)
    for file in cache.iterdir():
        assert b"private" not in file.read_bytes().lower()


def test_a_second_picture_needs_no_text_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("a lake", negative="fog", model=str(folder), width=64, height=64, steps=1, seed=3)
    generate(request, tmp_path / "first.png")
    weights = folder / "text_encoder" / "model.safetensors"
    facts = weights.stat()
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as stream:  # nonsense from the first weight on
        stream.seek(header_bytes)
        stream.write(b"\xff" * (facts.st_size - header_bytes))
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("handscroll.runtime.text.encode_prompt", refuse)
    monkeypatch.setattr("handscroll.runtime.text.load_tokenizer", refuse)
    generate(request, tmp_path / "second.png")
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    scroll = Handscroll.from_pretrained(folder)
    scroll("a lake", negative="fog", width=64, height=64, steps=1, seed=3).save(tmp_path / "third.png")
    assert (tmp_path / "third.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    with pytest.raises(AssertionError, match="opened"):
        scroll("a lake", negative="rain", width=64, height=64, steps=1)
