"""From a prompt to a picture file, of a checkpoint folder or a model on this machine: opening it, its weights, the text
encoder, all steps, the decode, the file. Libraries are imported before.

whole       diffusers' pipeline; compiled: with its transformer and decoder under torch.compile, and its weights loaded
            before, which is not counted
tiled       with the autoencoder's tiling, 512 px every 448 px or 1024 every 896: another picture
rows        `handscroll generate`

The same steps, guidance, seed and precision, no binning of sizes, PNG. Memory is the whole process's, on a CUDA device
what PyTorch reserved. Differences are of 8-bit samples.
"""

from __future__ import annotations

import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import on_meta
from handscroll.cli.main import run as handscroll
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import open_checkpoint
from handscroll.runtime.text import instruction_of
from make_checkpoint import empty_module
from memory import PROMPT, difference
from stages import MODES, TILES_PX, Ready, Size, Stage, in_dtype

SEED = 1
WARM_UP_SIZE = 64, 64


class Generate(Stage):
    modes = tuple(mode for mode in MODES if mode != "patch")
    limit = None
    of_process = True

    @cached_property
    def spec(self) -> CheckpointSpec:
        return open_checkpoint(self.settings.model)

    @property
    def model_name(self) -> str:
        return self.spec.name

    @property
    def steps(self) -> int:
        return self.settings.steps or self.spec.default_steps

    def ready(self, mode: str, size: Size, compared: bool, scratch: Path) -> Ready:
        picture = scratch / f"{mode}.png"
        if mode == "rows":
            return Ready(
                lambda: self.by_handscroll(size, self.steps, picture),
                lambda: self.by_handscroll(WARM_UP_SIZE, 2, scratch / "small.png"),
            )
        if mode == "compiled":
            pipeline = self.pipeline(mode)
            pipeline.transformer.compile(dynamic=False)
            pipeline.vae.decoder.compile(dynamic=False)
            return Ready(lambda: self.by_diffusers(pipeline, size, self.steps, picture), lambda: None)
        return Ready(
            lambda: self.by_diffusers(self.pipeline(mode), size, self.steps, picture),
            lambda: self.by_diffusers(self.pipeline(mode), WARM_UP_SIZE, 2, scratch / "small.png"),
        )

    def by_handscroll(self, size: Size, steps: int, picture: Path) -> Path:
        """In a cache that knows how fast the machine is from the warm-up, and no prompt."""
        cache = Path(os.environ["HANDSCROLL_CACHE"])
        for prompts in cache.iterdir() if cache.is_dir() else ():
            if prompts.is_dir():
                shutil.rmtree(prompts)
        command = ["generate", PROMPT, "-o", picture, "--model", self.settings.model, "--size", f"{size[0]}x{size[1]}"]
        command += ["--steps", str(steps), "--guidance", str(self.spec.default_guidance), "--seed", str(SEED)]
        command += ["--device", self.settings.device, "--precision", self.settings.precision, "--quiet"]
        command += ["--compose", "off"]  # every step at full size, as diffusers does
        if handscroll(list(map(str, command))):
            raise RuntimeError("handscroll failed")  # it has said why
        return picture

    def pipeline(self, mode: str) -> Any:
        from diffusers import DiffusionPipeline

        pipeline: Any = DiffusionPipeline.from_pretrained(self.spec.folder, torch_dtype=self.settings.dtype)
        pipeline.set_progress_bar_config(disable=True)
        if mode in TILES_PX:
            tile_px, stride_px = TILES_PX[mode]
            pipeline.vae.enable_tiling(tile_px, tile_px, stride_px, stride_px)
        return pipeline.to(self.settings.device)

    def by_diffusers(self, pipeline: Any, size: Size, steps: int, picture: Path) -> Path:
        instruction = instruction_of(self.spec)
        image = pipeline(
            PROMPT,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=self.spec.default_guidance,
            generator=torch.Generator("cpu").manual_seed(SEED),
            use_resolution_binning=False,
            complex_human_instruction=[instruction] if instruction else None,
            max_sequence_length=self.spec.max_prompt_tokens,
        ).images[0]
        image.save(picture)
        return picture

    def needed_bytes(self, mode: str, size: Size) -> int | None:
        """Its decode alone and all weights: what comes before it takes less."""
        if mode not in ("whole", "compiled"):
            return None
        weights_bytes = self.spec.n_bytes
        with torch.device("meta"):
            model = in_dtype(empty_module(self.spec.autoencoder), self.settings.dtype)
            ratio = model.spatial_compression_ratio
            latent = torch.empty(
                1, model.config.latent_channels, size[1] // ratio, size[0] // ratio, dtype=self.settings.dtype
            )
        return weights_bytes + on_meta.peak_bytes_of(lambda: model.decoder(latent))

    def keep(self, result: Path, reference: Path) -> None:
        shutil.copy(result, reference)

    def difference(self, result: Path, reference: Path) -> float:
        return float(difference(result, reference)["largest"])


STAGE = Generate
