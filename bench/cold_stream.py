"""How long it takes to read all layers of a transformer once, from a disk whose cache is cold.

    python bench/cold_stream.py /scratch/sana-1.6b /scratch/sana-1.6b-int8 /scratch/sana-1.6b-int4

What a step adds where no layer stays in memory. Each folder is read in bf16, as it is stored or made wide, after its
pages were given back to the system; the median of --runs, in turns. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import machine
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.runtime.modules import open_module
from handscroll.weights.dtypes import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="what layers are computed in")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {str(folder): [] for folder in options.folders}
    warm: dict[str, list[float]] = {str(folder): [] for folder in options.folders}
    stored_bytes: dict[str, int] = {}
    for _ in range(options.runs):
        for folder in options.folders:
            spec = CheckpointSpec.from_folder(folder)
            forget_pages(spec)
            n_bytes, taken = read_layers(spec, DTYPES[options.dtype])
            seconds[str(folder)].append(taken)
            warm[str(folder)].append(read_layers(spec, DTYPES[options.dtype])[1])
            stored_bytes[str(folder)] = n_bytes
    found: list[dict[str, Any]] = [
        {
            "folder": Path(name).name,
            "stored_bytes": stored_bytes[name],
            "seconds": statistics.median(each),
            "seconds_in_cache": statistics.median(warm[name]),
        }
        for name, each in seconds.items()
    ]
    first = found[0]
    for each in found:
        bytes_share = each["stored_bytes"] / first["stored_bytes"]
        print(
            f"{each['folder']:24} {each['stored_bytes'] / 2**30:5.2f} GiB ({bytes_share:.2f})  "
            f"{each['seconds']:6.2f} s ({each['seconds'] / first['seconds']:.2f})  "
            f"in cache {each['seconds_in_cache']:6.2f} s"
        )
    print(json.dumps({"machine": machine.describe(), "dtype": options.dtype, "folders": found}))


def forget_pages(spec: CheckpointSpec) -> None:
    """Gives the pages of the transformer's files back to the system."""
    os.sync()
    for file in spec.transformer_weights.files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_layers(spec: CheckpointSpec, dtype: torch.dtype) -> tuple[int, float]:
    """What is stored of all layers, and the seconds that materializing each once takes."""
    stored = spec.quantisation_of("transformer")
    module: Any
    module, stream = open_module(
        spec,
        "transformer",
        dtype=dtype,
        device="cpu",
        leave={"patch_embed.pos_embed"},
        storage="" if stored is None else stored.storage,
    )
    blocks = module.transformer_blocks
    begun = time.perf_counter()
    for index, block in enumerate(blocks):
        with stream.materialize(block):
            stream.prefetch(blocks[(index + 1) % len(blocks)])
    taken = time.perf_counter() - begun
    stream.close()
    n_bytes = sum(
        source.stored_bytes for name, source in stream.entries.items() if name.startswith("transformer_blocks")
    )
    return n_bytes, taken


if __name__ == "__main__":
    main()
