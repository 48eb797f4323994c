"""Weights that are lent: the loaded module's bits, for as long as they are asked for, in one buffer."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Gemma2Model

from handscroll.errors import CheckpointError
from handscroll.limits import SLOTS
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.text_encoder import LAYER_UNITS
from handscroll.runtime.memory import trim
from handscroll.runtime.modules import Component, load_module, load_tokenizer, open_module
from handscroll.runtime.text import encode_prompt
from handscroll.runtime.text_encoder import EMBEDDING_TABLE, open_text_encoder
from handscroll.system import resident_bytes
from handscroll.weights import files
from handscroll.weights.file_state import FileState
from handscroll.weights.header import read_header
from handscroll.weights.stream import WeightStream
from live_bytes import LiveBytes

Miniature = Callable[..., Path]
COMPONENTS: tuple[Component, ...] = ("transformer", "vae", "text_encoder")
MIB = 2**20


class HostTransfer:
    """The double buffering of a device with its own memory, on the host, where it can be watched."""

    def __init__(self) -> None:
        self.allocated = self.host_bytes = 0
        self.threads: set[str] = set()

    def allocate(self, n_bytes: int) -> Tensor:
        self.allocated += 1
        return torch.empty(n_bytes, dtype=torch.uint8)

    def allocate_host(self, n_bytes: int) -> Tensor:
        self.host_bytes += n_bytes
        return torch.empty(n_bytes, dtype=torch.uint8)

    def mark(self) -> object:
        return object()

    def send(self, host: Tensor, there: Tensor, after: object) -> object:
        assert after is not None
        self.threads.add(threading.current_thread().name)
        there.copy_(host)
        return object()

    def follow(self, event: object) -> None:
        assert event is not None

    def finish(self, event: object) -> None:
        assert event is not None


class Stack(nn.Module):
    """Equal linear layers and a buffer that is stored."""

    count: Tensor

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make_stack(
    folder: Path, layers: int = 4, width: int = 16, stored: torch.dtype = torch.float32
) -> tuple[Stack, Callable[..., tuple[Stack, WeightStream]]]:
    """A stack with random weights, and what opens streams of its file."""
    torch.manual_seed(0)
    module = Stack(layers, width).requires_grad_(False).eval().to(stored)
    module.count.fill_(7)
    file = folder / "model.safetensors"
    save_file(module.state_dict(), file)
    entries = {entry.name: entry for entry in read_header(file)}

    def opened(dtype: torch.dtype = stored, transfer: Any = None) -> tuple[Stack, WeightStream]:
        with torch.device("meta"):
            empty = Stack(layers, width).requires_grad_(False).eval()
        return empty, WeightStream(empty, entries, dtype, "cpu", transfer=transfer)

    return module, opened


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def same_tensors(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = tensors_of(ours), tensors_of(theirs)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def is_empty(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in tensors_of(module).values())


@pytest.fixture(params=["in place", "read ahead"])
def transfer(request: pytest.FixtureRequest) -> HostTransfer | None:
    """Both ways to fill a buffer."""
    return HostTransfer() if request.param == "read ahead" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ["1.6b", "1.6b-4k", "sprint-0.6b"])
def test_what_is_lent_and_what_is_kept_is_what_is_loaded(
    miniature: Miniature, row: str, stored: torch.dtype, dtype: torch.dtype, transfer: HostTransfer | None
) -> None:
    spec = CheckpointSpec.from_folder(miniature(row, dtype=stored))
    for component in COMPONENTS:
        loaded = load_module(spec, component, dtype=dtype, device="cpu")
        module, stream = open_module(spec, component, dtype=dtype, device="cpu")
        if transfer is not None:
            stream = WeightStream(module, stream.entries, dtype, "cpu", transfer=transfer)
        names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        with stream.materialize(module):
            assert same_tensors(module, loaded)
            assert not any(parameter.requires_grad for parameter in module.parameters())
        assert [name for name, parameter in module.named_parameters() if parameter.is_meta] == names
        for child in module.children():
            with stream.materialize(child):
                held = tensors_of(loaded)
                for name, tensor in tensors_of(module).items():
                    assert tensor.is_meta or tensor.equal(held[name])
        stream.make_resident(module)
        assert same_tensors(module, loaded)
        with stream.materialize(module):
            assert same_tensors(module, loaded)
        assert same_tensors(module, loaded)
        stream.close()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_an_autoencoder_and_what_is_left_out(miniature: Miniature, part: Any) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    loaded = load_module(spec, "vae", dtype=torch.bfloat16, device="cpu", part=part)
    module, stream = open_module(spec, "vae", dtype=torch.bfloat16, device="cpu", part=part)
    half, its = getattr(module, part), getattr(loaded, part)
    stream.make_resident(module, but=[half.conv_in])
    assert is_empty(half.conv_in)
    assert same_tensors(half.conv_out, its.conv_out)
    with stream.materialize(half.conv_in):
        assert same_tensors(half, its)
    assert is_empty(half.conv_in)
    sizes = [parameter.nbytes for parameter in its.parameters()]
    assert stream.bytes_of(half) == sum(sizes)
    assert stream.bytes_of(half, but=[half.conv_in]) == sum(sizes) - stream.bytes_of(half.conv_in)

    encoder: Gemma2Model
    encoder, stream = open_module(spec, "text_encoder", dtype=torch.bfloat16, device="cpu", leave={"norm.weight"})
    stream.make_resident(encoder)
    assert encoder.norm.weight.is_meta
    with stream.materialize(encoder.norm):
        assert encoder.norm.weight.is_meta


def test_lent_weights_are_aligned_as_mapped_ones(tmp_path: Path) -> None:
    """Or a product might be computed by another kernel, to other bits."""
    _, opened = make_stack(tmp_path, width=5)
    kept, keeper = opened()
    keeper.make_resident(kept)
    lent, lender = opened()
    for one, other in ((lent.layers[2], kept.layers[2]), (lent, kept)):
        with lender.materialize(one):
            for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
                assert ours.data_ptr() % 64 == theirs.data_ptr() % 64
    converted, stream = opened(torch.float64)
    with stream.materialize(converted):
        assert not any(parameter.data_ptr() % 64 for parameter in converted.parameters())


def test_conversion_in_several_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: HostTransfer | None
) -> None:
    loaded, opened = make_stack(tmp_path, width=33)
    monkeypatch.setattr(files, "STAGING_BYTES", 200)
    module, stream = opened(torch.bfloat16, transfer)
    with stream.materialize(module):
        assert same_tensors(module, loaded.bfloat16())


def test_the_same_tensors_may_be_lent_several_times_over(tmp_path: Path, transfer: HostTransfer | None) -> None:
    loaded, opened = make_stack(tmp_path)
    module, stream = opened(transfer=transfer)
    first, second = stream.materialize(module.layers[0]), stream.materialize(module.layers, module.layers[1])
    with first:
        held = module.layers[0].weight
        with stream.materialize(module.layers[0]), stream.materialize(module.layers[:2]):
            assert module.layers[0].weight is held
            assert same_tensors(module.layers[1], loaded.layers[1])
        assert is_empty(module.layers[1])
        assert module.layers[0].weight is held
        second.__enter__()
    assert module.layers[0].weight is held, "the second use outlives the first"
    assert same_tensors(module.layers, loaded.layers)
    with stream.materialize(module):
        assert same_tensors(module, loaded)
    second.__exit__(None, None, None)
    assert is_empty(module)
    assert isinstance(module.scale, nn.Parameter)
    with stream.materialize(module.layers[0]):
        stream.make_resident(module.layers[0])
    assert same_tensors(module.layers[0], loaded.layers[0])
    with pytest.raises(ValueError, match="no part"), stream.materialize(loaded.layers[0]):
        pass


def test_what_is_raised_inside_leaves_nothing_lent(tmp_path: Path, transfer: HostTransfer | None) -> None:
    loaded, opened = make_stack(tmp_path)
    module, stream = opened(transfer=transfer)
    with pytest.raises(KeyError), stream.materialize(module):
        raise KeyError
    assert is_empty(module)

    def rows() -> Iterator[int]:
        with stream.materialize(module.layers):
            yield 1
            yield 2

    begun = rows()
    next(begun)
    assert same_tensors(module.layers, loaded.layers)
    del begun
    assert is_empty(module)


def test_one_buffer_serves_layer_after_layer(tmp_path: Path) -> None:
    loaded, opened = make_stack(tmp_path, layers=12, width=64)
    module, stream = opened()
    layer_bytes = stream.bytes_of(module.layers[0])
    assert layer_bytes == 4 * (64 * 64 + 64)
    with LiveBytes() as live:
        places = set()
        for layer in module.layers:
            assert isinstance(layer, nn.Linear)
            with stream.materialize(layer):
                places.add(layer.weight.untyped_storage().data_ptr())
                gc.collect()
        assert len(places) == 1
        assert layer_bytes <= live.peak_bytes <= layer_bytes + 256
        with stream.materialize(module.layers):
            assert same_tensors(module.layers, loaded.layers)
        with stream.materialize(module.layers[0]):
            torch.ones(1)
            assert live.now_bytes <= layer_bytes + 256, "a buffer that is far too large is not held on to"
        stream.close()
        torch.ones(1)
        assert live.now_bytes <= 256
    with stream.materialize(module):
        assert same_tensors(module, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_memory_is_one_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded, opened = make_stack(tmp_path, layers=13, width=2048)  # 16 MiB a layer in fp32
    x = torch.randn(1, 2048)  # a product whose bits do depend on how the weights are aligned
    kept, keeper = opened(dtype)
    keeper.make_resident(kept)
    with torch.no_grad():
        expected = kept(x.to(dtype))
    del loaded, kept, keeper
    module, stream = opened(dtype)
    with torch.no_grad(), stream.materialize(module.layers[0]):
        module.layers[0](x.to(dtype))  # what the first product allocates for good
    stream.close()
    gc.collect()
    trim()
    before, peak, hidden = resident_bytes() or 0, 0, x.to(dtype)
    for index, layer in enumerate(module.layers):
        with torch.no_grad(), stream.materialize(layer):
            stream.prefetch(*module.layers[index + 1 : index + 2])
            hidden = layer(hidden)
            peak = max(peak, resident_bytes() or 0)
    assert hidden.equal(expected)
    assert peak - before < (20 if dtype is torch.float32 else 30) * MIB
    stream.close()
    trim()
    assert (resident_bytes() or 0) - before < 6 * MIB


def test_reading_ahead_changes_nothing(tmp_path: Path, transfer: HostTransfer | None) -> None:
    loaded, opened = make_stack(tmp_path, layers=7)
    module, stream = opened(torch.bfloat16, transfer)
    loaded = loaded.bfloat16()
    stream.make_resident(module.layers[6])
    for order in (range(7), [4, 0, 1, 6, 2, 5, 3]):  # the second: mostly what was not read ahead
        for index in order:
            with stream.materialize(module.layers[index]):
                stream.prefetch(*module.layers[index + 1 : index + 2])
                stream.prefetch(*module.layers[index + 1 : index + 2])
                stream.prefetch(module.layers[index])
                assert same_tensors(module.layers[index], loaded.layers[index])
                with stream.materialize(module):
                    assert same_tensors(module, loaded)
            assert module.scale.is_meta
    if transfer is not None:
        assert transfer.threads == {"handscroll-weights_0"}
    stream.prefetch(module)
    stream.close()
    with stream.materialize(module):
        assert same_tensors(module, loaded)


def test_two_slots_serve_layer_after_layer(tmp_path: Path) -> None:
    loaded, opened = make_stack(tmp_path, layers=9)
    transfer = HostTransfer()
    module, stream = opened(transfer=transfer)
    for _ in range(2):
        for index, layer in enumerate(module.layers):
            with stream.materialize(layer):
                stream.prefetch(*module.layers[index + 1 : index + 2])
                assert same_tensors(layer, loaded.layers[index])
    assert transfer.allocated == SLOTS
    stream.close()


def test_what_is_remembered_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, opened = make_stack(tmp_path, layers=5)
    transfer = HostTransfer()
    module, stream = opened(transfer=transfer)
    layer_bytes = stream.bytes_of(module.layers[0])
    stream.pin(3 * layer_bytes + layer_bytes // 2)
    read: list[str] = []
    fill = files.OpenFiles.fill

    def watched(self: Any, layout: Any, flat: Tensor) -> None:
        read.extend(site.source.first.name for site, _ in layout.places if site.leaf == "weight")
        fill(self, layout, flat)

    monkeypatch.setattr(files.OpenFiles, "fill", watched)
    for _ in range(3):
        for index, layer in enumerate(module.layers):
            with stream.materialize(layer):
                stream.prefetch(module.layers[(index + 1) % 5])
                assert same_tensors(layer, loaded.layers[index])
    first = [f"layers.{index}.weight" for index in range(3)]
    assert all(read.count(name) == 1 for name in first)
    assert read.count("layers.4.weight") == 3
    assert transfer.allocated == SLOTS
    stream.close()


def test_pages_are_asked_for_once_where_they_lie_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, opened = make_stack(tmp_path, layers=3)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, count, __: asked.append((start, count)))
    module, stream = opened()
    stream.prefetch(module)
    ((start, count),) = asked
    assert start + count == (tmp_path / "model.safetensors").stat().st_size
    monkeypatch.setattr(files, "ADVICE_GAP_BYTES", 0)
    stream.prefetch(module.layers[0])
    assert asked[1][1] == 4 * (16 * 16 + 16)
    monkeypatch.setattr(os, "posix_fadvise", _fail)
    stream.prefetch(module)
    monkeypatch.delattr(os, "posix_fadvise")
    stream.prefetch(module)


def _fail(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_short_reads_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: HostTransfer | None
) -> None:
    loaded, opened = make_stack(tmp_path)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, position: read(file, [views[0][:100]], position))
    for dtype in (torch.float32, torch.bfloat16):
        module, stream = opened(dtype, transfer)
        with stream.materialize(module):
            assert same_tensors(module, loaded.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_that_changes_is_named(
    tmp_path: Path, transfer: HostTransfer | None, dtype: torch.dtype, begun: bool
) -> None:
    loaded, opened = make_stack(tmp_path, layers=3)
    module, stream = opened(dtype, transfer)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    if begun:
        with stream.materialize(module.layers[0]):
            pass

    def says(reason: str, lent: nn.Module) -> None:
        stream.prefetch(lent)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: the tensor \S+ cannot be read: {reason}"):
            stream.materialize(lent).__enter__()
        assert is_empty(module)

    os.truncate(file, len(whole) - 2000)
    says("the file has (become shorter|changed)", module)
    file.write_bytes(whole[:-1] + b"\0")
    if begun:
        os.utime(file, ns=(1, 1))
        says("the file has changed", module.layers[1])
        stream.close()
    elif transfer is None:  # the header is what it was
        with stream.materialize(module.layers[0]):
            assert same_tensors(module.layers[0], loaded.to(dtype).layers[0])
        stream.close()
    other = make_stack(tmp_path, layers=5)[0]
    stream.close()
    says("the file has changed since", module)
    file.unlink()
    says("No such file", module)
    del other


def _replace(file: Path, data: bytes, way: str) -> None:
    """By another file of the same header and another time, as a download does; or in place."""
    if way == "renamed":
        (file.parent / "new").write_bytes(data)
        os.utime(file.parent / "new", ns=(5, 5))
        os.replace(file.parent / "new", file)
    else:
        file.write_bytes(data)
        os.utime(file, ns=(5, 5))


@pytest.mark.parametrize("way", ["renamed", "written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["mapped", "converted"])
@pytest.mark.parametrize("noted", [False, True], ids=["as opened", "as the checkpoint found it"])
def test_a_file_that_is_replaced_is_found_where_weights_are_kept_and_where_they_are_lent(
    tmp_path: Path, transfer: HostTransfer | None, dtype: torch.dtype, way: str, noted: bool
) -> None:
    make_stack(tmp_path, layers=3)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    entries = {entry.name: entry for entry in read_header(file)}
    states = {file: FileState.of(file)} if noted else {}

    def opened() -> tuple[Stack, WeightStream]:
        with torch.device("meta"):
            empty = Stack(3, 16).requires_grad_(False).eval()
        return empty, WeightStream(empty, entries, dtype, "cpu", transfer=transfer, states=states)

    (kept, keeper), (lent, lender), (late, opens_late) = opened(), opened(), opened()
    keeper.make_resident(kept)
    keeper.check()
    with lender.materialize(lent.layers[0]), keeper.materialize(kept):
        pass
    _replace(file, data[:-1] + b"\1", way)
    with pytest.raises(CheckpointError, match="has changed"):
        lender.materialize(lent.layers[1]).__enter__()
    if dtype is torch.float32:  # what was converted is a copy, of the file as it was
        with pytest.raises(CheckpointError, match=r"has changed.*open the model again"):
            keeper.check()
        with pytest.raises(CheckpointError, match="has changed"):
            keeper.materialize(kept.layers[2]).__enter__()
    if noted:
        with pytest.raises(CheckpointError, match="has changed since the checkpoint was opened"):
            opens_late.make_resident(late)
        with pytest.raises(CheckpointError, match="has changed since the checkpoint was opened"):
            opens_late.materialize(late).__enter__()
    for stream in (keeper, lender, opens_late):
        stream.close()


def test_a_kept_file_that_was_removed_is_still_there_for_who_has_it(tmp_path: Path) -> None:
    loaded, opened = make_stack(tmp_path)
    module, stream = opened()
    stream.make_resident(module)
    (tmp_path / "model.safetensors").unlink()
    with stream.materialize(module):
        assert same_tensors(module, loaded)
    stream.close()


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("memory", [None, "4GiB"], ids=["kept", "lent"])
def test_a_checkpoint_that_is_replaced_between_two_pictures_is_found(
    miniature: Miniature, tmp_path: Path, component: str, memory: str | None
) -> None:
    from handscroll import Handscroll

    folder = tmp_path / "model"
    shutil.copytree(miniature("1.6b"), folder)
    scroll = Handscroll.from_pretrained(folder, device="cpu", precision="fp32", memory=memory)
    scroll("a lake", width=64, height=64, steps=1, seed=1).numpy()
    (file,) = (folder / component).glob("*.safetensors")
    _replace(file, file.read_bytes(), "renamed")
    with pytest.raises(CheckpointError, match=f"{component}.*has changed"):
        scroll("another lake", width=64, height=64, steps=1, seed=2).numpy()


def test_an_error_of_the_system_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: HostTransfer | None
) -> None:
    loaded, opened = make_stack(tmp_path)
    module, stream = opened(transfer=transfer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", _fail)
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error"), stream.materialize(module):
            pass
        assert is_empty(module)
        stream.prefetch(module)
        stream.close()
    with stream.materialize(module):
        assert same_tensors(module, loaded)


def test_streams_work_across_inference_mode(tmp_path: Path, transfer: HostTransfer | None) -> None:
    loaded, opened = make_stack(tmp_path)
    x = torch.randn(2, 16)
    module, stream = opened(transfer=transfer)
    with torch.inference_mode(), stream.materialize(module):
        assert module(x).equal(loaded(x))
    with stream.materialize(module):
        assert module(x).equal(loaded(x))
    with torch.inference_mode(), stream.materialize(module.layers):
        assert module(x).equal(loaded(x))


def test_files_are_closed_with_their_stream(tmp_path: Path) -> None:
    _, opened = make_stack(tmp_path)
    gc.collect()
    descriptors = set(os.listdir("/dev/fd"))
    for closes in (True, False):
        module, stream = opened()
        with stream.materialize(module):
            assert len(os.listdir("/dev/fd")) == len(descriptors) + 1
        if closes:
            stream.close()
        else:
            del module, stream
            gc.collect()
        assert len(os.listdir("/dev/fd")) == len(descriptors)


# The text encoder, layer by layer.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_text_encoder_runs_in_the_memory_of_one_unit(
    miniature: Miniature, stored: torch.dtype, dtype: torch.dtype
) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b", dtype=stored, text_encoder={"num_hidden_layers": 5}))
    tokenizer = load_tokenizer(spec)
    whole = load_module(spec, "text_encoder", dtype=dtype, device="cpu", leave={EMBEDDING_TABLE})
    encoder: Gemma2Model
    encoder, stream = open_text_encoder(spec, dtype=dtype, device="cpu")
    units = [layer.get_submodule(name) for layer in encoder.layers for name in LAYER_UNITS]
    assert all(map(is_empty, units))
    for prompt, instruction in (("a lake", "paint: "), ("", ""), ("x" * 400, "")):
        with torch.inference_mode():
            expected = encode_prompt(spec, whole, tokenizer, prompt, instruction)
            ours = encode_prompt(spec, encoder, tokenizer, prompt, instruction)
        assert ours.embeddings.equal(expected.embeddings)
        assert all(map(is_empty, units))
    largest_bytes = spec.text_encoder.unit_parameter_count * dtype.itemsize
    assert max(map(stream.bytes_of, units)) == largest_bytes
    assert 0 < stream.buffer_bytes < 1.1 * largest_bytes
    stream.close()


def test_a_layer_that_cannot_be_read_ends_the_run(miniature: Miniature, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))
    spec = CheckpointSpec.from_folder(folder)
    encoder: Gemma2Model
    encoder, stream = open_text_encoder(spec, dtype=torch.float32, device="cpu")
    rows = torch.zeros(1, 3, 48)
    good = encoder(inputs_embeds=rows, use_cache=False).last_hidden_state
    file = folder / "text_encoder" / "model.safetensors"
    facts = file.stat()
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="has changed"):
        encoder(inputs_embeds=rows, use_cache=False)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(RuntimeError):
        encoder(inputs_embeds=torch.zeros(1, 3, 47), use_cache=False)
    assert all(is_empty(layer.get_submodule(name)) for layer in encoder.layers for name in LAYER_UNITS)
    assert encoder(inputs_embeds=rows, use_cache=False).last_hidden_state.equal(good)
    stream.close()


# What a CUDA device will have to show.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_on_a_device_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded, _ = make_stack(tmp_path, layers=12, width=1024)
    entries = {entry.name: entry for entry in read_header(tmp_path / "model.safetensors")}
    with torch.device("meta"):
        module = Stack(12, 1024).requires_grad_(False).eval()
    stream = WeightStream(module, entries, dtype, "cuda")
    on_device = loaded.to("cuda", dtype)
    x = torch.randn(1024, 1024, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = on_device(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        for _ in range(3):
            hidden = x
            for index, layer in enumerate(module.layers):
                assert isinstance(layer, nn.Linear)
                with stream.materialize(layer):
                    stream.prefetch(*module.layers[index + 1 : index + 2])
                    assert layer.weight.is_cuda
                    assert layer.weight.data_ptr() % 512 == 0
                    for _ in range(20):  # the device is still busy when the weights are given back
                        out = layer(hidden)
                    hidden = out
            assert hidden.equal(expected)
        assert torch.cuda.max_memory_allocated() - before < 4 * x.nbytes + 2.2 * stream.bytes_of(module.layers[0])
        with stream.materialize(module):
            assert same_tensors(module, on_device)
    stream.make_resident(module)
    assert same_tensors(module, on_device)
    stream.close()
