"""Write a checkpoint of an official model's true shape, with random weights, in the official layout.

    python bench/make_checkpoint.py /scratch/sana-1.6b-4k --model sana-1.6b-4k
    python bench/make_checkpoint.py /scratch/tiny --model sana-sprint-0.6b --miniature

Memory and speed depend on shapes and bytes, not on what the weights were trained for. Tensors go to disk one at a
time, so writing 8 GB takes a few hundred MB of memory. Every matrix has a standard deviation of 1/sqrt(fan-in), every
norm is the identity, and the same seed writes the same bytes; pictures made with such weights are noise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel, SCMScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from handscroll.models.autoencoder import F32C32_SANA, AutoencoderSpec
from handscroll.models.registry import BY_NAME
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec

SANA_06B = TransformerSpec(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
SANA_16B = TransformerSpec()
NORMED = "rms_norm_across_heads"

# Short name -> transformer. sample_size is the latent's side at the native size.
TRANSFORMERS: dict[str, TransformerSpec] = {
    "sana-0.6b-512": replace(SANA_06B, sample_size=16),
    "sana-0.6b": SANA_06B,
    "sana-1.6b-512": replace(SANA_16B, sample_size=16),
    "sana-1.6b": SANA_16B,
    "sana-1.6b-2k": replace(SANA_16B, sample_size=64, interpolation_scale=1.0),
    "sana-1.6b-4k": replace(SANA_16B, sample_size=128, interpolation_scale=2.0),
    "sana-1.5-1.6b": replace(SANA_16B, qk_norm=NORMED),
    "sana-1.5-4.8b": replace(SANA_16B, qk_norm=NORMED, num_layers=60),
    "sana-sprint-0.6b": replace(SANA_06B, qk_norm=NORMED, guidance_embeds=True),
    "sana-sprint-1.6b": replace(SANA_16B, qk_norm=NORMED, guidance_embeds=True),
}

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16), "fp32": ("F32", torch.float32)}
SHARD_BYTES = 5 * 10**9  # as the hub's own tools cut them
BLOCK_ELEMENTS = 2**22

# Folder of a component -> what its files are called.
COMPONENTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def main() -> None:
    arguments = parse_arguments()
    parts = shapes(arguments.model, miniature=arguments.miniature)
    noise = Noise(arguments.seed)
    begun = time.perf_counter()
    for component, n_bytes in write_checkpoint(
        arguments.out,
        parts[:2] if arguments.no_text_encoder else parts,
        make_scheduler(arguments.model),
        dtype=arguments.dtype,
        noise=noise,
        shard_bytes=arguments.shard_bytes,
    ):
        print(f"{component:13} {n_bytes / 1e9:6.2f} GB  {time.perf_counter() - begun:6.1f} s")


def write_checkpoint(
    out: Path,
    specs: Sequence[TransformerSpec | AutoencoderSpec | TextEncoderSpec],
    scheduler: DPMSolverMultistepScheduler | SCMScheduler,
    *,
    dtype: str = "bf16",
    noise: Noise,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[str, int]]:
    """Writes a checkpoint folder of these shapes; gives each component's name and bytes once it is written."""
    with torch.device("meta"):
        modules = [empty_module(spec) for spec in specs]
    for (component, base), module in zip(COMPONENTS.items(), modules, strict=False):
        folder = out / component
        folder.mkdir(parents=True, exist_ok=True)
        module.config.save_pretrained(folder) if component == "text_encoder" else module.save_config(folder)
        yield component, write_weights(folder, base, module, dtype, noise, shard_bytes)
    scheduler.save_pretrained(out / "scheduler")
    make_tokenizer().save_pretrained(out / "tokenizer")
    (out / "model_index.json").write_text(json.dumps(model_index(scheduler), indent=2) + "\n")


def empty_module(spec: TransformerSpec | AutoencoderSpec | TextEncoderSpec) -> Any:
    """diffusers' or transformers' module of a shape, with whatever weights its constructor makes."""
    if isinstance(spec, TransformerSpec):
        return SanaTransformer2DModel(**asdict(spec))
    if isinstance(spec, AutoencoderSpec):
        return AutoencoderDC(**asdict(spec))
    return Gemma2Model(Gemma2Config(**asdict(spec)))


@torch.no_grad()
def fill(module: nn.Module, dtype: torch.dtype, device: str, noise: Noise) -> None:
    """Gives a module on the meta device its parameters, as in a checkpoint of the same shape; buffers stay there."""
    affine = affine_weights(module)
    for path, owner in module.named_modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{path}.{leaf}".removeprefix(".")
            filled = torch.empty(parameter.shape, dtype=dtype, device=device)
            flat, start = filled.view(-1), 0
            for piece in contents(name, parameter, name in affine, module, dtype, noise):
                flat[start : start + piece.numel()] = piece.reshape(-1)
                start += piece.numel()
            setattr(owner, leaf, nn.Parameter(filled, requires_grad=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--model", choices=TRANSFORMERS, default="sana-1.6b", help="whose shape (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="stored precision (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-text-encoder", action="store_true", help="leave out the 5.2 GB of Gemma-2-2b")
    parser.add_argument("--miniature", action="store_true", help="the same model with every size divided")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="largest file (default %(default)s)")
    return parser.parse_args()


def shapes(model: str, *, miniature: bool) -> tuple[TransformerSpec, AutoencoderSpec, TextEncoderSpec]:
    transformer, autoencoder, text_encoder = TRANSFORMERS[model], F32C32_SANA, TextEncoderSpec()
    if not miniature:
        return transformer, autoencoder, text_encoder
    channels, layers = (8, 16, 32, 32, 64, 64), (1,) * 6
    return (
        replace(
            transformer,
            num_layers=2,
            num_attention_heads=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=48,
            sample_size=BY_NAME[model].native_px // 256,
        ),
        replace(
            autoencoder,
            attention_head_dim=8,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=layers,
        ),
        TextEncoderSpec(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
    )


class Noise:
    """Normal deviates by the gigabyte: one block, read from a new place for every tensor."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK_ELEMENTS, generator=self._generator)

    def pieces(self, count: int, deviation: float, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """`count` deviates in runs of [at most BLOCK_ELEMENTS]. Neighbouring rows differ; far ones may repeat."""
        place = int(torch.randint(BLOCK_ELEMENTS, (), generator=self._generator))
        while count > 0:
            piece = self._block[place : place + count]
            yield (piece * deviation).to(dtype)
            count -= piece.numel()
            place = 0 if place else 1 + int(torch.randint(BLOCK_ELEMENTS // 2, (), generator=self._generator))


def write_weights(folder: Path, base: str, module: nn.Module, dtype: str, noise: Noise, shard_bytes: int) -> int:
    """Write a module's state dict as safetensors, tensor by tensor, in one file or as shards with an index."""
    tensors = list(module.state_dict().items())
    affine = affine_weights(module)
    shards = cut(tensors, DTYPES[dtype][1].itemsize, shard_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{base}{several}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in shard:
            stored, itemsize = (
                (DTYPES[dtype][0], DTYPES[dtype][1].itemsize) if tensor.is_floating_point() else ("I64", 8)
            )
            begin, end = end, end + tensor.numel() * itemsize
            header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            weight_map[name] = file.name
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        with file.open("wb") as stream:
            stream.write(len(packed).to_bytes(8, "little") + packed)
            for name, tensor in shard:
                for piece in contents(name, tensor, name in affine, module, DTYPES[dtype][1], noise):
                    stream.write(as_bytes(piece).data)
        total_bytes += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total_bytes


def cut(
    tensors: list[tuple[str, torch.Tensor]], itemsize: int, shard_bytes: int
) -> list[list[tuple[str, torch.Tensor]]]:
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    room = shard_bytes
    for name, tensor in tensors:
        n_bytes = tensor.numel() * itemsize
        if n_bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, tensor))
        room -= n_bytes
    return shards


def affine_weights(module: nn.Module) -> set[str]:
    """Names of the weights that a normalised value is multiplied by."""
    return {
        f"{path}.weight"
        for path, each in module.named_modules()
        if "Norm" in type(each).__name__ and isinstance(getattr(each, "weight", None), torch.Tensor)
    }


def contents(
    name: str, tensor: torch.Tensor, affine: bool, module: nn.Module, dtype: torch.dtype, noise: Noise
) -> Iterator[torch.Tensor]:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        yield torch.zeros(shape, dtype=torch.int64)
    elif affine or name.endswith("running_var"):
        # Gemma's norms multiply by 1 + weight.
        yield torch.full(shape, 0.0 if isinstance(module, Gemma2Model) else 1.0, dtype=dtype)
    elif name.endswith("running_mean") or (name.endswith("bias") and len(shape) == 1):
        yield torch.zeros(shape, dtype=dtype)
    elif name.endswith("scale_shift_table"):
        yield from noise.pieces(tensor.numel(), shape[-1] ** -0.5, dtype)
    else:  # [out, in], [out, in, k, k] or an embedding's [vocabulary, width]
        yield from noise.pieces(tensor.numel(), math.prod(shape[1:]) ** -0.5, dtype)


def as_bytes(piece: torch.Tensor) -> np.ndarray:
    return piece.contiguous().reshape(-1).view(torch.uint8).numpy()


def make_scheduler(model: str) -> DPMSolverMultistepScheduler | SCMScheduler:
    if "sprint" in model:
        return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=6.0 if model.endswith("4k") else 3.0,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens and Gemma's special tokens: 260 ids, within any text encoder's vocabulary."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    vocabulary = {
        token: number for number, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=8192,
    )


def model_index(scheduler: DPMSolverMultistepScheduler | SCMScheduler) -> dict[str, Any]:
    return {
        "_class_name": "SanaSprintPipeline" if isinstance(scheduler, SCMScheduler) else "SanaPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }


if __name__ == "__main__":
    main()
