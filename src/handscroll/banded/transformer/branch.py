"""A branch of guidance: what one forward is given, and its state between two layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from handscroll.banded.exchange import Exchange
from handscroll.banded.modules import SanaTransformer2DModel
from handscroll.banded.rows import RowMap
from handscroll.limits import BAND_BYTES, CUDA_BAND_BYTES


@dataclass(frozen=True, eq=False)
class Branch:
    """What one forward of the transformer is given, all on its device.

    latent: [B, C, H, W] in the dtype of its weights, H and W multiples of the patch size. text: [B, T, caption
    channels]. mask: [B, T], 1 for tokens that count, or None for all. timestep: [B]. guidance: [B], for a transformer
    with `guidance_embeds`, else None.
    """

    latent: Tensor
    text: Tensor
    mask: Tensor | None
    timestep: Tensor
    guidance: Tensor | None = None


@dataclass
class BranchState:
    """A branch on its way: its residual stream, and what every layer needs to know of it.

    rows: those of its map, which is the whole token map or a band of it. text [B, T, width] projected; bias
    [B, 1, 1, T] or None, added to attention's scores; modulation [B, 6 * width] and embedded [B, width] of the
    timestep. exchange: with the ranks that make the other rows.
    """

    rows: int
    columns: int
    band_rows: int
    text: Tensor
    bias: Tensor | None
    modulation: Tensor
    embedded: Tensor
    exchange: Exchange | None = None
    map: RowMap = field(default_factory=lambda: RowMap(0))

    @staticmethod
    def of(
        transformer: SanaTransformer2DModel, branch: Branch, band_rows: int | None, exchange: Exchange | None = None
    ) -> BranchState:
        embed, latent = transformer.patch_embed, branch.latent
        patch, weight = embed.patch_size, embed.proj.weight
        expected = (weight.shape[1], weight.dtype, weight.device)
        given = (latent.shape[1], latent.dtype, latent.device)
        if given != expected or not latent.numel():
            raise ValueError(f"expected channels, type and device {expected}, not {given} of {tuple(latent.shape)}")
        if latent.shape[-2] % patch or latent.shape[-1] % patch:
            raise ValueError(f"a latent of {tuple(latent.shape)} cannot be cut into patches of {patch}x{patch}")
        batch, rows, columns = latent.shape[0], latent.shape[-2] // patch, latent.shape[-1] // patch
        if exchange is not None and exchange.bands.height != rows:
            raise ValueError(f"bands of {exchange.bands.height} rows are not those of the token map, which has {rows}")
        own = range(rows) if exchange is None else exchange.rows
        if branch.guidance is None:
            modulation, embedded = transformer.time_embed(branch.timestep, batch_size=batch, hidden_dtype=latent.dtype)
        else:
            modulation, embedded = transformer.time_embed(
                branch.timestep, guidance=branch.guidance, hidden_dtype=latent.dtype
            )
        text = transformer.caption_norm(transformer.caption_projection(branch.text))
        bias = None
        if branch.mask is not None and not branch.mask.all():
            bias = (1 - branch.mask.to(latent.dtype))[:, None, None] * -10000.0
        if band_rows is None:
            config = transformer.config
            width = config.num_attention_heads * config.attention_head_dim
            row_bytes = batch * columns * 2 * int(config.mlp_ratio * width) * latent.element_size()
            band_bytes = BAND_BYTES if latent.device.type == "cpu" else CUDA_BAND_BYTES
            band_rows = max(1, band_bytes // row_bytes)
        band_rows = max(1, min(band_rows, len(own)))
        return BranchState(len(own), columns, band_rows, text, bias, modulation, embedded, exchange)

    @property
    def first_row(self) -> int:
        """Of the whole token map, the row that its map begins with."""
        return 0 if self.exchange is None else self.exchange.rows.start

    def refill(self, new_map: Callable[[int], RowMap], row_blocks: Iterable[Tensor]) -> None:
        """Writes the next map; `row_blocks` read the last one."""
        written = new_map(self.rows) if self.rows else RowMap(0)
        try:
            for row_block in row_blocks:
                written.write(row_block)
                del row_block
        except BaseException:
            written.close()
            raise
        self.map.close()
        self.map = written
