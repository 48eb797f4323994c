"""SanaTransformer2DModel in row blocks.

Everything in a Sana transformer is local but for its ReLU linear attentions, whose sums are small. So of a whole map
only the residual stream exists, `[B, h, w, width]`, and each layer passes over it twice, a row block at a time:

    pass A   norm, keys, values -> sums of the attention; the map is read and kept
    pass B   norm, queries -> sums applied -> + x -> attention to the text -> + x -> Mix-FFN -> + x; the map is read and
             freed, the next one written

Several branches (with the prompt and without) pass through a layer one after another, so that its weights are needed
once a step. The Mix-FFN's hidden channels, five times the width, are made a slab of channels at a time: each slab has
line buffers of its own for its depthwise convolution, and only the gated half of them exists for a whole row block.

On the CPU predictions are the same to the bit at every row block height: linear layers and convolutions are (oneDNN and
MKL see to it, but for a linear layer of a single pixel, which is given twice), and whatever else might not be runs row
by row. The modules are diffusers' own; their weights are read here. Linear layers of other makes (LoRA, quantised) are
called as the modules that they are.
"""

from __future__ import annotations

from handscroll.banded.transformer.branch import Branch
from handscroll.banded.transformer.predict import MaterializeLayer, predict

__all__ = ["Branch", "MaterializeLayer", "predict"]
