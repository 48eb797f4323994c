"""Before the first layer and after the last: patches and positions, the final norm and projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import Tensor, nn

from handscroll.banded.layers import LayerPass
from handscroll.banded.modules import PatchEmbed, SanaTransformer2DModel
from handscroll.banded.transformer.branch import BranchState


def embedded(embed: PatchEmbed, latent: Tensor, own: range, band_rows: int, this: LayerPass) -> Iterator[Tensor]:
    """`PatchEmbed` in row blocks: latent [B, C, H, W] -> tokens [B, rows, w, width] of the map's `own` rows."""
    if embed.pos_embed_max_size is not None or embed.layer_norm:
        raise TypeError("a patch embedding with a norm or with cropped positions cannot be run in row blocks")
    batch, channels, height, width = latent.shape
    patch, proj = embed.patch_size, embed.proj
    rows, columns = height // patch, width // patch
    as_linear = type(proj) is nn.Conv2d and proj.weight.shape[2:] == (patch, patch) and not any(proj.padding)
    project = this.matrix(proj.weight.flatten(1), proj.bias) if as_linear else None
    positions = None
    if embed.pos_embed is not None:
        positions = [_sincos(embed, count, latent.device) for count in (columns, rows)]  # [count, width / 2] fp32
    for top in own[::band_rows]:
        end = min(top + band_rows, own.stop)
        row_block = latent[:, :, top * patch : end * patch]
        if project is None:
            tokens = proj(row_block).permute(0, 2, 3, 1).contiguous()
        else:
            patches = row_block.reshape(batch, channels, -1, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
            patches = patches.reshape(batch, -1, columns, channels * patch * patch)
            # One column of tokens is read as another layout at each number of rows, and without oneDNN a product
            # of another layout rounds otherwise.
            tokens = project(patches.contiguous() if columns == 1 else patches)
        if positions is not None:
            of_columns, of_rows = positions
            half = of_columns.shape[-1]
            tokens[..., :half] += of_columns
            tokens[..., half:] += of_rows[top:end, None]
        yield tokens


def _sincos(embed: PatchEmbed, count: int, device: torch.device) -> Tensor:
    """Half of diffusers' position embedding: of a map `count` rows tall, or wide. [count, width / 2] fp32."""
    # The same steps as in get_2d_sincos_pos_embed, for the same roundings; there, for every position of the map.
    assert embed.interpolation_scale is not None
    grid = torch.arange(count, device=device, dtype=torch.float32)
    grid = grid / (count / embed.base_size) / embed.interpolation_scale
    return get_1d_sincos_pos_embed_from_grid(embed.proj.out_channels // 2, grid, output_type="pt").float()


def projected(transformer: SanaTransformer2DModel, state: BranchState, this: LayerPass) -> Tensor:
    """The last norm and projection, and patches put together: the branch's map -> [B, C', H, W]."""
    norm, project = transformer.norm_out.norm, this.linear(transformer.proj_out)
    patch = transformer.config.patch_size
    shift, scale = (transformer.scale_shift_table[None] + state.embedded[:, None]).chunk(2, dim=1)
    shift, scale = shift[:, None], 1 + scale[:, None]
    out: Tensor | None = None
    if not state.rows:
        channels = transformer.proj_out.out_features // patch**2
        return state.text.new_empty(len(state.text), channels, 0, state.columns * patch)
    top = 0
    for row_block in state.map.row_blocks(state.band_rows):
        patches = project(norm(row_block).mul_(scale).add_(shift))
        del row_block
        batch, rows, columns, channels = patches.shape
        channels //= patch * patch
        if out is None:
            out = patches.new_empty(batch, channels, state.rows * patch, state.columns * patch)
        patches = patches.view(batch, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        target = out[:, :, top * patch : (top + rows) * patch]
        target.view(batch, channels, rows, patch, columns, patch).copy_(patches)
        top += rows
    assert out is not None
    return out
