"""Train the transformer and its text encoder together, by flow matching as Sana does.

x_sigma = (1 - sigma) * latent + sigma * noise, and the model predicts noise - latent from x_sigma, sigma * 1000 and the
caption. sigma is logit-normal, shifted towards noise as the sampler's steps are, more so for larger pictures.

Most of that loss is texture that nothing could predict, and what a word asks for is little of it: a boat is ten of a
thousand tokens. Left alone, the projection of the captions keeps the few words that change whole skies and loses the
others. And where a sun may stand at three places, small errors make three suns. So three small heads, which do not
ship, are asked beside it: one what the caption says, from its projected tokens; one what the scene holds, and one where
it is, from half way up the transformer. Errors at small things weigh more, which prefers their presence where it is
open, so that weight fades as the rate falls.
"""

from __future__ import annotations

import argparse
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from training.captions import build_tokenizer, sample_captions
from training.claims import ATTRIBUTES, claims
from training.latents import PLAN, LatentFiles
from training.schedule import (
    Average,
    add_step_options,
    autocast,
    load_checkpoint,
    pick_device,
    plateau,
    prepare_process,
    save_checkpoint,
    set_gradients,
    shifted,
)
from training.scorer import answers, loss_of
from training.world import PLACED, Box, Scene, places

SMALLEST_SHIFT = 3.0  # at 256x256
FLOW_SHIFT = 6.0  # of the sampler, for about 1024x1024
EMPTY_CAPTIONS = 0.1
HELD_OUT = 64  # of each bucket at most, and an eighth of it
TEXT_WIDTH = 128
HEADS, HEAD_WIDTH, BLOCKS = 6, 32, 7
READ_AFTER = 4  # blocks
SAVE_STEPS, REPORT_STEPS = 200, 600
READING_WEIGHT = 0.5  # of the cross entropy of what the scene holds and the caption says, beside the flow loss
PLACING_WEIGHT = 0.1  # of the divergence of where things are
ACTIVITY_WEIGHT = 1e-3  # of the mean square of what the blocks give
EMPHASIS = 1.0  # what an error at a small thing costs more than one elsewhere
SMALL = [PLACED.index("subject"), PLACED.index("island")]

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


class SceneReader(nn.Module):
    """Tokens [N, height * width, C] of the transformer to the logits of every attribute's labels, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.squeeze = nn.Linear(channels, 16)
        labels = sum(len(attribute.labels) for attribute in ATTRIBUTES)
        self.head = nn.Sequential(nn.Linear(2 * channels + 16 * 64, 256), nn.ReLU(), nn.Linear(256, labels))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        tokens = self.norm(tokens)
        placed = self.squeeze(tokens).transpose(1, 2).unflatten(2, (height, width))
        whole = [tokens.mean(dim=1), tokens.amax(dim=1), F.adaptive_avg_pool2d(placed, 8).flatten(1)]
        return self.head(torch.cat(whole, dim=1))


class PlaceReader(nn.Module):
    """Tokens [N, height * width, C] of the transformer to logits [N, PLACED, height, width] of where each thing is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, len(PLACED))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        return self.head(self.norm(tokens)).transpose(1, 2).unflatten(2, (height, width))


class CaptionReader(nn.Module):
    """Projected caption tokens [N, T, C] to logits of what it claims: for each attribute its labels and "unsaid"."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, sum(len(attribute.labels) + 1 for attribute in ATTRIBUTES))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        # However small the projection's norm lets words become, they are read at full size; and one word is enough.
        logits = self.head(F.layer_norm(tokens, tokens.shape[-1:])).float()
        return logits.masked_fill(mask[..., None] == 0, -math.inf).logsumexp(dim=1)


@dataclass(frozen=True)
class Painted:
    """What a `Painter` says of noisy latents [N, 32, h, w]."""

    velocity: Tensor  # [N, 32, h, w]
    scene: Tensor  # logits of what the scene holds: [N, labels]
    where: Tensor  # logits of where each thing is, should it be there: [N, PLACED, h, w]
    caption: Tensor  # logits of what the caption claims: [N, labels + attributes]
    activity: Tensor  # mean square of what the blocks give, of any number


class Painter(nn.Module):
    """Text encoder, transformer and readers as one module, so that they share an optimiser and an average."""

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
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_WIDTH,
            num_layers=BLOCKS,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_WIDTH,
            cross_attention_dim=HEADS * HEAD_WIDTH,
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
        self.reader = SceneReader(HEADS * HEAD_WIDTH)
        self.caption_reader = CaptionReader(HEADS * HEAD_WIDTH)
        self.place_reader = PlaceReader(HEADS * HEAD_WIDTH)
        # Workers share the module, so what its parts gave is kept for each thread apart.
        self._words: dict[int, Tensor] = {}
        self._blocks: dict[int, list[Tensor]] = defaultdict(list)
        self.transformer.caption_norm.register_forward_hook(self._keep_words)
        for block in self.transformer.transformer_blocks:
            block.register_forward_hook(self._keep_block)

    def _keep_words(self, _norm: nn.Module, _inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
        self._words[threading.get_ident()] = tokens

    def _keep_block(self, _block: nn.Module, _inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
        self._blocks[threading.get_ident()].append(tokens)

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

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Painted:
        text = self.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        velocity = self.transformer(
            noisy,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        words, blocks = self._words.pop(threading.get_ident()), self._blocks.pop(threading.get_ident())
        return Painted(
            velocity,
            scene=self.reader(blocks[READ_AFTER - 1], *noisy.shape[2:]),
            where=self.place_reader(blocks[READ_AFTER - 1], *noisy.shape[2:]),
            caption=self.caption_reader(words, mask),
            activity=torch.stack([block.float().square().mean() for block in blocks]).mean(),
        )


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # as the files hold them: [N, 32, h, w], or with more to a picture
    tokens: Tensor
    mask: Tensor
    truths: Tensor  # the index of each attribute's answer, -1 where the picture shows none: [N, attributes]
    said: Tensor  # the same of those that the caption claims; of the others one more than the last index
    cover: Tensor  # how much of each token each thing covers: [N, PLACED, h, w]


def covered(boxes: Mapping[str, Box], height: int, width: int) -> NDArray[np.float32]:
    """How much of each of height x width tokens each thing's box covers, from 0 to 1: [PLACED, height, width]."""
    cover = np.zeros((len(PLACED), height, width), np.float32)
    ys, xs = np.arange(height), np.arange(width)
    for name, box in boxes.items():
        down = (np.minimum(box.bottom * height, ys + 1) - np.maximum(box.top * height, ys)).clip(0, 1)
        across = (np.minimum(box.right * width, xs + 1) - np.maximum(box.left * width, xs)).clip(0, 1)
        cover[PLACED.index(name)] = np.outer(down, across)
    return cover


class CaptionedLatents:
    """What is on disk of one bucket, with the first pictures held out."""

    def __init__(self, files: LatentFiles, tokenizer: PreTrainedTokenizerFast) -> None:
        self.bucket = files.bucket
        self.files = files
        self.tokenizer = tokenizer
        self.scenes: list[Scene] = []
        self._covers: dict[int, NDArray[np.float32]] = {}
        self._read()

    def _read(self) -> None:
        self.latents, self.captions = self.files.read()
        self.scenes += [self.files.scene(i) for i in range(len(self.scenes), len(self.captions))]

    def refresh(self) -> None:
        if self.files.count() > len(self.captions):
            self._read()

    @property
    def kept_back(self) -> int:
        return min(HELD_OUT, len(self.captions) // 8)

    @property
    def ready(self) -> bool:
        return self.kept_back > 0

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        picked = np.sort(rng.integers(self.kept_back, len(self.captions), count))
        texts = [
            "" if rng.random() < EMPTY_CAPTIONS else self.captions[i][rng.integers(len(self.captions[i]))]
            for i in picked
        ]
        return self._batch(picked, texts)

    def held_out(self, count: int) -> Batch:
        count = min(count, self.kept_back)
        return self._batch(np.arange(count), [lines[0] for lines in self.captions[:count]])

    def _batch(self, picked: NDArray[np.int64], texts: Sequence[str]) -> Batch:
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=96, return_tensors="pt")
        latents = torch.from_numpy(self.latents[picked].astype(np.float32))
        truths = torch.tensor([answers(self.scenes[i]) for i in picked])
        claimed = [claims(text) for text in texts]
        spoken = torch.tensor([[attribute.name in names for attribute in ATTRIBUTES] for names in claimed])
        said = torch.where(spoken, truths, torch.tensor([len(attribute.labels) for attribute in ATTRIBUTES]))
        cover = torch.from_numpy(np.stack([self._cover(i) for i in picked]))
        return Batch(latents, encoded.input_ids, encoded.attention_mask, truths, said, cover)

    def _cover(self, i: int) -> NDArray[np.float32]:
        """Found when first asked for: some scenes have to be painted, if only at 64 rows."""
        if i not in self._covers:
            boxes = places(self.scenes[i], self.bucket.width, self.bucket.height)
            self._covers[i] = covered(boxes, *self.files.shape[-2:])
        return self._covers[i]


def sample_sigma(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Logit-normal and shifted; stratified, so that a small batch sees all of the way from noise to picture.

    The larger the picture, the more noise it takes to hide its layout: with one shift for all sizes, only 3 % of the
    samples at 1024 rows teach where the sun goes, and suns multiply. So the shift grows with the number of tokens.
    """
    shift = SMALLEST_SHIFT * (tokens / 64) ** 0.4
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    plain = torch.special.ndtri((strata / count).clamp(1e-4, 1 - 1e-4)).sigmoid()
    return shifted(plain, shift)


class Noised(NamedTuple):
    """Where latents are on their way from noise to a picture, and the slope of that way."""

    latents: Tensor  # [N, 32, h, w]
    sigma: Tensor  # [N]
    slope: Tensor  # [N, 32, h, w]


Way = Callable[[Tensor, torch.Generator], Noised]


def from_noise(latents: Tensor, generator: torch.Generator) -> Noised:
    """The straight way from noise alone: flow matching as Sana's. Latents [N, 32, h, w]."""
    sigma = sample_sigma(len(latents), latents[0, 0].numel(), generator)
    noise = torch.randn(latents.shape, generator=generator)
    return Noised(torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1)), sigma, noise - latents)


class Losses(NamedTuple):
    """Of one batch. `total` is what is made smaller."""

    flow: Tensor
    reading: Tensor
    placing: Tensor
    hearing: Tensor
    activity: Tensor

    @property
    def total(self) -> Tensor:
        read = READING_WEIGHT * (self.reading + self.hearing) + PLACING_WEIGHT * self.placing
        return self.flow + read + ACTIVITY_WEIGHT * self.activity

    def __str__(self) -> str:
        named = ((name, float(value.detach())) for name, value in self._asdict().items())
        return ", ".join(f"{name} {value:.4f}" for name, value in named)


def placing_loss(where: Tensor, cover: Tensor) -> Tensor:
    """How far the distribution over tokens that the logits `where` stand for is from what each thing covers.

    Both are [N, PLACED, h, w]; what a picture does not show, or shows outside its edges, counts nothing. The
    Kullback-Leibler divergence in nats, 0 where the places are known.
    """
    shown = cover.sum(dim=(2, 3)) > 0
    if not shown.any():
        return where.sum() * 0
    target = cover[shown].flatten(1)
    target = target / target.sum(dim=1, keepdim=True)
    return F.kl_div(where[shown].flatten(1).log_softmax(dim=1), target, reduction="batchmean")


def losses(model: Painter, batch: Batch, noised: Noised, emphasis: float = 0.0) -> Losses:
    """The slope's mean square error, what each reader gets wrong, and the activity of the blocks.

    An error at a subject or an island counts `emphasis` times more than one elsewhere.
    """
    device = model.transformer.device
    noisy, sigma, slope = (tensor.to(device) for tensor in noised)
    painted = model(noisy, sigma, batch.tokens.to(device), batch.mask.to(device))
    cover = batch.cover.to(device)
    weight = 1 + emphasis * cover[:, SMALL].amax(dim=1, keepdim=True)
    flow = (weight * (painted.velocity.float() - slope).square()).mean()
    reading = loss_of(painted.scene.float(), batch.truths.to(device))
    hearing = loss_of(painted.caption.float(), batch.said.to(device), extra=1)
    placing = placing_loss(painted.where.float(), cover)
    return Losses(flow, reading, placing, hearing, painted.activity)


def begin_from(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Painter:
    """The text encoder and the transformer of a checkpoint folder, in float32, with new readers."""
    painter = Painter(tokenizer)
    painter.text_encoder.load_state_dict(Gemma2Model.from_pretrained(folder / "text_encoder").state_dict())
    transformer = SanaTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    painter.transformer.load_state_dict(transformer.state_dict())
    return painter


def load_average(checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> Painter:
    """The averaged weights of a training's checkpoint, readers and all."""
    painter = Painter(tokenizer)
    painter.load_state_dict(torch.load(checkpoint, map_location="cpu")["average"])
    return painter


def load_or_build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(sample_captions(40_000, seed=5)).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class TransformerTraining:
    """Models, average, optimiser and step, saved and resumed together."""

    checkpoint_name = "painter.pt"
    seed = 6

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = pick_device(options.device)
        self.tokenizer = self.load_tokenizer()
        self.sets = self.load_sets()
        if not any(files.ready for files in self.sets):
            raise SystemExit(f"{options.work} holds too few pictures; training/recipe.sh says how to make them")
        self.checkpoint = options.work / self.checkpoint_name
        self.step = 0
        torch.manual_seed(1)
        self.model = self.begin().to(self.device)
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
        self.rng = np.random.default_rng((self.seed, self.step))
        self.parameters = list(self.model.parameters())
        self.pool = ThreadPoolExecutor(options.workers)
        self.stopping = False

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return load_or_build_tokenizer(self.options.work / "tokenizer")

    def load_sets(self) -> list[CaptionedLatents]:
        return [CaptionedLatents(LatentFiles(self.options.work, bucket), self.tokenizer) for bucket, _ in PLAN]

    def begin(self) -> Painter:
        """What the first step starts from."""
        return Painter(self.tokenizer)

    def share(self, files: CaptionedLatents) -> float:
        """Of the steps, what goes to a bucket now."""
        done = min(2 * self.step / self.options.steps, 1.0)
        first, last = SHARES[files.bucket.name]
        return (1 - done) * first + done * last

    def ways(self, files: CaptionedLatents) -> dict[str, tuple[float, Way]]:
        """What there is to learn of a bucket: names, each with its share of the bucket's batches."""
        return {"": (1.0, from_noise)}

    def save(self) -> None:
        save_checkpoint(self.checkpoint, self.step, self.model, self.average, self.optimiser)

    def stop(self, *_: object) -> None:
        self.stopping = True

    def _choose(self) -> CaptionedLatents:
        ready = [files for files in self.sets if files.ready]
        shares = np.array([self.share(files) for files in ready])
        return ready[int(self.rng.choice(len(ready), p=shares / shares.sum()))]

    def _choose_way(self, files: CaptionedLatents) -> Way:
        shares, ways = zip(*self.ways(files).values(), strict=True)
        return ways[int(self.rng.choice(len(ways), p=shares))]

    @torch.no_grad()
    def report(self) -> None:
        for files in self.sets:
            if files.ready and files.bucket.width == files.bucket.height:
                batch = files.held_out(max(2, 64 * 64 // files.bucket.tokens))
                for name, (_, way) in self.ways(files).items():
                    made = losses(self.average.model, batch, way(batch.latents, torch.Generator().manual_seed(8)))
                    print(f"step {self.step:6d}  held-out loss {files.bucket.name}{name}: {made}", flush=True)

    def run(self) -> None:
        options = self.options
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        print(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters", flush=True)
        began, started = time.monotonic(), time.process_time()
        made: list[Losses] = []
        while self.step < options.steps and not self.stopping and time.monotonic() - began < 60 * options.minutes:
            if self.step % 100 == 0:
                for files in self.sets:
                    files.refresh()
            made += self._step(self._choose())
            self.step += 1
            if self.step % 25 == 0:
                spent = time.process_time() - started
                mean = Losses(*(torch.stack(parts).mean() for parts in zip(*made, strict=True)))
                print(f"step {self.step:6d}  {mean}  {spent:.0f} s of processor", flush=True)
                made = []
            if self.step % SAVE_STEPS == 0:
                self.save()
            if self.step % REPORT_STEPS == 0:
                self.report()
        self.report()
        self.save()

    def _gradients(self, batch: Batch, noised: Noised, emphasis: float) -> tuple[Losses, tuple[Tensor, ...]]:
        with autocast(self.device, self.options.precision):
            made = losses(self.model, batch, noised, emphasis)
        gradients = torch.autograd.grad(made.total, self.parameters, materialize_grads=True)
        return Losses(*(loss.detach() for loss in made)), gradients

    def _step(self, files: CaptionedLatents) -> list[Losses]:
        """One step on a batch for each worker, and each worker's losses.

        A worker is a thread whose operations are not themselves parallel: on a machine that is busy with other work, an
        operation split over the cores waits each time for the part that has lost its core, and a whole batch does not.
        """
        options = self.options
        rate = plateau(self.step, options.steps, options.rate, warmup=100, decay=options.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        size = max(1, options.tokens // files.bucket.tokens)
        batches = [files.draw(size, self.rng) for _ in range(options.workers)]
        way = self._choose_way(files)
        noised = [way(batch.latents, torch.Generator().manual_seed(int(self.rng.integers(2**31)))) for batch in batches]
        emphasis = [EMPHASIS * rate / options.rate] * options.workers
        made, gradients = zip(*self.pool.map(self._gradients, batches, noised, emphasis), strict=True)
        set_gradients(self.parameters, gradients)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.average.update(self.model)
        return list(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that holds latents; checkpoints go there")
    add_step_options(parser, steps=9000, rate=2.5e-3, decay=0.3, horizon=500, tokens="of latent, in one worker's batch")
    options = parser.parse_args()
    prepare_process(options)
    TransformerTraining(options).run()


if __name__ == "__main__":
    main()
