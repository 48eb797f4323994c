"""How many parameters a layer has."""

from __future__ import annotations


def linear_parameters(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def convolution_parameters(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    """`inputs` are the channels that one output channel sees: 1 in a depthwise convolution."""
    return inputs * outputs * kernel**2 + (outputs if bias else 0)
