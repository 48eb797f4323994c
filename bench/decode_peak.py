"""How much memory a decode by rows takes over the map that it cannot do without, at sizes too large to wait for.

    python bench/decode_peak.py --sizes 4096,8192 --precision bf16 --save
    python bench/decode_peak.py --sizes 4096 --rows 4096

A decode holds most while its last sweep begins: the whole map at the last attention, and full line buffers. From then
on the map only gets shorter. So every sweep but the last runs whole, the last until `--rows` rows of the picture are
out, in a sixth of the time. Blocks go back to the system when they are freed, as under `--memory`. Each size runs in a
process of its own; the peak is above the loaded model. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import child
import report
from handscroll.banded.autoencoder import decode_rows
from handscroll.banded.rows import RowBlock, RowMap
from handscroll.runtime.heap import return_large_blocks
from handscroll.runtime.memory import trim
from one_run import peak, reset_peak
from side_by_side import count, label, sizes
from stages import DTYPES, Settings, Size, open_stage


class WeighedMap(RowMap):
    """A map that tells how many bytes were written to it."""

    def __init__(self, height: int, weights: list[int]) -> None:
        super().__init__(height)
        self.weights = weights
        weights.append(0)
        self.index = len(weights) - 1

    def write(self, row_block: RowBlock) -> None:
        self.weights[self.index] += 0 if row_block is None else row_block.nbytes
        super().write(row_block)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=sizes, default=[(1024, 1024)], help="1024,2048x2048,16384x1024")
    parser.add_argument("--rows", type=count, default=512, help="of the picture, until which it is decoded")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=count, help="default: as many as cores")
    parser.add_argument("--miniature", action="store_true", help="a few channels, to try the script itself")
    parser.add_argument("--save", action="store_true", help="write DATE-decode-peak-...-MACHINE.json to results/")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    settings = Settings("decode", precision=arguments.precision, miniature=arguments.miniature)
    if arguments.one:
        print(json.dumps(measure(settings, arguments.sizes[0], arguments.rows)))
        return
    found = []
    for size in arguments.sizes:
        print(label(size), file=sys.stderr, flush=True)
        options = ["--precision", arguments.precision, "--rows", str(arguments.rows), "--sizes", label(size)]
        options += ["--miniature"] if arguments.miniature else []
        done = child.run([sys.executable, Path(__file__), "--one", *options], {}, None)
        if done.exit_code:
            sys.exit(f"{label(size)}: {done.why}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    of_all = {"precision": arguments.precision, "rows": arguments.rows, "sizes": found}
    name = f"decode-peak-{'-'.join(map(label, arguments.sizes))}px-{arguments.precision}" if arguments.save else None
    report.print_and_save({**report.dated(arguments.threads), **of_all}, table(found), name)


@torch.no_grad()
def measure(settings: Settings, size: Size, rows: int) -> dict[str, Any]:
    """One decode up to its first rows: peak bytes above the model, those of its largest map, and the seconds."""
    stage: Any = open_stage(settings)
    model = stage.model()
    latent, small = stage.input(model, size), stage.small(model)
    return_large_blocks()
    weights: list[int] = []

    def decode(latent: Tensor, until: int) -> None:
        weights.clear()
        row_blocks = decode_rows(
            model.decoder,
            latent,
            new_map=lambda _, height: WeighedMap(height, weights),
            on_sweep=lambda *_: trim(),
        )
        made = 0
        with closing(row_blocks):
            for row_block in row_blocks:
                made += row_block.shape[2]
                del row_block
                if made >= until:
                    break

    decode(small, 64)
    loaded_bytes = reset_peak("cpu")
    if loaded_bytes is None:
        sys.exit("this system does not let a process's peak be measured anew")
    begun = time.perf_counter()
    decode(latent, rows)
    pixels = size[0] * size[1]
    return {
        "size": label(size),
        "pixels": pixels,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": (peak_bytes := peak("cpu", False) - loaded_bytes),
        "map_bytes": (map_bytes := max(weights)),
        "peak_bytes_per_pixel": peak_bytes / pixels,
        "map_bytes_per_pixel": map_bytes / pixels,
        "peak_over_map": peak_bytes / map_bytes,
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'size':>12} {'seconds':>8} {'peak, MiB':>10} {'map, MiB':>9} {'bytes/pixel':>12} {'over the map':>13}"]
    for each in found:
        peak_mib, map_mib = each["peak_bytes"] / 2**20, each["map_bytes"] / 2**20
        lines.append(
            f"{each['size']:>12} {each['seconds']:8.0f} {peak_mib:10.0f} {map_mib:9.0f} "
            f"{each['peak_bytes_per_pixel']:12.1f} {each['peak_over_map']:13.2f}"
        )
    return lines


if __name__ == "__main__":
    main()
