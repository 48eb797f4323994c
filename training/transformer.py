"""Train the transformer and its text encoder together, by flow matching as Sana does.

x_sigma = (1 - sigma) * latent + sigma * noise, and the model predicts noise - latent from x_sigma, sigma * 1000 and the
caption. sigma is logit-normal, shifted towards noise as the sampler's steps are, more so for larger pictures.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from training.captions import build_tokenizer, sample_captions
from training.latents import PLAN, Bucket, LatentFiles
from training.schedule import Average, autocast, load_checkpoint, pick_device, plateau, save_checkpoint

SMALLEST_SHIFT = 3.0  # at 256x256
FLOW_SHIFT = 6.0  # of the sampler, for about 1024x1024
EMPTY_CAPTIONS = 0.1
HELD_OUT = 64  # of each bucket at most, and an eighth of it
TEXT_WIDTH = 128

# Share of the steps given to each bucket, at the start and from half way on; between, they change in a line. Small
# sizes teach words and colours fast; that a sun stays one at 1024 rows, and how a ridge runs, only that size does.
SHARES = {
    "256x256": (0.70, 0.05),
    "512x512": (0.16, 0.25),
    "512x256": (0.03, 0.03),
    "256x384": (0.03, 0.03),
    "1024x1024": (0.08, 0.52),
    "1024x512": (0.0, 0.06),
    "2048x2048": (0.0, 0.05),
    "4096x4096": (0.0, 0.01),
}


class Painter(nn.Module):
    """Text encoder and transformer as one module, so that they share an optimiser and an average."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                query_pre_attn_scalar=32,
                max_position_embeddings=512,
                sliding_window=512,
                use_cache=False,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                attn_implementation="eager",
            )
        )
        self.transformer = SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=6,
            attention_head_dim=32,
            num_layers=7,
            num_cross_attention_heads=6,
            cross_attention_head_dim=32,
            cross_attention_dim=192,
            caption_channels=TEXT_WIDTH,
            mlp_ratio=2.5,
            attention_bias=False,
            sample_size=32,
            patch_size=1,
            interpolation_scale=1.0,
            qk_norm="rms_norm_across_heads",
        )
        nn.init.zeros_(self.transformer.proj_out.weight)
        self._let_words_through()

    @torch.no_grad()
    def _let_words_through(self) -> None:
        """Start the text encoder as little more than its word embeddings.

        Gemma's norms give every sublayer's output unit size, four times that of a fresh embedding: the words drown in
        what all share, and the projection of the captions collapses onto one direction before it has learnt any.
        """
        nn.init.normal_(self.text_encoder.embed_tokens.weight, std=TEXT_WIDTH**-0.5)
        for layer in self.text_encoder.layers:
            # These norms scale by one plus their weight.
            layer.post_attention_layernorm.weight.fill_(-0.85)
            layer.post_feedforward_layernorm.weight.fill_(-0.85)
        nn.init.zeros_(self.transformer.caption_projection.linear_1.bias)
        nn.init.zeros_(self.transformer.caption_projection.linear_2.bias)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        text = self.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return self.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class Batch:
    latents: Tensor
    tokens: Tensor
    mask: Tensor


class CaptionedLatents:
    """What is on disk of one bucket, with the first pictures held out."""

    def __init__(self, folder: Path, bucket: Bucket, tokenizer: PreTrainedTokenizerFast) -> None:
        self.bucket = bucket
        self.files = LatentFiles(folder, bucket)
        self.tokenizer = tokenizer
        self.latents, self.captions = self.files.read()

    def refresh(self) -> None:
        if self.files.count() > len(self.captions):
            self.latents, self.captions = self.files.read()

    @property
    def kept_back(self) -> int:
        return min(HELD_OUT, len(self.captions) // 8)

    @property
    def ready(self) -> bool:
        return self.kept_back > 0

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        picked = rng.integers(self.kept_back, len(self.captions), count)
        texts = [
            "" if rng.random() < EMPTY_CAPTIONS else self.captions[i][rng.integers(len(self.captions[i]))]
            for i in picked
        ]
        return self._batch(self.latents[np.sort(picked)][np.argsort(np.argsort(picked))], texts)

    def held_out(self, count: int) -> Batch:
        count = min(count, self.kept_back)
        return self._batch(self.latents[:count], [lines[0] for lines in self.captions[:count]])

    def _batch(self, latents: NDArray[np.float16], texts: Sequence[str]) -> Batch:
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=96, return_tensors="pt")
        return Batch(torch.from_numpy(latents.astype(np.float32)), encoded.input_ids, encoded.attention_mask)


def sample_sigma(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Logit-normal and shifted; stratified, so that a small batch sees all of the way from noise to picture.

    The larger the picture, the more noise it takes to hide its layout: with one shift for all sizes, only 3 % of the
    samples at 1024 rows teach where the sun goes, and suns multiply. So the shift grows with the number of tokens.
    """
    shift = SMALLEST_SHIFT * (tokens / 64) ** 0.4
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    plain = torch.special.ndtri((strata / count).clamp(1e-4, 1 - 1e-4)).sigmoid()
    return shift * plain / (1 + (shift - 1) * plain)


def flow_loss(model: Painter, batch: Batch, generator: torch.Generator, device: torch.device) -> Tensor:
    sigma = sample_sigma(len(batch.latents), batch.latents[0, 0].numel(), generator).to(device)
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    latents = batch.latents.to(device)
    share = sigma.view(-1, 1, 1, 1)
    output = model(latents + share * (noise - latents), sigma, batch.tokens.to(device), batch.mask.to(device))
    return (output.float() - (noise - latents)).square().mean()


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(sample_captions(40_000, seed=5)).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class TransformerTraining:
    """Models, average, optimiser and step, saved and resumed together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.tokenizer = load_or_build_tokenizer(options.work / "tokenizer")
        self.sets = [CaptionedLatents(options.work, bucket, self.tokenizer) for bucket, _ in PLAN]
        self.checkpoint = options.work / "painter.pt"
        self.step = 0
        torch.manual_seed(1)
        self.model = Painter(self.tokenizer).to(self.device)
        self.average = Average(self.model, horizon=options.horizon)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.98),
            fused=True,
        )
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.device, self.model, self.average, self.optimiser)
        self.rng = np.random.default_rng((6, self.step))
        self.parameters = list(self.model.parameters())
        self.pool = ThreadPoolExecutor(options.workers)
        self.stopping = False

    def save(self) -> None:
        save_checkpoint(self.checkpoint, self.step, self.model, self.average, self.optimiser)

    def stop(self, *_: object) -> None:
        self.stopping = True

    def _choose(self) -> CaptionedLatents:
        done = min(2 * self.step / self.options.steps, 1.0)
        ready = [files for files in self.sets if files.ready]
        shares = np.array([(1 - done) * SHARES[f.bucket.name][0] + done * SHARES[f.bucket.name][1] for f in ready])
        return ready[int(self.rng.choice(len(ready), p=shares / shares.sum()))]

    @torch.no_grad()
    def report(self) -> None:
        for files in self.sets:
            if files.ready and files.bucket.width == files.bucket.height and files.bucket.width <= 1024:
                batch = files.held_out(max(8, 64 * 64 // files.bucket.tokens))
                generator = torch.Generator().manual_seed(8)
                loss = float(flow_loss(self.average.model, batch, generator, self.device))
                print(f"step {self.step:6d}  held-out loss {files.bucket.name}: {loss:.4f}", flush=True)

    def run(self) -> None:
        options = self.options
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        print(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters", flush=True)
        began, started, losses = time.monotonic(), time.process_time(), []
        while self.step < options.steps and not self.stopping and time.monotonic() - began < 60 * options.minutes:
            if self.step % 100 == 0:
                for files in self.sets:
                    files.refresh()
            losses.append(self._step(self._choose()))
            self.step += 1
            if self.step % 25 == 0:
                spent = time.process_time() - started
                print(f"step {self.step:6d}  loss {np.mean(losses):.4f}  {spent:.0f} s of processor", flush=True)
                losses = []
            if self.step % 200 == 0:
                self.report()
                self.save()
        self.report()
        self.save()

    def _gradients(self, batch: Batch, seed: int) -> tuple[float, tuple[Tensor, ...]]:
        with autocast(self.device, self.options.precision):
            loss = flow_loss(self.model, batch, torch.Generator().manual_seed(seed), self.device)
        return float(loss.detach()), torch.autograd.grad(loss, self.parameters, materialize_grads=True)

    def _step(self, files: CaptionedLatents) -> float:
        """One step on a batch for each worker.

        A worker is a thread whose operations are not themselves parallel: on a machine that is busy with other work, an
        operation split over the cores waits each time for the part that has lost its core, and a whole batch does not.
        """
        options = self.options
        for group in self.optimiser.param_groups:
            group["lr"] = plateau(self.step, options.steps, options.rate, warmup=100)
        size = max(1, options.tokens // files.bucket.tokens)
        batches = [files.draw(size, self.rng) for _ in range(options.workers)]
        seeds = [int(seed) for seed in self.rng.integers(2**31, size=options.workers)]
        losses, gradients = zip(*self.pool.map(self._gradients, batches, seeds), strict=True)
        for parameter, *parts in zip(self.parameters, *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0) if len(parts) > 1 else parts[0]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.average.update(self.model)
        return float(np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that holds latents; checkpoints go there")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--tokens", type=int, default=1024, help="of latent, in one worker's batch")
    parser.add_argument("--workers", type=int, default=2, help="on a CPU as many as cores, on a GPU 1")
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--horizon", type=int, default=500, help="of the running average, in steps")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    # On a CPU the fused kernel's backward is slower than plain products where keys are as few as words; the switch is
    # named after CUDA, and every device heeds it.
    torch.backends.cuda.enable_flash_sdp(pick_device(options.device).type == "cuda")
    if options.workers > 1:
        torch.set_num_threads(1)
    TransformerTraining(options).run()


if __name__ == "__main__":
    main()
