"""Train the autoencoder: an `AutoencoderDC` that starts at the linear solution and learns what that cannot hold.

Encoder and decoder learn together for `--encoder-steps`; then the encoder is fixed, so that the transformer can start
on its latents, and the decoder goes on alone. Half of all latents get a little noise, as the decoder will meet them.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor, nn

from training.linear_start import PatchPCA, fit_components, write_components
from training.schedule import Average, autocast, learning_rate, load_checkpoint, pick_device, save_checkpoint

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "decoder_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
    "encoder_block_out_channels": (8, 16, 32, 64, 128, 128),
    # Wider than the encoder where the map is large: that is where edges are drawn, and it costs few weights.
    "decoder_block_out_channels": (8, 32, 64, 64, 128, 128),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 2, 3, 2, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), (), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (), (5,), (5,)),
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "Conv",
    "scaling_factor": 1.0,
}
# Between plain and whitened components: strong channels stay stronger, so sampling settles the layout first, while the
# weak ones keep enough variance for a small transformer to clean them.
WHITENING = 0.5
LATENT_NOISE = 0.2  # of the latents' size, at most


def as_floats(windows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes to [-1, 1]."""
    return windows.astype(np.float32) / np.float32(127.5) - np.float32(1)


def linear_autoencoder(windows: NDArray[np.uint8]) -> AutoencoderDC:
    """A new autoencoder that already computes the best linear chain for these windows."""
    model = AutoencoderDC(**CONFIG)
    pictures = as_floats(windows)
    write_components(model, fit_components(pictures, CONFIG["encoder_block_out_channels"][1:], 32, WHITENING))
    return model


def crops(windows: NDArray[np.uint8], batch: int, side: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless batches of crops, mirrored half of the time."""
    room = windows.shape[-1] - side
    while True:
        picked = rng.integers(len(windows), size=batch)
        corners = rng.integers(0, room + 1, (batch, 2))
        cut = np.stack([windows[n, :, y : y + side, x : x + side] for n, (y, x) in zip(picked, corners, strict=True)])
        if rng.random() < 0.5:
            cut = cut[..., ::-1]
        yield torch.from_numpy(np.ascontiguousarray(as_floats(cut)))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, most of all where the target is steep, absolute error, and absolute error of the gradients.

    Plain squared error spends half of itself on the steepest 5 % of pixels already; the weight, up to three times as
    much there, makes that four fifths. Both are [N, 3, H, W].
    """
    error = output - target
    steep = torch.zeros_like(target[:, :1])
    steep[..., :, 1:] += target.diff(dim=-1).abs().amax(dim=1, keepdim=True)
    steep[..., 1:, :] += target.diff(dim=-2).abs().amax(dim=1, keepdim=True)
    weight = 1 + 2 * (steep * 4).clamp(max=1)
    gradients = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return 0.5 * error.abs().mean() + 20 * (weight * error.square()).mean() + 0.5 * gradients


def decibels(mean_square: float, reach: float = 2.0) -> float:
    return 10 * math.log10(reach**2 / max(mean_square, 1e-12))


def edge_mask(pictures: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The steepest 5 % of pixels."""
    steep = np.abs(np.gradient(pictures, axis=-1)).max(axis=1) + np.abs(np.gradient(pictures, axis=-2)).max(axis=1)
    return steep >= np.quantile(steep, 0.95)


def fidelity(output: NDArray[np.float32], pictures: NDArray[np.float32]) -> tuple[float, float]:
    """PSNR over all pixels and over the steepest ones."""
    square = np.square(np.clip(output, -1, 1) - pictures).mean(axis=1)
    return decibels(float(square.mean())), decibels(float(square[edge_mask(pictures)].mean()))


@torch.no_grad()
def reconstruct(model: AutoencoderDC, pictures: NDArray[np.float32], batch: int = 8) -> NDArray[np.float32]:
    device = next(model.parameters()).device
    parts = [
        model.decoder(model.encoder(torch.from_numpy(pictures[i : i + batch]).to(device))).cpu().numpy()
        for i in range(0, len(pictures), batch)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def latent_scale(model: AutoencoderDC, windows: NDArray[np.uint8]) -> float:
    """The factor that brings latents to unit mean square."""
    device = next(model.parameters()).device
    latents = model.encoder(torch.from_numpy(as_floats(windows)).to(device))
    return float(latents.square().mean().rsqrt())


def save_autoencoder(model: AutoencoderDC, windows: NDArray[np.uint8], folder: Path) -> None:
    model.register_to_config(scaling_factor=round(latent_scale(model, windows), 5))
    model.save_pretrained(folder)


class AutoencoderTraining:
    """The model, its running average and its optimiser, which are saved and resumed together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.windows = np.load(options.work / "windows.npy", mmap_mode="r")
        self.held_out = np.load(options.work / "windows-held-out.npy")
        self.checkpoint = options.work / "autoencoder.pt"
        self.step = 0
        torch.manual_seed(0)
        self.model = AutoencoderDC(**CONFIG)
        if not self.checkpoint.exists():
            self.model = linear_autoencoder(self.windows[:1200])
        self.model.to(self.device)
        self.average = Average(self.model, horizon=600)
        last = {
            id(p) for module in (self.model.decoder.norm_out, self.model.decoder.conv_out) for p in module.parameters()
        }
        gates = {id(p) for n, p in self.model.named_parameters() if ".norm" in n and id(p) not in last}
        encoder = [p for p in self.model.encoder.parameters() if id(p) not in gates]
        decoder = [p for p in self.model.decoder.parameters() if id(p) not in gates | last]
        groups: list[dict[str, Any]] = [
            {"params": encoder, "share": 0.5},
            {"params": decoder},
            # Residual branches end in these norms, which start at zero: nothing is learnt before they open.
            {"params": [p for p in self.model.parameters() if id(p) in gates], "share": 3.0},
            # These see the lifted channels: each of their weights moves the brightness of everything.
            {"params": [p for p in self.model.parameters() if id(p) in last], "share": 0.2},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.device, self.model, self.average, self.optimiser)
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def save(self) -> None:
        save_checkpoint(self.checkpoint, self.step, self.model, self.average, self.optimiser)

    def report(self, name: str, model: AutoencoderDC) -> None:
        pictures = as_floats(self.held_out)
        whole, edges = fidelity(reconstruct(model, pictures), pictures)
        print(f"step {self.step:6d}  {name:8s} {whole:.2f} dB, edges {edges:.2f} dB", flush=True)

    def report_linear(self) -> None:
        pictures = as_floats(self.held_out)
        pca = PatchPCA.fit(as_floats(self.windows[:1000]), keep=32)
        whole, edges = fidelity(pca.reconstruct(pictures), pictures)
        print(f"32 principal components of 32x32 patches: {whole:.2f} dB, edges {edges:.2f} dB", flush=True)

    def fix_encoder(self) -> None:
        """From here on the encoder is its average, and everybody may build on its latents."""
        self.model.encoder.load_state_dict(self.average.model.encoder.state_dict())
        self.model.encoder.requires_grad_(False)

    def run(self) -> None:
        options = self.options
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        if self.step == 0:
            self.report_linear()
            self.report("linear", self.model)
        batches = crops(self.windows, options.batch, options.side, np.random.default_rng((3, self.step)))
        fixed_folder = options.work / "autoencoder-fixed-encoder"
        started, spent = time.monotonic(), time.process_time()
        if self.step >= options.encoder_steps:
            self.fix_encoder()
        while self.step < options.steps and not self.stopping and time.monotonic() - started < 60 * options.minutes:
            if self.step == options.encoder_steps:
                self.fix_encoder()
                save_autoencoder(self.average.model, self.held_out, fixed_folder)
                print(f"step {self.step:6d}  encoder fixed", flush=True)
            for group in self.optimiser.param_groups:
                group["lr"] = group.get("share", 1.0) * learning_rate(
                    self.step, options.steps, options.rate, warmup=200
                )
            loss = self._step(next(batches).to(self.device))
            self.step += 1
            if self.step % 50 == 0:
                seconds = time.process_time() - spent
                print(f"step {self.step:6d}  loss {loss:.5f}  {seconds:.0f} s of processor", flush=True)
            if self.step % 200 == 0:
                self.report("average", self.average.model)
                self.save()
                save_autoencoder(self.average.model, self.held_out, options.work / "autoencoder")
        self.report("average", self.average.model)
        self.save()
        save_autoencoder(self.average.model, self.held_out, options.work / "autoencoder")

    def _step(self, pictures: Tensor) -> float:
        with autocast(self.device, self.options.precision):
            latents = self.model.encoder(pictures)
        latents = latents.float()
        # Half of the pictures keep clean latents: they are the ones the figures are made with. While the encoder still
        # learns, the noise also keeps it from hiding what matters in small differences.
        strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=self.device)
        strength[: len(latents) // 2] = 0
        latents = latents + torch.randn_like(latents) * strength * latents.detach().std()
        with autocast(self.device, self.options.precision):
            output = self.model.decoder(latents)
        loss = reconstruction_loss(output.float(), pictures)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 0.5)
        self.optimiser.step()
        self.average.update(self.model)
        return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the windows; checkpoints go there")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--encoder-steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--rate", type=float, default=2.5e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    torch.set_flush_denormal(True)
    AutoencoderTraining(parser.parse_args()).run()


if __name__ == "__main__":
    main()
