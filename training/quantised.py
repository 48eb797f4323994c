"""What smaller weights cost in pictures of the built-in model: each precision against fp32, same prompts and seeds.

    python -m training.quantised --size 1024 --prompts 24
    python -m training.quantised --size 4096 --prompts 3 --precisions int8,int4

PSNR and SSIM of final pictures, PSNR of latents after some steps of the last size, and how many of the claims of each
sentence the scorer reads. The last line of stdout is one JSON object. --sheet writes the first pictures side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handscroll import Handscroll
from handscroll.runtime.sampling.schedule import SamplerRun
from training.evaluate import Picture, held_out_prompts, kept_claims
from training.scorer import load_scorer, read

PRECISIONS = "int8-weights,int8,int4"
SCORER = Path(__file__).with_name("scorer.safetensors")
STEPS = (1, 10, 20)


@contextmanager
def watched(latents: dict[int, torch.Tensor]) -> Iterator[None]:
    """Keeps the latents after `STEPS` steps of each size, the last size's in the end."""
    step_done = SamplerRun.step_done

    def noted(run: SamplerRun, index: int, latent: torch.Tensor) -> None:
        if index + 1 in STEPS:
            latents[index + 1] = latent.float().cpu().clone()
        step_done(run, index, latent)

    SamplerRun.step_done = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SamplerRun.step_done = step_done  # type: ignore[method-assign]


def psnr(ours: Any, theirs: Any, peak: float) -> float:
    error = float(np.square(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(ours: Picture, theirs: Picture) -> float:
    """Of grey values in windows of 8x8, the mean (Wang et al. 2004, with uniform windows)."""
    one, other = (torch.from_numpy(each.astype(np.float32)).mean(-1)[None, None] for each in (ours, theirs))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values, 8, 4)

    of_one, of_other = mean(one), mean(other)
    one_spread, other_spread = mean(one * one) - of_one**2, mean(other * other) - of_other**2
    both = mean(one * other) - of_one * of_other
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    level = (2 * of_one * of_other + first) / (of_one**2 + of_other**2 + first)
    return float((level * (2 * both + second) / (one_spread + other_spread + second)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-landscape")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--precisions", default=PRECISIONS)
    parser.add_argument("--text-precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    names = ["fp32", *options.precisions.split(",")]
    scrolls = {
        name: Handscroll.from_pretrained(
            options.model,
            device=options.device,
            precision=name,
            text_precision="auto" if name == "fp32" else options.text_precision,
        )
        for name in names
    }
    scorer = load_scorer(SCORER)
    rows: list[dict[str, Any]] = []
    sheet: list[Picture] = []
    for number, _, text in held_out_prompts(options.prompts):
        made: dict[str, Picture] = {}
        latents: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
        row: dict[str, Any] = {"prompt": text, "seed": number}
        for name, scroll in scrolls.items():
            with watched(latents[name]):
                made[name] = scroll(text, size=f"{options.size}x{options.size}", seed=number).numpy()
            labels = {key: reading.label for key, reading in read(scorer, made[name]).items()}
            kept = kept_claims(text, labels)
            row[name] = {"claims": sum(kept.values()), "of": len(kept)}
            if name == "fp32":
                continue
            row[name] |= {
                "psnr": psnr(made[name], made["fp32"], 255),
                "ssim": ssim(made[name], made["fp32"]),
                "latents": {
                    step: psnr(latent, latents["fp32"][step], float(latents["fp32"][step].abs().max()))
                    for step, latent in latents[name].items()
                },
            }
        rows.append(row)
        if len(sheet) < 4:
            sheet.append(np.concatenate([made[name][::2, ::2] for name in names], axis=1))
        print(number, {name: round(row[name]["psnr"], 1) for name in names[1:]}, text, flush=True)
    found = {"model": options.model, "size": options.size, "prompts": len(rows), "rows": rows, "medians": {}}
    for name in names:
        claims = sum(row[name]["claims"] for row in rows) / sum(row[name]["of"] for row in rows)
        found["medians"][name] = {"claims": claims}
        if name != "fp32":
            found["medians"][name] |= {
                key: statistics.median(row[name][key] for row in rows) for key in ("psnr", "ssim")
            } | {
                f"latents after {step}": statistics.median(row[name]["latents"][step] for row in rows)
                for step in STEPS
                if all(step in row[name]["latents"] for row in rows)
            }
        print(name, found["medians"][name])
    if options.sheet:
        import pyvips

        pyvips.Image.new_from_array(np.concatenate(sheet, axis=0)).write_to_file(str(options.sheet))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
