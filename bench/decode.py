"""Measure the ways to decode a latent, side by side: time, memory and difference from the whole decode.

    python bench/decode.py 1024 2048 --repeats 3 --save
    python bench/decode.py 4096 --modes tiled,rows --strip-rows 8

whole   diffusers' AutoencoderDC.decode
tiled   the same with enable_tiling, tiles of 512 px every 448 px: another picture
patch   every convolution split into 32 patches of rows: whole activations
rows    handscroll: rows of the picture as they are made, into one output (fp32 beside a whole decode, else 8 bits)

The decoder has the shape of f32c32-sana and random weights, fp32. Each measurement runs in a process of its own, the
modes in turns, so that neither memory nor a busy spell of the machine is carried from one to the next. Memory is what
the process held at its highest above the loaded model, output included. A table goes to stderr; the last line of
stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import machine
from handscroll.banded.dcae import decode_rows
from handscroll.banded.patches import decode_by_patches
from handscroll.runtime.memory import trim
from handscroll.spec import F32C32_SANA, AutoencoderSpec

MODES = ("whole", "tiled", "patch", "rows")
MINIATURE = replace(
    F32C32_SANA,
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_out_channels=(8, 8, 8, 8, 16, 16),
    decoder_block_out_channels=(8, 8, 8, 8, 16, 16),
    decoder_layers_per_block=(1,) * 6,
)
TILE_PX, TILE_STRIDE_PX = 512, 448
PATCHES = 32


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.sizes[0], arguments)))
        return
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "decoder": "miniature" if arguments.miniature else "f32c32-sana",
        "precision": "fp32",
        "strip_rows": arguments.strip_rows,
        "repeats": arguments.repeats,
        "convolution_gflops": machine.convolution_gflops(seconds=0.1 if arguments.miniature else machine.RATE_SECONDS),
    }
    report["sizes"] = [compare(size, arguments, report["convolution_gflops"]) for size in arguments.sizes]
    print_table(report)
    if arguments.save:
        sizes = "-".join(map(str, arguments.sizes))
        name = f"{report['date']}-decode-{sizes}px-{machine.slug(report['machine'])}.json"
        path = Path(__file__).parent / "results" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=size_px, nargs="*", default=[1024], help="sides in pixels, multiples of 32")
    parser.add_argument("--modes", type=mode_names, default=list(MODES), help="comma-separated; default: all")
    parser.add_argument("--strip-rows", type=int, help="rows of the map at the last attention; default: by size")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--miniature", action="store_true", help="a few channels, to try the benchmark itself")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-decode-SIZES-MACHINE.json")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def size_px(text: str) -> int:
    size = int(text)
    if size < 32 or size % 32:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32")
    return size


def mode_names(text: str) -> list[str]:
    """In the order of MODES, so that the whole decode, which the others are held against, is first."""
    names = text.split(",")
    if unknown := set(names) - set(MODES):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MODES)}")
    return [mode for mode in MODES if mode in names]


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own


@torch.no_grad()
def measure(mode: str, size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Decodes once. The first whole decode leaves its result in `arguments.reference`, the others are held to it."""
    model = random_autoencoder(arguments.miniature)
    generator = torch.Generator().manual_seed(1)
    exact_output = arguments.reference is not None and arguments.reference.exists()
    latent = torch.randn(1, model.config.latent_channels, size // 32, size // 32, generator=generator)
    decode(
        mode, model, latent[:, :, :2, :2], arguments.strip_rows, exact_output
    )  # loads what libraries load at first use
    gc.collect()

    loaded_bytes = reset_peak()
    begun = time.perf_counter()
    picture = decode(mode, model, latent, arguments.strip_rows, exact_output)
    seconds = time.perf_counter() - begun
    peak_bytes = None if loaded_bytes is None else memory_status("VmHWM") - loaded_bytes

    difference = None
    if arguments.reference is not None and arguments.reference.exists():
        difference = max_difference(picture, np.load(arguments.reference, mmap_mode="r"))
    elif arguments.reference is not None and mode == "whole":
        np.save(arguments.reference, picture.numpy())
        difference = 0.0
    return {"seconds": seconds, "peak_bytes": peak_bytes, "max_difference": difference}


def decode(mode: str, model: AutoencoderDC, latent: Tensor, strip_rows: int | None, exact_output: bool) -> Tensor:
    if mode == "rows":
        ratio = model.spatial_compression_ratio
        # Beside a reference the output stays fp32, as the other modes give it; alone it is 8 bits, as in a picture.
        dtype = torch.float32 if exact_output else torch.uint8
        picture = torch.empty(1, 3, latent.shape[2] * ratio, latent.shape[3] * ratio, dtype=dtype)
        top = 0
        for strip in decode_rows(model.decoder, latent, strip_rows, on_sweep=lambda done, of: trim()):
            if not exact_output:
                strip = (strip * 127.5 + 127.5).clamp_(0, 255)
            picture[:, :, top : top + strip.shape[2]] = strip
            top += strip.shape[2]
        return picture
    if mode == "patch":
        return decode_by_patches(model.decoder, latent, PATCHES)
    if mode == "tiled":
        model.enable_tiling(TILE_PX, TILE_PX, TILE_STRIDE_PX, TILE_STRIDE_PX)
    return model.decode(latent, return_dict=False)[0]


def autoencoder_spec(miniature: bool) -> AutoencoderSpec:
    return MINIATURE if miniature else F32C32_SANA


def random_autoencoder(miniature: bool) -> AutoencoderDC:
    """Matrices with a standard deviation of 1/sqrt(fan-in), norms the identity; the encoder holds no memory."""
    with torch.device("meta"):
        model = AutoencoderDC(**asdict(autoencoder_spec(miniature))).eval().requires_grad_(False)
    model.decoder.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def reset_peak() -> int | None:
    """Makes the highest resident memory start again from now, where the system can; returns what is resident."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return memory_status("VmRSS")
    except OSError:
        return None


def memory_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def max_difference(picture: Tensor, reference: np.ndarray) -> float:
    """Row by row, so that the comparison itself needs no memory to speak of."""
    rows = range(picture.shape[2])
    return max(float(np.abs(picture[:, :, row].numpy() - reference[:, :, row]).max()) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def compare(size: int, arguments: argparse.Namespace, convolution_gflops: float) -> dict[str, Any]:
    measured: dict[str, list[dict[str, Any]]] = {mode: [] for mode in arguments.modes}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="handscroll-bench-") as folder:
        reference = Path(folder) / "whole.npy"
        for repeat in range(arguments.repeats):
            for mode in arguments.modes:
                if mode in failed:
                    continue
                print(f"{size} px, {mode}, {repeat + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
                outcome = run_child(mode, size, arguments, reference)
                if isinstance(outcome, str):
                    failed[mode] = outcome
                else:
                    measured[mode].append(outcome)
    flop = decode_flop(size, arguments.miniature)
    modes = {mode: summary(runs, flop, convolution_gflops) for mode, runs in measured.items() if runs}
    for outcome in modes.values():
        for quantity in ("seconds", "peak_bytes"):
            whole = modes.get("whole", {}).get(quantity)
            outcome[f"{quantity}_over_whole"] = outcome[quantity] / whole if whole and outcome[quantity] else None
    return {"size_px": size, "flop": flop, "modes": modes, "failed": failed}


def run_child(mode: str, size: int, arguments: argparse.Namespace, reference: Path) -> dict[str, Any] | str:
    """The child's measurement, or why there is none."""
    command = [sys.executable, __file__, str(size), "--child", mode, "--reference", str(reference)]
    if arguments.strip_rows is not None:
        command += ["--strip-rows", str(arguments.strip_rows)]
    if arguments.miniature:
        command.append("--miniature")
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode < 0:
        return f"ended by signal {-child.returncode} (9: out of memory)"
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return json.loads(child.stdout.splitlines()[-1])


def decode_flop(size: int, miniature: bool) -> int:
    """Of the whole decode: convolutions, linear layers and attention, two for each multiplication with its addition."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = AutoencoderDC(**asdict(autoencoder_spec(miniature))).eval()
        model.decoder(torch.empty(1, model.config.latent_channels, size // 32, size // 32))
    return counter.get_total_flops()


def summary(runs: list[dict[str, Any]], flop: int, convolution_gflops: float) -> dict[str, Any]:
    """Medians. The rate is that of the whole decode's work, whatever work the mode found a way around or did twice."""
    seconds = statistics.median(run["seconds"] for run in runs)
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    differences = [run["max_difference"] for run in runs if run["max_difference"] is not None]
    return {
        "seconds": seconds,
        "seconds_each": [run["seconds"] for run in runs],
        "peak_bytes": statistics.median(peaks) if peaks else None,
        "max_difference": max(differences) if differences else None,
        "gflops": flop / seconds / 1e9,
        "of_convolution_rate": flop / seconds / 1e9 / convolution_gflops,
    }


def print_table(report: dict[str, Any]) -> None:
    described = report["machine"]
    lines = [
        f"{described['processor']}, {described['cores']} cores, torch {described['torch']}; "
        f"3x3 convolution of 128 channels: {report['convolution_gflops']:.0f} GFLOP/s",
        f"{'size':>6} {'mode':<6} {'seconds':>8} {'/whole':>7} {'GiB':>7} {'/whole':>7} {'GFLOP/s':>8} "
        f"{'of conv':>8} {'difference':>11}",
    ]
    for at_size in report["sizes"]:
        for mode, found in at_size["modes"].items():
            gib = None if found["peak_bytes"] is None else found["peak_bytes"] / 2**30
            columns = (
                f"{at_size['size_px']:>6}",
                f"{mode:<6}",
                _number(found["seconds"], ">8.2f"),
                _number(found["seconds_over_whole"], ">7.2f"),
                _number(gib, ">7.2f"),
                _number(found["peak_bytes_over_whole"], ">7.2f"),
                _number(found["gflops"], ">8.1f"),
                _number(found["of_convolution_rate"], ">8.0%"),
                _number(found["max_difference"], ">11.1e"),
            )
            lines.append(" ".join(columns))
        lines += [f"{at_size['size_px']:>6} {mode:<6} failed: {why}" for mode, why in at_size["failed"].items()]
    print("\n".join(lines), file=sys.stderr)


def _number(value: float | None, layout: str) -> str:
    return format("-", layout.partition(".")[0]) if value is None else format(value, layout)


if __name__ == "__main__":
    main()
