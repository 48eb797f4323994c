"""The transformers that the tests run in row blocks, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import miniatures
from handscroll.banded.transformer import Branch


def transformer(row: str = "1.6b", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = miniatures.make_transformer(row, **overrides)
    return nn.Module.to(model, dtype)


def branches(
    model: Any, height: int, width: int, texts: tuple[int, ...] = (5, 9), seed: int = 1, masked: bool = True
) -> list[Branch]:
    """Branches of one latent and several texts; those of more than five tokens have three masked out."""
    draw = torch.Generator().manual_seed(seed)
    dtype, config = model.proj_out.weight.dtype, model.config
    latent = torch.randn(1, config.in_channels, height, width, generator=draw).to(dtype)
    guidance = torch.tensor([0.45]).to(dtype) if config.guidance_embeds else None
    return [
        Branch(
            latent,
            torch.randn(1, tokens, config.caption_channels, generator=draw).to(dtype),
            torch.tensor([[1] * (tokens - 3) + [0] * 3]) if masked and tokens > 5 else None,
            torch.tensor([411.0]),
            guidance,
        )
        for tokens in texts
    ]
