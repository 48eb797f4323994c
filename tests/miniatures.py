"""Checkpoints small enough to build in a test: every row of the Sana family, in the official layout, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

# What tells one row from another; everything else is the same tiny model.
ROWS: dict[str, dict[str, Any]] = {
    "0.6b": {"num_layers": 3},
    "1.6b-512": {"sample_size": 2},
    "1.6b": {},
    "1.6b-2k": {"interpolation_scale": 1.0},
    "1.6b-4k": {"interpolation_scale": 2.0},
    "1.5-1.6b": {"qk_norm": "rms_norm_across_heads"},
    "1.5-4.8b": {"qk_norm": "rms_norm_across_heads", "num_layers": 4},
    "sprint-0.6b": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True, "num_layers": 3},
    "sprint-1.6b": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
}

TRANSFORMER: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 48,
    "mlp_ratio": 2.5,
    "sample_size": 4,
    "patch_size": 1,
}

# f32c32-sana with the channels divided by sixteen and fewer layers.
AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (8, 16, 32, 32, 64, 64),
    "decoder_block_out_channels": (8, 16, 32, 32, 64, 64),
    "encoder_layers_per_block": (1, 1, 1, 2, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
}

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")


def make_checkpoint(
    folder: str | Path,
    *,
    row: str = "1.6b",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    transformer: Mapping[str, Any] | None = None,
    autoencoder: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    **save_options: Any,
) -> Path:
    """Write a tiny checkpoint of one `row` of `ROWS` and return its folder.

    The three mappings change single config fields of a component; `save_options` go to `save_pretrained`
    (`variant="bf16"`, `max_shard_size="20KB"`). The same arguments write the same weights.
    """
    sprint = row.startswith("sprint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (SanaSprintPipeline if sprint else SanaPipeline)(
            tokenizer=make_tokenizer(),
            text_encoder=make_text_encoder(**(text_encoder or {})),
            vae=make_autoencoder(**(autoencoder or {})),
            transformer=make_transformer(row, **(transformer or {})),
            scheduler=make_scheduler(row),
        )
    if dtype is not torch.float32:
        for module in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
            torch.nn.Module.to(module, dtype=dtype)  # diffusers' own `to` warns about modules that Sana has none of
    pipeline.save_pretrained(folder, **save_options)
    return Path(folder)


def make_transformer(row: str = "1.6b", **overrides: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(**{**TRANSFORMER, **ROWS[row], **overrides}).eval()


def make_autoencoder(**overrides: Any) -> AutoencoderDC:
    return AutoencoderDC(**{**AUTOENCODER, **overrides}).eval()


def make_text_encoder(**overrides: Any) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**{**TEXT_ENCODER, **overrides})).eval()


def make_scheduler(row: str = "1.6b") -> DPMSolverMultistepScheduler | SCMScheduler:
    if row.startswith("sprint"):
        return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=6.0 if row == "1.6b-4k" else 3.0,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Gemma's four special tokens with Gemma's ids; pads right, begins with <bos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
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
