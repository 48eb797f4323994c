"""Embeddings of prompts that were encoded before, on disk: a second picture of a prompt needs no text encoder.

An entry is found by a hash over everything that decides its values, so it can be wrong in no way that the hash does
not see. It holds embeddings and a checksum; the prompt itself is written nowhere. Files are their owner's alone, the
oldest go when all of them together grow too large, and whatever goes wrong here only means that the encoder runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handscroll.files import cache_folder, write_whole
from handscroll.models.checkpoint import CheckpointSpec

FORMAT = 1
LIMIT_BYTES = 256 * 2**20
ABANDONED_SECONDS = 3600.0  # a part file older than this has no writer any more

EMBEDDINGS, MASK, CHECKSUM = "embeddings", "mask", "sha256"


@dataclass(frozen=True)
class Text:
    """Embeddings [1, T, C] of the tokens that count, and a mask [1, T] that is None where all of them do."""

    embeddings: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Text:
        return Text(self.embeddings.to(device), None if self.mask is None else self.mask.to(device))


def text_key(
    spec: CheckpointSpec, text: str, instruction: str, dtype: torch.dtype, device: torch.device, storage: str = ""
) -> str:
    """A hash of what decides the embeddings of `instruction` + `text`, the prompt as the tokenizer is given it.

    The weights are known by their headers, sizes and times of change and not by their gigabytes, the configuration
    and the tokenizer by their content. The kind of device counts, since another one rounds differently: a picture on
    a CPU must not depend on whether a GPU has met its prompt before. An empty string if a file cannot be read.
    """
    try:
        facts = {
            "format": FORMAT,
            "config": _digest(spec.folder / "text_encoder" / "config.json"),
            "weights": [_facts_of(file) for file in spec.text_encoder_weights.files],
            "tensors": [
                (entry.name, entry.file.name, entry.dtype, entry.shape, entry.start)
                for entry in spec.text_encoder_weights.tensors
            ],
            "tokenizer": {
                file.name: _digest(file) for file in sorted((spec.folder / "tokenizer").iterdir()) if file.is_file()
            },
            "text": text,
            "instruction": instruction,
            "max_prompt_tokens": spec.max_prompt_tokens,
            "dtype": f"{storage}+{dtype}" if storage else str(dtype),
            "computed": [device.type, torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""],
            "libraries": [release_of("torch"), release_of("transformers")],
        }
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_text(key: str) -> Text | None:
    """The embeddings kept under a key, on the CPU and bit for bit what was saved, or None. Raises nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not key:
        return None
    file = _file(key)
    try:
        if file.stat().st_size > LIMIT_BYTES:
            return None
        tensors = load(file.read_bytes())
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    text = _checked(tensors)
    if text is not None:
        try:
            os.utime(file)
        except OSError:
            return text  # a cache that can only be read is of use too
    return text


def save_text(key: str, text: Text) -> None:
    """Keeps embeddings under a key, in place of what was there. Raises nothing: a cache that fails is no cache."""
    from safetensors.torch import save

    if not key:
        return
    file = _file(key)
    tensors = {EMBEDDINGS: text.embeddings.detach().cpu().contiguous()}
    if text.mask is not None:
        tensors[MASK] = text.mask.cpu().contiguous()
    data = save({**tensors, CHECKSUM: _checksum(tensors)})
    if len(data) > LIMIT_BYTES:
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, [data], mode=0o600)
        _make_room(file.parent)
    except OSError:
        return


def _checked(tensors: dict[str, Tensor]) -> Text | None:
    """The text of a file's tensors, if they are what was saved."""
    checksum = tensors.pop(CHECKSUM, None)
    embeddings, mask = tensors.get(EMBEDDINGS), tensors.get(MASK)
    if checksum is None or embeddings is None or not checksum.equal(_checksum(tensors)):
        return None
    return Text(embeddings, mask)


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    """[32] uint8: sha256 over names, dtypes, shapes and bytes."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        running.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        running.update(tensor.flatten().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(running.digest()), dtype=torch.uint8)


def _make_room(folder: Path) -> None:
    """Removes the entries that were used longest ago until the rest fits, and parts that nobody writes any more."""
    found = []
    for entry in os.scandir(folder):
        facts = entry.stat(follow_symlinks=False)
        if entry.name.endswith(".part") and facts.st_mtime < time.time() - ABANDONED_SECONDS:
            Path(entry.path).unlink(missing_ok=True)
        elif entry.name.endswith(".safetensors"):
            found.append((facts.st_mtime_ns, facts.st_size, entry.path))
    held = sum(n_bytes for _, n_bytes, _ in found)
    for _, n_bytes, path in sorted(found):
        if held <= LIMIT_BYTES:
            return
        Path(path).unlink(missing_ok=True)
        held -= n_bytes


def _file(key: str) -> Path:
    return cache_folder() / "text" / f"{key}.safetensors"


def _facts_of(file: Path) -> tuple[str, int, int]:
    facts = file.stat()
    return file.name, facts.st_size, facts.st_mtime_ns


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def release_of(library: str) -> str:
    """major.minor of an installed library, without importing it."""
    from importlib.metadata import version

    return ".".join(version(library).split(".")[:2])
