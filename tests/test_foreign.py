"""What stands where a model was expected and is something else: what it is, and what to do about it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from handscroll.errors import HandscrollError, UnknownModelError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.links import split_link
from handscroll.models.opening import open_checkpoint
from handscroll.models.registry import BY_NAME, resolve, split_revision
from handscroll.runtime.modules import Component, load_module, load_tokenizer

Miniature = Callable[..., Path]
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 3209283616\n"
)
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))


def said(read: Callable[[], object]) -> str:
    with pytest.raises(HandscrollError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Pointers and pages in place of files.


@pytest.mark.parametrize(
    "name",
    [
        TRANSFORMER,
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.model",
        "tokenizer/special_tokens_map.json",
        "tokenizer/added_tokens.json",
        "tokenizer/chat_template.jinja",
    ],
)
@pytest.mark.parametrize(
    ("content", "says"), [(POINTER, "`git lfs pull`"), ("<!DOCTYPE html>\n<html>no</html>", "a web page")]
)
def test_a_pointer_in_place_of_a_file(folder: Path, name: str, content: str, says: str) -> None:
    (folder / name).write_text(content)
    line = said(lambda: load_tokenizer(CheckpointSpec.from_folder(folder)))
    assert str(folder / name) in line
    assert says in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Entry not found", "a text and no weights, which begins 'Entry not found'"),
        (b'{"error":"Repository not found"}', "a text and no weights"),
        ("Доступ запрещён: эта модель закрыта".encode(), "a text and no weights, which begins 'Доступ"),
        (b"\x80\x03}q\x00." + bytes(100), "a pickle"),
        (b"\x80\x05\x95" + bytes(100), "a pickle"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'" + bytes(100), "a NumPy array"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\xfd7zXZ\x00" + bytes(100), "an xz archive"),
        (b"BZh9" + bytes(100), "a bzip2 archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive"),
        (b"name" + bytes(253) + b"ustar" + bytes(300), "a tar archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a picture"),
        (bytes(1000), "zeros where the file should begin"),
        (bytes(range(7, 200)), "not a safetensors file: its header does not begin with {; fetch it again"),
        (b"\x07\x01\x00", "truncated: 3 bytes are no safetensors file; fetch it again"),
        (b"", "truncated: 0 bytes are no safetensors file; fetch it again"),
    ],
)
@pytest.mark.parametrize("name", [TRANSFORMER, "text_encoder/model.safetensors"])
def test_something_else_in_place_of_weights(folder: Path, content: bytes, says: str, name: str) -> None:
    (folder / name).write_bytes(content)
    line = said(lambda: CheckpointSpec.from_folder(folder))
    assert line.startswith(f"{folder / name}: {says}")
    with pytest.raises(UnknownModelError, match=r"\S"):
        resolve(folder / name)


def test_a_pointer_in_place_of_an_index_or_a_shard(miniature: Miniature, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("1.6b", max_shard_size="50KB"), tmp_path / "copy"))
    shard = sorted((folder / "transformer").glob("*-of-*"))[0]
    whole = shard.read_bytes()
    shard.write_text(POINTER)
    assert f"{shard}: a Git LFS pointer" in said(lambda: CheckpointSpec.from_folder(folder))
    shard.write_bytes(whole)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text(POINTER)
    assert f"{index}: a Git LFS pointer" in said(lambda: CheckpointSpec.from_folder(folder))


# A single file given as the model.


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("Sana_1600M_1024px.pth", b"PK\x03\x04", ["a pickle", "convert_sana_to_diffusers.py", "--model sana-1.6b"]),
        ("last.ckpt", b"\x80\x02}q\x00.", ["a pickle"]),
        ("pytorch_model.bin", b"PK\x03\x04", ["a pickle"]),
        ("model.pt", b"", ["a pickle"]),
        ("model.pkl", POINTER.encode(), ["Git LFS pointer"]),
        ("model.pth", POINTER.encode(), ["Git LFS pointer"]),
        ("sana-q4.gguf", b"GGUF\x03\x00\x00\x00", ["GGUF", "quantised", "--model sana-1.6b"]),
        ("model.safetensors", POINTER.encode(), ["Git LFS pointer", "git lfs pull"]),
        ("model.safetensors", b"\x08\x00", ["truncated"]),
        ("notes.txt", b"hello", ["a file", "model_index.json"]),
        ("model.zip", b"PK\x03\x04", ["a zip archive"]),
        ("model.tar.gz", b"\x1f\x8b\x08", ["gzip"]),
        ("empty", b"", ["a file"]),
    ],
)
@pytest.mark.parametrize("form", ["absolute", "relative", "dotted", "path"])
def test_a_single_file_is_named_for_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, says: list[str], form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / name
    file.write_bytes(content)
    forms: dict[str, str | Path] = {
        "absolute": str(file),
        "relative": f"models/{name}",
        "dotted": f"./models/{name}",
        "path": Path("models") / name,
    }
    line = said(lambda: open_checkpoint(forms[form]))
    for part in says:
        assert part in line
    with pytest.raises(UnknownModelError):
        resolve(forms[form])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (["transformer_blocks.0.attn1.to_q.weight"], "a single file of weights"),
        (["blocks.0.attn.qkv.weight"], "convert_sana_to_diffusers.py"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA adapter"),
        (["lora_unet_blocks_0.lora_down.weight"], "a LoRA adapter"),
        (["transformer_blocks.0.attn.qkv.qweight", "transformer_blocks.0.attn.qkv.wscales"], "SVDQuant (Nunchaku)"),
        (["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes, 4 bits"),
        (["a.weight", "a.SCB"], "bitsandbytes, 8 bits"),
        (["a.weight._data", "a.weight._scale"], "quanto"),
        (["a._weight_qdata", "a._weight_scale"], "torchao"),
        (["a.weight", "a.scale_weight", "scaled_fp8"], "fp8 with scales"),
        (["a.weight", "a.weight_scale"], "fp8 with scales"),
        (["a.qweight", "a.qzeros", "a.scales"], "GPTQ or AWQ"),
    ],
)
def test_a_single_safetensors_file_is_named_for_what_it_holds(tmp_path: Path, tensors: list[str], says: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: torch.ones(2) for name in tensors}, file)
    assert says in said(lambda: resolve(str(file)))


def test_a_part_of_a_checkpoint_leads_to_its_folder(folder: Path) -> None:
    for part in (folder / "model_index.json", folder / TRANSFORMER):
        assert f"give the folder that it lies in, {folder}" in said(functools.partial(resolve, str(part)))
    assert f"give the folder that it lies in, {folder}" in said(lambda: open_checkpoint(str(folder / "transformer")))
    assert f"such as {folder}" in said(lambda: open_checkpoint(str(folder.parent)))


# Adapters and quantised folders.


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_folder_of_a_lora_adapter(folder: Path, name: str, place: str) -> None:
    if place:
        (folder / TRANSFORMER).unlink()
        (folder / place / name).write_text("{}")
    else:
        folder = folder.parent / "lora"
        folder.mkdir()
        (folder / name).write_text("{}")
    line = said(lambda: CheckpointSpec.from_folder(folder))
    assert "a LoRA adapter" in line
    assert "fuse_lora" in line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "bitsandbytes, 4 bits",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": "yes"}, "bitsandbytes, 8 bits"),
        ({"load_in_8bit": 1}, "bitsandbytes, 8 bits"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
        ({"quant_method": "gguf"}, "GGUF"),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto"),
        ({"quant_method": "svdquant"}, "SVDQuant"),
        ({"method": "svdquant", "weight": {"dtype": "int4"}}, "SVDQuant"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 with scales"),
        ({"quant_method": "new-way"}, "new-way"),
        ({}, "quantised"),
        ("yes", "quantised"),
    ],
)
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_config_that_says_quantised(folder: Path, settings: object, says: str, component: str) -> None:
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    line = said(lambda: CheckpointSpec.from_folder(folder))
    assert str(file) in line
    assert says in line
    assert "use the checkpoint that it was made from" in line


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["transformer_blocks.safetensors", "unquantized_layers.safetensors"], "SVDQuant (Nunchaku)"),
        (["svdq-int4_r32-sana1.6b.safetensors"], "SVDQuant (Nunchaku)"),
        (["sana-Q4_K_M.gguf"], "GGUF"),
        (["quanto_qmap.json"], "quanto"),
    ],
)
def test_a_folder_of_quantised_files(folder: Path, files: list[str], says: str) -> None:
    (folder / TRANSFORMER).unlink()
    for name in files:
        (folder / "transformer" / name).write_bytes(b"")
    line = said(lambda: CheckpointSpec.from_folder(folder))
    assert says in line
    assert str(folder / "transformer") in line


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ({"qweight": (torch.int8, 2), "wscales": (torch.float32, 1)}, "SVDQuant (Nunchaku)"),
        ({"weight": (torch.uint8, 2), "weight.absmax": (torch.float32, 1)}, "bitsandbytes, 4 bits"),
        ({"weight": (torch.int8, 1), "SCB": (torch.float32, 1)}, "bitsandbytes, 8 bits"),
        ({"weight": (torch.float8_e4m3fn, 1), "scale_weight": (torch.float32, 1)}, "fp8 with scales"),
        ({"weight": (torch.float8_e4m3fn, 1)}, "stored as fp8: quantised"),
        ({"weight": (torch.int8, 1)}, "stored as int8: quantised"),
    ],
)
def test_quantised_tensors_without_a_word_in_the_config(
    folder: Path, added: dict[str, tuple[torch.dtype, int]], says: str
) -> None:
    tensors = load_file(folder / TRANSFORMER)
    weight = tensors.pop("transformer_blocks.0.attn1.to_q.weight")
    for leaf, (dtype, halves) in added.items():
        numbers = (
            weight[:, : weight.shape[1] // halves] if "scale" not in leaf and "absmax" not in leaf else weight[:1, 0]
        )
        tensors[f"transformer_blocks.0.attn1.to_q.{leaf}"] = numbers.contiguous().to(dtype)
    save_file(tensors, folder / TRANSFORMER)
    component: Component = "transformer"
    spec = CheckpointSpec.from_folder(folder)
    line = said(lambda: load_module(spec, component, dtype=torch.float32, device="cpu"))
    assert says in line
    assert "use the checkpoint that it was made from" in line


# Links of the hub.

OFFICIAL = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


@pytest.mark.parametrize(
    ("link", "revision"),
    [
        (f"https://huggingface.co/{OFFICIAL}", None),
        (f"https://huggingface.co/{OFFICIAL}/", None),
        (f"http://www.huggingface.co/{OFFICIAL}", None),
        (f"huggingface.co/{OFFICIAL}", None),
        (f"hf.co/{OFFICIAL}", None),
        (f"https://hf.co/{OFFICIAL}/tree/main", None),
        (f"https://huggingface.co/{OFFICIAL}/tree/main/transformer", None),
        (f"https://huggingface.co/{OFFICIAL}/tree/v1.0", "v1.0"),
        (f"https://huggingface.co/{OFFICIAL}/tree/refs%2Fpr%2F3", "refs/pr/3"),
        (f"https://huggingface.co/{OFFICIAL}/tree/refs/pr/3/vae", "refs/pr/3"),
        (f"https://huggingface.co/{OFFICIAL}/blob/abc1234/model_index.json", "abc1234"),
        (f"https://huggingface.co/{OFFICIAL}/resolve/main/model_index.json?download=true", None),
        (
            f"https://huggingface.co/{OFFICIAL}/commit/0123456789abcdef0123456789abcdef01234567",
            "0123456789abcdef0123456789abcdef01234567",
        ),
        (f"https://huggingface.co/{OFFICIAL}/discussions/4", None),
        (f"https://huggingface.co/{OFFICIAL}?library=diffusers#usage", None),
        (f"https://huggingface.co/{OFFICIAL}.git", None),
        (f"https://huggingface.co/{OFFICIAL}@v2", "v2"),
        (f" https://huggingface.co/{OFFICIAL}\n", None),
        (f"https://huggingface.co/{OFFICIAL}@refs/pr/3", "refs/pr/3"),
        (f"hf://{OFFICIAL}@refs/pr/3/vae/config.json", "refs/pr/3"),
        (f"https://huggingface.co/{OFFICIAL}?revision=v4", "v4"),
        (f"https://huggingface.co/{OFFICIAL}/resolve/v4/model_index.json?download=true", "v4"),
        (f"https://huggingface.co/api/models/{OFFICIAL}", None),
        (f"https://huggingface.co/api/models/{OFFICIAL}/tree/v4", "v4"),
        (f"(https://huggingface.co/{OFFICIAL}/tree/main)", None),
        (f"https://huggingface.co/{OFFICIAL}/tree/v4).", "v4"),
        (f"<https://huggingface.co/{OFFICIAL}>", None),
        (f"git clone https://huggingface.co/{OFFICIAL}", None),
        (f"git clone git@hf.co:{OFFICIAL}.git", None),
        (f"HTTPS://HuggingFace.co/{OFFICIAL}", None),
        (f"git@hf.co:{OFFICIAL}.git", None),
        (f"hf://{OFFICIAL}@v3", "v3"),
    ],
)
def test_links_are_understood(link: str, revision: str | None) -> None:
    assert split_link(link) == (OFFICIAL, revision)
    assert split_revision(link) == (OFFICIAL, revision)
    assert resolve(link) is BY_NAME["sana-1.6b"]
    assert resolve(link.replace("Efficient-Large-Model", "someone")) == OFFICIAL.replace(
        "Efficient-Large-Model", "someone"
    )


def test_a_link_and_a_revision_beside_it() -> None:
    link = f"https://huggingface.co/{OFFICIAL}"
    assert split_revision(f"{link}/tree/main", "v1") == (OFFICIAL, "v1")
    assert split_revision(f"{link}/tree/v1", "v1") == (OFFICIAL, "v1")
    with pytest.raises(UsageError, match="two revisions"):
        split_revision(f"{link}/tree/v1", "v2")


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("https://huggingface.co/datasets/owner/name", "a data set"),
        ("https://huggingface.co/spaces/owner/name", "a space"),
        ("https://huggingface.co/owner", "owner/name"),
        ("https://huggingface.co/docs/diffusers", "leads to no model"),
        ("https://huggingface.co/api/datasets/owner/name", "leads to no model"),
        ("https://huggingface.co/settings/tokens", "leads to no model"),
        ("https://huggingface.co/", "owner/name"),
        ("https://example.com/owner/name", "huggingface.co"),
        ("https://github.com/owner/name/tree/main", "huggingface.co"),
        ("https://[bad", "huggingface.co"),
        ("ftp://huggingface.co/owner/name", "huggingface.co"),
    ],
)
def test_links_to_something_else_are_refused(link: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(link)
    assert says in str(caught.value)


def test_the_host_of_a_mirror_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443")
    assert resolve(f"https://mirror.example:8443/{OFFICIAL}/tree/main") is BY_NAME["sana-1.6b"]


@pytest.mark.parametrize("model", ["x" * 10_000, "a\0b", "~nobody-of-this-name/model", "o/" + "x" * 5000, "\x1b[2J"])
def test_a_name_that_no_file_can_have(model: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(model)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 400 or model.startswith("~")


@pytest.mark.parametrize("name", ["models/x.pth", "models/x.safetensors", "owner/Model.GGUF", "x/y.ckpt", "a/b.bin"])
def test_a_file_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(UnknownModelError, match=f"no such file: {name}"):
        resolve(name)


@pytest.mark.parametrize("name", ["owner/link", "link", "./link", "link.safetensors"])
def test_a_link_that_leads_nowhere_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / name).symlink_to("gone")
    for model in (name, Path(name)):
        with pytest.raises(UnknownModelError, match="a link to 'gone', which is not there"):
            resolve(model)


@pytest.mark.parametrize(
    "name",
    [
        TRANSFORMER,
        "transformer/config.json",
        "model_index.json",
        "handscroll.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_file_that_is_a_link_to_nowhere(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/gone")
    line = said(lambda: load_tokenizer(CheckpointSpec.from_folder(folder)))
    assert name in line
    assert name == "model_index.json" or "a link to '../../blobs/gone', which is not there" in line


def test_a_file_in_the_current_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_bytes(b"x")
    with pytest.raises(UnknownModelError, match="a file"):
        open_checkpoint("owner/model")
