"""The transformer under each branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from handscroll.banded.transformer import Branch
from handscroll.runtime.session import Transformer
from handscroll.runtime.text_cache import Text


def predictions(
    transformer: Transformer, latent: Tensor, texts: Sequence[Text], timestep: Tensor, guidance: Tensor | None = None
) -> list[Tensor]:
    """The transformer's prediction under each text, in its own dtype."""
    dtype = transformer.dtype
    branches = [Branch(latent.to(dtype), text.embeddings.to(dtype), text.mask, timestep, guidance) for text in texts]
    return transformer.predict(branches)
