"""How fast handscroll is on this machine, beside the same modules run whole: the short form of what bench/ measures.

Each component is loaded once, whole, and run both ways in turns: by handscroll and by the library that defines it. So
what differs is the way alone. Inputs are noise, which takes as long as any picture.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handscroll.banded.autoencoder import decode_rows
from handscroll.banded.transformer import Branch, predict
from handscroll.errors import UsageError
from handscroll.events import OnEvent, Progress, ignore
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import on_fetch, open_checkpoint
from handscroll.plan.precision import BYTES, resolve_precision
from handscroll.plan.stages import DECODE, DENOISE, TEXT
from handscroll.runtime.device import find_hardware
from handscroll.runtime.memory import Meter, release, trim
from handscroll.runtime.modules import Component, load_module, load_tokenizer
from handscroll.runtime.text import encode_prompt, instruction_of
from handscroll.system import available_bytes, processor_name, resident_bytes
from handscroll.units import gibibytes
from handscroll.weights.dtypes import DTYPES

PROMPT = "snowy mountains at dusk, a red sun over a quiet lake"
PROMPT_TOKENS, NEGATIVE_TOKENS = 100, 1  # of the noise that stands for prompts in a denoising step
TIMESTEP = 500.0
RATE_SECONDS = 1.0
ROUNDS = 3
STAGE_SECONDS = 10.0  # after which no further round begins
WARM_UP_SIDE = 2  # of a latent
# What a whole decode holds for each element of its widest map, and a whole step for each of its Mix-FFN's hidden ones;
# in half precision less at a time, but norms and attentions are made in fp32. Of f32c32-sana and Sana 0.6B and 1.6B.
DECODER_ELEMENT_BYTES, TRANSFORMER_ELEMENT_BYTES = 19, 11
MIB = 2**20


@dataclass(frozen=True)
class Way:
    """What a stage took one way: medians of all rounds. `peak_bytes` is above what was held with the model loaded."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class StageResult:
    """A stage both ways. Ratios are handscroll's over the whole way's, each taken within a round, then their median.

    `max_difference` is the largest between the two results. What is None was not measured; `note` says why.
    """

    stage: str
    handscroll: Way | None = None
    whole: Way | None = None
    seconds_over_whole: float | None = None
    peak_bytes_over_whole: float | None = None
    max_difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """All that was measured. Sizes in pixels; rates are the best of this device, in the decoder's and the transformer's
    precision, 1e9 operations a second."""

    model: str
    width: int
    height: int
    precision: str
    device: str
    processor: str
    threads: int
    torch: str
    convolution_gflops: float
    matrix_gflops: float
    stages: tuple[StageResult, ...]

    @property
    def decode_seconds_per_megapixel(self) -> float | None:
        decoding = self.stages[-1].handscroll
        return None if decoding is None else decoding.seconds / (self.width * self.height / 1e6)

    @property
    def decode_bytes_per_pixel(self) -> float | None:
        decoding = self.stages[-1].handscroll
        return None if decoding is None else decoding.peak_bytes / (self.width * self.height)

    def as_dict(self) -> dict[str, Any]:
        """The object of `handscroll bench --json`."""
        return {
            **asdict(self),
            "decode_seconds_per_megapixel": self.decode_seconds_per_megapixel,
            "decode_bytes_per_pixel": self.decode_bytes_per_pixel,
        }


def measure(
    model: str,
    *,
    revision: str | None = None,
    width: int | None = None,
    height: int | None = None,
    precision: str = "auto",
    device: str = "auto",
    on_event: OnEvent = ignore,
) -> Benchmark:
    """Measures text encoding, one denoising step under guidance, and decoding, both ways each.

    model, revision, precision and device as in a `Request`; width and height in pixels, by default the model's,
    rounded up to what its latent holds. A stage whose model does not fit into memory is left out, and so is the whole
    way where it would not. Raises HandscrollError.
    """
    spec = open_checkpoint(model, revision, on_progress=on_fetch(on_event))
    hardware = find_hardware(device)
    precisions = resolve_precision(spec, precision, hardware.device, hardware.bf16_is_faster)
    if not precisions.exact:
        raise UsageError("quantised weights are not measured by bench yet; use fp32, bf16 or fp16 and plain weights")
    factor = spec.autoencoder.spatial_compression_ratio * spec.transformer.patch_size
    columns, rows = (-(-(side or spec.native_px) // factor) for side in (width, height))
    device = hardware.device
    bench = _Bench(spec, device, rows * spec.transformer.patch_size, columns * spec.transformer.patch_size, on_event)
    decoding, transforming = DTYPES[precisions.autoencoder], DTYPES[precisions.transformer]
    with torch.inference_mode():
        stages = (
            bench.text(precisions.text_encoder),
            bench.denoise(precisions.transformer),
            bench.decode(precisions.autoencoder),
        )
        return Benchmark(
            model=spec.name,
            width=columns * factor,
            height=rows * factor,
            precision=str(precisions),
            device=device,
            processor=_processor(device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            convolution_gflops=convolution_rate(decoding, device),
            matrix_gflops=matrix_rate(transforming, device),
            stages=stages,
        )


# The stages


class _Bench:
    """One checkpoint at one size; `rows` and `columns` are the latent's."""

    def __init__(self, spec: CheckpointSpec, device: str, rows: int, columns: int, on_event: OnEvent) -> None:
        self.spec, self.device, self.rows, self.columns, self.on_event = spec, device, rows, columns, on_event

    def text(self, precision: str) -> StageResult:
        """One prompt: without padding, and padded as the pipelines of diffusers do it."""
        spec, instruction = self.spec, instruction_of(self.spec)
        weights_bytes = spec.text_encoder.parameter_count * BYTES[precision]
        if why := self._why_not(weights_bytes):
            return StageResult(TEXT.name, note=why)
        encoder = self._load("text_encoder", precision)
        tokenizer = load_tokenizer(spec)

        def whole(prompt: str) -> Tensor:
            from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

            pipeline: Any = SanaPipeline(tokenizer, encoder, None, None, None)
            embeddings, mask, _, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                device=torch.device(self.device),
                max_sequence_length=spec.max_prompt_tokens,
                complex_human_instruction=[instruction] if instruction else None,
            )
            return embeddings[:, mask[0].bool()]

        return self._both_ways(
            TEXT.name,
            lambda prompt: encode_prompt(spec, encoder, tokenizer, prompt, instruction).embeddings,
            whole,
            PROMPT,
            "a",
        )

    def denoise(self, precision: str) -> StageResult:
        """One step: with and without the prompt, or once for a model that takes its guidance as an input."""
        spec = self.spec.transformer
        branches = 1 if self.spec.is_sprint or self.spec.default_guidance <= 1 else 2
        weights_bytes = spec.parameter_count * BYTES[precision]
        if why := self._why_not(weights_bytes):
            return StageResult(DENOISE.name, note=why)
        transformer = self._load("transformer", precision)
        lengths = [PROMPT_TOKENS, NEGATIVE_TOKENS][:branches]
        padded = max(self.spec.max_prompt_tokens, PROMPT_TOKENS)
        texts = self._noise(precision, branches, padded, spec.caption_channels)
        mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
        mask = mask.to(self.device, texts.dtype)
        timestep = torch.full((1,), TIMESTEP, device=self.device)
        guidance = torch.ones(1, device=self.device).to(texts.dtype) if spec.guidance_embeds else None

        def ours(latent: Tensor) -> Tensor:
            given = [
                Branch(latent, texts[index : index + 1, :length], None, timestep, guidance)
                for index, length in enumerate(lengths)
            ]
            return torch.cat(predict(transformer, given, lay_out=self.device == "cpu"))

        def whole(latent: Tensor) -> Tensor:
            return transformer(
                latent.expand(branches, -1, -1, -1),
                encoder_hidden_states=texts,
                encoder_attention_mask=mask,
                timestep=timestep.expand(branches),
                guidance=guidance,
                return_dict=False,
            )[0]

        positions = self.rows * self.columns // spec.patch_size**2
        whole_bytes = TRANSFORMER_ELEMENT_BYTES * 2 * spec.hidden_channels * positions * branches
        small = max(WARM_UP_SIDE, spec.patch_size)
        given = self._noise(precision, 1, spec.in_channels, self.rows, self.columns)
        warm_up = self._noise(precision, 1, spec.in_channels, small, small)
        return self._both_ways(DENOISE.name, ours, whole, given, warm_up, whole_bytes)

    def decode(self, precision: str) -> StageResult:
        """Latent to pixels, which stay in memory both ways."""
        spec = self.spec.autoencoder
        if why := self._why_not(spec.decoder_parameter_count * BYTES[precision]):
            return StageResult(DECODE.name, note=why)
        autoencoder = self._load("vae", precision, part="decoder")
        ratio = spec.spatial_compression_ratio

        def ours(latent: Tensor) -> Tensor:
            picture = latent.new_empty(1, 3, latent.shape[2] * ratio, latent.shape[3] * ratio)
            top = 0
            for row_block in decode_rows(autoencoder.decoder, latent, on_sweep=lambda done, of: trim()):
                picture[:, :, top : top + row_block.shape[2]] = row_block
                top += row_block.shape[2]
            return picture

        def whole(latent: Tensor) -> Tensor:
            return autoencoder.decode(latent, return_dict=False)[0]

        pixels = self.rows * self.columns * ratio**2
        widest = max(channels / 4**index for index, channels in enumerate(spec.decoder_block_out_channels))
        given = self._noise(precision, 1, spec.latent_channels, self.rows, self.columns)
        warm_up = self._noise(precision, 1, spec.latent_channels, WARM_UP_SIDE, WARM_UP_SIDE)
        whole_bytes = round(DECODER_ELEMENT_BYTES * widest * pixels)
        return self._both_ways(DECODE.name, ours, whole, given, warm_up, whole_bytes)

    def _noise(self, precision: str, *shape: int) -> Tensor:
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        return noise.to(self.device, DTYPES[precision])

    def _load(self, component: Component, precision: str, **options: Any) -> Any:
        return load_module(self.spec, component, dtype=DTYPES[precision], device=self.device, **options)

    def _why_not(self, n_bytes: int) -> str:
        """Why something that takes so many bytes is left out; empty where there is room for it."""
        on_cuda = self.device.startswith("cuda")
        room_bytes = torch.cuda.mem_get_info(self.device)[0] if on_cuda else available_bytes()
        if room_bytes is None or n_bytes <= 0.9 * room_bytes:
            return ""
        return f"needs about {gibibytes(n_bytes)}, and {gibibytes(room_bytes)} are free"

    def _both_ways(
        self,
        stage: str,
        ours: Callable[[Any], Tensor],
        whole: Callable[[Any], Tensor],
        given: Any,
        small: Any,
        whole_bytes: int = 0,
    ) -> StageResult:
        """Runs both ways in turns, after a small run of each. whole_bytes: about what the whole way will take."""
        left_out = self._why_not(whole_bytes)
        ways = {"handscroll": ours} if left_out else {"handscroll": ours, "whole": whole}
        rounds: list[dict[str, Way]] = []
        results: dict[str, Tensor] = {}
        for way in ways.values():
            way(given if self.device != "cpu" else small)  # a device chooses its kernels by the size
        release(self.device)
        begun = time.perf_counter()
        while len(rounds) < ROUNDS and (not rounds or time.perf_counter() - begun < STAGE_SECONDS):
            self.on_event(Progress(stage, len(rounds), ROUNDS))
            this_round = {}
            for name, way in ways.items():
                results.pop(name, None)
                this_round[name], results[name] = self._run(way, given)
            rounds.append(this_round)
        self.on_event(Progress(stage, ROUNDS, ROUNDS))
        medians = {
            name: Way(_median(rounds, name, "seconds"), int(_median(rounds, name, "peak_bytes"))) for name in ways
        }
        if left_out:
            return StageResult(stage, medians["handscroll"], note=f"whole {left_out}")
        ratios = {
            key: [getattr(each["handscroll"], key) / max(1e-9, getattr(each["whole"], key)) for each in rounds]
            for key in ("seconds", "peak_bytes")
        }
        difference = (results["handscroll"].float() - results["whole"].float()).abs().max().item()
        return StageResult(
            stage,
            medians["handscroll"],
            medians["whole"],
            statistics.median(ratios["seconds"]),
            # Of maps below a few MiB nothing can be told: the heap had room for them.
            statistics.median(ratios["peak_bytes"]) if medians["whole"].peak_bytes > 4 * MIB else None,
            difference,
        )

    def _run(self, way: Callable[[Any], Tensor], given: Any) -> tuple[Way, Tensor]:
        on_cuda = self.device.startswith("cuda")
        if on_cuda:
            torch.cuda.empty_cache()
        trim()
        held_bytes = (torch.cuda.memory_reserved(self.device) if on_cuda else resident_bytes()) or 0
        meter = Meter(self.device)
        with meter.stage("run"):
            result = way(given)
        return Way(meter.seconds["run"], max(0, meter.stage_peak_bytes.get("run", 0) - held_bytes)), result


def _median(rounds: list[dict[str, Way]], name: str, key: str) -> float:
    return statistics.median(getattr(each[name], key) for each in rounds)


# The device


def convolution_rate(dtype: torch.dtype, device: str) -> float:
    """Of a 3x3 convolution of 128 channels, channels last, as most of a decode is; 1e9 operations a second."""
    side = 256 if device == "cpu" else 1024
    like: Any = {"dtype": dtype, "device": device}
    image = torch.ones(1, 128, side, side, **like).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(128, 128, 3, 3, **like).contiguous(memory_format=torch.channels_last)
    return best_gflops(lambda: F.conv2d(image, weight, padding=1), 2 * 9 * 128 * 128 * side * side, device)


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Of a product of square matrices; 1e9 operations a second."""
    side = 2048 if device == "cpu" else 8192
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return best_gflops(lambda: torch.mm(left, right), 2 * side**3, device)


def best_gflops(run: Callable[[], object], flop: int, device: str) -> float:
    best = float("inf")
    until = None
    while until is None or time.perf_counter() < until:
        begun = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if until is None:  # the first does not count
            until = time.perf_counter() + RATE_SECONDS
            continue
        best = min(best, time.perf_counter() - begun)
    gc.collect()
    return flop / best / 1e9


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"
