"""What the tests of quantised weights are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from handscroll import Request, generate
from handscroll.banded.transformer import Branch
from handscroll.errors import CheckpointError, HandscrollError, UsageError
from handscroll.models.known import known_specs
from handscroll.models.text_encoder import TextEncoderSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.weights.forms import Form, packed_bytes
from handscroll.weights.low_rank import quantise
from handscroll.weights.quantised import views, widen


def packed_of(form: Form, weight: torch.Tensor) -> torch.Tensor:
    """A matrix as it is kept: the bytes of its parts."""
    shape = tuple(weight.shape)
    packed = torch.empty(packed_bytes(form, shape), dtype=torch.uint8)
    quantise(form, weight, packed)
    return packed


def widened(form: Form, shape: tuple[int, ...], packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
    out = torch.empty(shape, dtype=dtype)
    widen(form, views(form, shape, packed), out)
    return out


def true_transformer(name: str) -> TransformerSpec:
    return known_specs()[name].transformer


def refused(
    folder: Path, kinds: tuple[type[HandscrollError], ...] = (CheckpointError, UsageError), **options: Any
) -> str:
    """What is said of a folder that no picture is made of; one line, and nothing is written."""
    request = Request("a", model=str(folder), width=64, height=64, steps=1, seed=1, device="cpu", **options)
    with pytest.raises(kinds) as error:
        generate(request, folder.parent / "p.png")
    assert "\n" not in str(error.value)
    assert not (folder.parent / "p.png").exists()
    return str(error.value)


def true_text() -> TextEncoderSpec:
    return known_specs()["sana-1.6b-4k"].text_encoder


def branches_of(model: Any, dtype: torch.dtype) -> list[Branch]:
    """Two prompts, of which one has a single token."""
    torch.manual_seed(3)
    guidance = torch.tensor([4.5]) if model.config.guidance_embeds else None
    latent = torch.randn(1, 32, 5, 7).to(dtype)
    texts = [torch.randn(1, tokens, model.config.caption_channels).to(dtype) for tokens in (6, 1)]
    return [Branch(latent, text, None, torch.tensor([411.0]), guidance) for text in texts]
