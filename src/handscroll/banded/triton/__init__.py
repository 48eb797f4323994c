"""Triton kernels for what lies between the matrix products of the two networks, for CUDA devices.

Between two products a row block `[B, rows, W, C]` is read, changed a little and written; on a device only the bytes
count. Each function here makes in one pass what PyTorch makes in two to six, with the same roundings: everything is
computed in fp32, and rounded to the row block's type wherever the operators that it stands for would have written a
tensor. Results differ from theirs by the order of sums and the last bits of exponentials and square roots, before they
are rounded.

Sizes of blocks are functions of the channels wherever a block decides the order of a sum over channels, so that a
pixel has the same bits in row blocks of any height. Offsets within a program fit 32 bits; where a program starts is
counted in 64, so that a row block may have more than 2^31 elements.

Importing this package does not import Triton (launch.py).
"""

from __future__ import annotations

from handscroll.banded.triton.attention import attention_apply, attention_sums
from handscroll.banded.triton.bias import bias_activation_
from handscroll.banded.triton.gates import depthwise_gate, gate_add_
from handscroll.banded.triton.launch import available, in_use
from handscroll.banded.triton.norms import layer_norm_modulate, rms_norm
from handscroll.banded.triton.quantised import quantise_rows
from handscroll.banded.triton.upsample import upsample_row_phase

__all__ = [
    "attention_apply",
    "attention_sums",
    "available",
    "bias_activation_",
    "depthwise_gate",
    "gate_add_",
    "in_use",
    "layer_norm_modulate",
    "quantise_rows",
    "rms_norm",
    "upsample_row_phase",
]
