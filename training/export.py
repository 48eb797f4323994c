"""Write the trained weights as a checkpoint folder in the diffusers layout, in bf16, with nothing of the training.

What the work folder does not hold stays as it is in the checkpoint folder: one part can be trained on alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline
from transformers import PreTrainedTokenizerFast

from training.transformer import FLOW_SHIFT, begin_from, load_average

LIMIT = 16 * 2**20
ABOUT = {
    "name": "tiny-landscape",
    "native_px": 1024,
    "compose_px": 512,
    "complex_human_instruction": None,
    "licence": "Apache-2.0",
    "default_steps": 20,
    "default_guidance": 3.0,
    "max_prompt_tokens": 300,
}


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
    )


def assemble(work: Path, folder: Path) -> SanaPipeline:
    """The averaged weights of what was trained in `work` as a pipeline, in float32; the rest is that of `folder`."""
    words = work / "tokenizer" if (work / "tokenizer").exists() else folder / "tokenizer"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(words)
    trained = [path for path in (work / "growth.pt", work / "painter.pt") if path.exists()]
    painter = load_average(trained[0], tokenizer) if trained else begin_from(folder, tokenizer)
    decoders = (work / "autoencoder", work / "autoencoder-fixed-encoder", folder / "vae")
    vae = AutoencoderDC.from_pretrained(next(decoder for decoder in decoders if decoder.exists()))
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=painter.text_encoder,
        vae=vae,
        transformer=painter.transformer,
        scheduler=scheduler(),
    )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _name_tokenizer(folder: Path) -> None:
    """The class's name in `model_index.json` as every version of transformers knows it."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    parts["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index.write_text(json.dumps(parts, indent=2) + "\n")


def _forget_paths(folder: Path) -> None:
    """Configs remember the folder that a module was loaded from, which means nothing elsewhere."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def export(work: Path, folder: Path) -> int:
    """Replace `folder` by the weights that were trained in `work` and return its size in bytes."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    assemble(work, folder).to(dtype=torch.bfloat16).save_pretrained(part)
    _name_tokenizer(part)
    _forget_paths(part)
    (part / "handscroll.json").write_text(json.dumps(ABOUT, indent=2) + "\n")
    for path in part.rglob("*.safetensors"):
        path.chmod(0o644)
    size = folder_bytes(part)
    if size > LIMIT:
        raise SystemExit(f"{size} bytes is over the {LIMIT} that a package may carry")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    options = parser.parse_args()
    size = export(options.work, options.folder)
    print(f"{options.folder}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
