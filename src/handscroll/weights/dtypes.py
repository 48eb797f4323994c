"""torch's dtypes by the names used throughout handscroll."""

from __future__ import annotations

import torch

from handscroll.weights.header import TensorEntry

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
# And those that only the parts of a quantised matrix are stored in.
STORED_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}


def wanted_dtype(entry: TensorEntry, dtype: torch.dtype) -> torch.dtype:
    stored = DTYPES[entry.dtype]
    return dtype if stored.is_floating_point else stored


def is_mappable(entry: TensorEntry, wanted: torch.dtype) -> bool:
    """Whether a tensor can be the file's bytes as they are."""
    return DTYPES[entry.dtype] == wanted and entry.start % wanted.itemsize == 0 and entry.n_bytes > 0
