"""Files and folders that stand where weights are looked for and are something else: what they are, and what to do."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from handscroll.units import one_line, shown

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
FIRST_BYTES = 512  # of a file, enough to tell what it is

USE_THE_ORIGINAL = (
    "use the checkpoint that it was made from, such as --model sana-1.6b; --memory runs it in little memory"
)
SAVE_AS_FOLDER = "save it with diffusers' save_pretrained(FOLDER, safe_serialization=True) and give that folder"
FUSE_FIRST = (
    "fuse it into its model with diffusers (pipe.load_lora_weights(...), pipe.fuse_lora(), "
    "pipe.save_pretrained(FOLDER)) and give that folder"
)

# How a file begins that is no safetensors, JSON or tokenizer, whatever it is called.
_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE = f"a pickle, which can run code when it is opened, so it is not read; {SAVE_AS_FOLDER}"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", f"a GGUF file, quantised for llama.cpp and its like, which handscroll does not read; {USE_THE_ORIGINAL}"),
    (b"PK\x03\x04", f"a zip archive, as torch.save writes; it can run code when it is opened; {SAVE_AS_FOLDER}"),
    *((bytes((0x80, protocol)), _PICKLE) for protocol in range(2, 6)),
    (b"\x93NUMPY", f"a NumPy array, which handscroll does not read; {SAVE_AS_FOLDER}"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file, which handscroll does not read"),
    (b"\x89PNG", "a picture; give the file of the weights"),
    (b"\xff\xd8\xff", "a picture; give the file of the weights"),
    (b"RIFF", "a picture or a sound; give the file of the weights"),
    (b"%PDF", "a PDF document; give the file of the weights"),
    (b"\x00" * 64, "zeros where the file should begin: it was never written to its end; fetch it again"),
)
_TAR_MARK, _TAR_AT = b"ustar", 257
MOST_SHOWN = 60  # characters of a text that stands in place of a file
# Of a file's name, what says that it is not read or not whole.
_BY_SUFFIX = {
    ".onnx": f"an ONNX file, which handscroll does not read; {USE_THE_ORIGINAL}",
    ".msgpack": f"weights for Flax, which handscroll does not read; {USE_THE_ORIGINAL}",
    ".h5": f"weights for Keras, which handscroll does not read; {USE_THE_ORIGINAL}",
    **dict.fromkeys(
        (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp"),
        "what a download left that did not come to its end; fetch the file again",
    ),
}
_PAGE = re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)


def stands_in(first: bytes) -> str | None:
    """What stands in the place of a file that was not fetched, by its first bytes; None for everything else."""
    if first.startswith(_LFS):
        return "a Git LFS pointer and not the file itself; run `git lfs pull` in its folder, or give --model the hub id"
    if _PAGE.match(first):
        return "a web page and not the file itself; fetch the file again, or give --model the hub id"
    return None


def what_it_is(first: bytes) -> str | None:
    """What a file is by its first bytes, and what to do about it; None for nothing of what is known here."""
    if said := stands_in(first):
        return said
    if first[_TAR_AT:].startswith(_TAR_MARK):
        return "a tar archive; unpack it first"
    return next((said for beginning, said in _BEGINNINGS if first.startswith(beginning)), None)


def text_in_place(first: bytes) -> str | None:
    """What is said where weights should be and a file begins as a text, such as a server's `Entry not found`."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(first).strip()  # the last character may be cut
    except UnicodeDecodeError:
        return None
    if not text or not all(character.isprintable() or character.isspace() for character in text):
        return None
    return f"a text and no weights, which begins {one_line(text, MOST_SHOWN)!r}; fetch the file again"


def by_suffix(name: str) -> str | None:
    """What the end of a file's name says that it is, and what to do; None where that is nothing known."""
    return next((said for suffix, said in _BY_SUFFIX.items() if name.lower().endswith(suffix)), None)


def unreadable(file: Path, error: OSError) -> str:
    """Why a file cannot be read, in one line that names it."""
    if isinstance(error, FileNotFoundError) and file.is_symlink():
        return f"{file}: a link to {shown(os.readlink(file), MOST_SHOWN * 4)}, which is not there; fetch the file again"
    return f"{file}: cannot be read: {error.strerror or one_line(error)}"


def first_bytes(file: Path) -> bytes:
    """The beginning of a file; nothing where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(FIRST_BYTES)
    except OSError:
        return b""


# Quantised weights and adapters, by how their files and tensors are called.
_QUANTISED_FILES: tuple[tuple[str, str], ...] = (
    (r"(transformer_blocks|unquantized_layers)\.safetensors|svdq.*\.safetensors", "SVDQuant (Nunchaku)"),
    (r"quanto_qmap\.json|quantization_map\.json", "quanto"),
    (r".*\.gguf", "GGUF"),
)
# Tensors' names are looked for in this order: the later are less telling.
_QUANTISED_TENSORS: tuple[tuple[str, str], ...] = (
    (r"\.(wscales|smooth(_factor(_orig)?)?|proj_down|wcscales|wtscale)$", "SVDQuant (Nunchaku)"),
    (r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map|nested_absmax)$", "bitsandbytes, 4 bits"),
    (r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
    (r"\.weight\._(data|scale|shift)$", "quanto"),
    (r"weight[.:_]*(qdata|tensor_impl|tensor_data|int_data)\b|_weight_qdata", "torchao"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(weight_packed|weight_shape)$", "compressed-tensors"),
    (r"\.(scale_weight|scale_input|weight_scale(_inv|_2)?|input_scale)$|^scaled_fp8$", "fp8 with scales"),
)
_LORA_TENSOR = re.compile(r"\.(lora_[AB]|lora_(down|up)|lora\.(down|up)|lora_magnitude_vector|base_layer)(\.|$)|^lora_")
_LORA_FACTORS = re.compile(r"lora_A|lora[._]down"), re.compile(r"lora_B|lora[._]up")
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes, 4 bits",
    "bitsandbytes_8bit": "bitsandbytes, 8 bits",
    "svdquant": "SVDQuant (Nunchaku)",
    "nunchaku": "SVDQuant (Nunchaku)",
    "fp8": "fp8 with scales",
    "gguf": "GGUF",
}


def quantised_by_config(settings: object) -> str:
    """How a config's `quantization_config` says that weights are stored, such as `bitsandbytes, 4 bits`."""
    if not isinstance(settings, Mapping):
        return "quantised"
    method = str(settings.get("quant_method") or settings.get("method") or "").lower()
    if method == "bitsandbytes" or "load_in_4bit" in settings or "load_in_8bit" in settings:
        if settings.get("load_in_4bit"):
            method = "bitsandbytes_4bit"
        elif settings.get("load_in_8bit"):
            method = "bitsandbytes_8bit"
    elif not method and "weights_dtype" in settings:
        method = "quanto"
    return f"quantised ({_METHODS.get(method, method)})" if method else "quantised"


def quantised_by_tensors(names: Collection[str]) -> str | None:
    """How weights are quantised, by what accompanies them; None where nothing says so."""
    for pattern, method in _QUANTISED_TENSORS:
        if any(map(re.compile(pattern).search, names)):
            return f"quantised ({method})"
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names change a model instead of being one."""
    return any(map(_LORA_TENSOR.search, names))


def has_both_factors(names: Collection[str]) -> bool:
    """Whether among tensors of these names are both factors of an adapter, of which one alone changes nothing."""
    return all(any(map(factor.search, names)) for factor in _LORA_FACTORS)


def strange_folder(names: Collection[str]) -> str | None:
    """What a folder with these file names holds instead of a model's weights, and what to do. None: nothing known."""
    if found := [name for name in LORA_FILES if name in names]:
        return f"holds a LoRA adapter ({found[0]}) and not a model; {FUSE_FIRST}"
    for pattern, method in _QUANTISED_FILES:
        if any(map(re.compile(pattern).fullmatch, names)):
            return f"holds weights that are quantised ({method}), which handscroll does not read; {USE_THE_ORIGINAL}"
    if pickles := sorted(name for name in names if name.endswith(PICKLE_SUFFIXES)):
        return (
            f"holds weights as a pickle ({pickles[0]}), which can run code when it is opened, so it is not read; "
            f"{SAVE_AS_FOLDER}"
        )
    return None
