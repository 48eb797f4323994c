"""Weights that are in memory only while their module is called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from handscroll.weights.stream import WeightStream


def lend(unit: nn.Module, stream: WeightStream, following: Sequence[nn.Module] = (), frees: bool = False) -> None:
    """Materializes a module for as long as its own forward runs, and has `following` read ahead meanwhile.

    frees: gives the buffer's memory back each time, where what comes next is of another size.
    """
    held = ExitStack()

    def before(unit: nn.Module, _: Any) -> None:
        held.enter_context(stream.materialize(unit))
        stream.prefetch(*following)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        held.close()
        if frees:
            stream.free_buffers()

    unit.register_forward_pre_hook(before)
    unit.register_forward_hook(after, always_call=True)
