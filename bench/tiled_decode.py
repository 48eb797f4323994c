"""Decode a latent as diffusers does it with tiling, in a process that imports nothing else: seconds and peak memory.

    python bench/tiled_decode.py CHECKPOINT/vae latent.safetensors

Tiles of 512 px every 448 px, fp32. The encoder is let go of before the decode, and the picture is kept as 8 bits. With
`--no-tiling-time` only the tiles at which memory is highest are decoded (the first and the last whole one) and the
others are filled with a constant: the peak is the same and the seconds mean nothing. The last line is one JSON object;
`decode_peak_bytes` is the whole process's peak during the decode alone, where the system can tell.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file

TILE_PX, TILE_STRIDE_PX = 512, 448


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("latent", type=Path, help="what `handscroll generate --save-latent` writes")
    parser.add_argument("--no-tiling-time", action="store_true", help="only the tiles that memory depends on")
    arguments = parser.parse_args()
    model = AutoencoderDC.from_pretrained(arguments.vae, torch_dtype=torch.float32).eval()
    model.enable_tiling(TILE_PX, TILE_PX, TILE_STRIDE_PX, TILE_STRIDE_PX)
    del model.encoder
    gc.collect()
    latent = load_file(arguments.latent)["latent"] / model.config.scaling_factor
    if arguments.no_tiling_time:
        skip_tiles(model, *latent.shape[2:])
    reset = reset_peak()
    begun = time.perf_counter()
    decoded = model.decode(latent, return_dict=False)[0]
    seconds = time.perf_counter() - begun
    peak_bytes = peak_resident_bytes() if reset else None
    picture = torch.empty(decoded.shape[2], decoded.shape[3], 3, dtype=torch.uint8)
    for row in range(decoded.shape[2]):
        picture[row] = (decoded[0, :, row] * 127.5 + 127.5).clamp_(0, 255).round_().T
    print(
        json.dumps(
            {
                "seconds": None if arguments.no_tiling_time else seconds,
                "decode_peak_bytes": peak_bytes,
                "shape": list(picture.shape),
            }
        )
    )


def skip_tiles(model: AutoencoderDC, rows: int, columns: int) -> None:
    """Makes the decoder give a constant for all tiles but the first and the last whole one."""
    ratio = model.spatial_compression_ratio
    tile, stride = TILE_PX // ratio, TILE_STRIDE_PX // ratio
    if rows <= tile and columns <= tile:
        return  # so small a picture is not tiled
    tiles = [(top, left) for top in range(0, rows, stride) for left in range(0, columns, stride)]
    sizes = [min(tile, rows - top) * min(tile, columns - left) for top, left in tiles]
    real = {0, len(sizes) - 1 - sizes[::-1].index(max(sizes))}
    calls = iter(range(len(tiles)))
    forward = model.decoder.forward

    def decode_or_fill(part: torch.Tensor) -> torch.Tensor:
        if next(calls) in real:
            return forward(part)
        return torch.full((1, 3, part.shape[2] * ratio, part.shape[3] * ratio), 0.5)

    model.decoder.forward = decode_or_fill


def reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
