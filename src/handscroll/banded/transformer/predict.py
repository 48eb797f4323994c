"""One forward of the transformer for several branches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from handscroll.banded.exchange import Exchange
from handscroll.banded.layers import LayerPass
from handscroll.banded.modules import SanaTransformer2DModel, SanaTransformerBlock
from handscroll.banded.rows import RowMap, Workspace
from handscroll.banded.transformer.block import BlockPass
from handscroll.banded.transformer.branch import Branch, BranchState
from handscroll.banded.transformer.embed import embedded, projected

# Lends the i-th SanaTransformerBlock with its parameters in memory, for as long as the context is entered.
MaterializeLayer = Callable[[int], AbstractContextManager[nn.Module]]


@torch.no_grad()
def predict(
    transformer: SanaTransformer2DModel,
    branches: Sequence[Branch],
    *,
    layer: MaterializeLayer | None = None,
    band_rows: int | None = None,
    new_map: Callable[[int], RowMap] | None = None,
    lay_out: bool = False,
    plain: bool = False,
    exchanges: Sequence[Exchange] | None = None,
) -> list[Tensor]:
    """What `SanaTransformer2DModel` gives for each branch, [B, C', H, W] in the dtype of its latent.

    transformer: diffusers' module in eval mode. All but `transformer_blocks` must be in memory, or come by hooks of the
    modules that are called, but for `patch_embed.pos_embed`, which is computed row block by row block. layer: called
    once for each layer, from the first to the last; materializes that layer's block. None stands for the transformer's
    own. band_rows: rows of the token map at a time; None lets the size decide. new_map: makes the map, given its
    height, that holds a branch's residual stream. lay_out: each layer's matrices are reordered for the CPU's kernels,
    once for all branches, which takes a layer's memory again and saves a twentieth of the time; it changes no bit.
    plain: by `torch.nn.functional` alone, but for norms and sums where Triton is asked for (triton.in_use).
    exchanges: for each branch that of the rows of its token map, where several ranks make a band each. The latents are
    whole on every rank; of what is predicted each gives the rows of its own band, [B, C', rows * patch, W], of which
    there may be none.

    Raises TypeError for a module that cannot be run in row blocks, ValueError for a latent that does not fit.
    """
    if band_rows is not None and band_rows < 1:
        raise ValueError(f"row blocks of {band_rows} rows end nowhere")
    materialize = layer or (lambda index: nullcontext(transformer.transformer_blocks[index]))
    make_map = new_map or RowMap
    workspace = Workspace()
    shared: Sequence[Exchange | None] = [None] * len(branches) if exchanges is None else exchanges
    states = [
        BranchState.of(transformer, branch, band_rows, each) for branch, each in zip(branches, shared, strict=True)
    ]
    try:
        for state, branch in zip(states, branches, strict=True):
            rows = range(state.first_row, state.first_row + state.rows)
            tokens = embedded(transformer.patch_embed, branch.latent, rows, state.band_rows, LayerPass(plain))
            state.refill(make_map, tokens)
        for index in range(len(transformer.transformer_blocks)):
            with materialize(index) as block:
                this = LayerPass(plain, workspace, lay_out=lay_out)
                passes: Iterable[BlockPass]
                passes = (BlockPass(cast(SanaTransformerBlock, block), state, this) for state in states)
                if exchanges is not None:
                    passes = list(passes)  # sums of one branch are on their way while those of the next are made
                for state, each in zip(states, passes, strict=True):
                    state.refill(make_map, each.row_blocks())
                    del each
                del this, passes
            del block
        workspace.memory = None
        return [projected(transformer, state, LayerPass(plain)) for state in states]
    finally:
        for state in states:
            state.map.close()
