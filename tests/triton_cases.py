"""What the tests of Triton's kernels share: where they run, what they are given, how near they must come.

Without a device the kernels run in Triton's interpreter, which must be asked for before Triton is imported: an ordinary
run of the tests starts another of the files test_triton_*.py, with TRITON_INTERPRET=1 (test_triton_launch.py). There
their tests are collected for the CPU, elsewhere for CUDA devices (`-m gpu`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES: list[Any] = ["cpu"]
if not INTERPRETS:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    DEVICES = [pytest.param("cuda", marks=[pytest.mark.gpu, absent])]

on_devices = pytest.mark.parametrize("device", DEVICES)
of_all_types = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
on_triton = pytest.mark.usefixtures("seeded", "interpreter")  # every one of these files has it for its `pytestmark`


def drawn(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, dtype)


def some_rows(row_block: Tensor) -> Tensor:
    """The same row block as part of a taller one, whose rows of one batch do not follow those of another."""
    return F.pad(row_block, (0, 0, 0, 0, 1, 2))[:, 1 : 1 + row_block.shape[1]]


def some_channels(row_block: Tensor) -> Tensor:
    return F.pad(row_block, (8, 16))[..., 8 : 8 + row_block.shape[-1]]


def assert_rounds_as(ours: Tensor, reference: Tensor) -> None:
    """Equal but for the last bit, and that seldom: where the order of a sum made the difference before rounding."""
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    else:
        # Two roundings, of which the first went the other way, are up to four steps of the smaller result.
        step = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, reference, rtol=2 * step, atol=2 * step)
        assert (ours != reference).float().mean().item() <= 0.01


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """What Triton's interpreter does otherwise than devices, and in old versions not with a new numpy.

    It cuts off what devices round to bf16, and multiplies matrices of bf16 as if they were integers. Until Triton 3.7
    it takes a loop's bounds from arrays in a way that numpy 2.4 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch_tensor, cast, dot = (
        interpreter._patch_lang_tensor,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
    )

    def patch_tensor_mended(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def widened(data: np.ndarray) -> np.ndarray:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)

    def cast_mended(self: Any, source: Any, target_type: Any) -> Any:
        types = (source.dtype.scalar, target_type.scalar)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target_type)

    def dot_mended(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(widened(each.data), tl.float32) if each.dtype.scalar == tl.bfloat16 else each
            for each in (a, b)
        )
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_mended)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_mended)
        patch.setattr(InterpreterBuilder, "create_dot", dot_mended)
        yield
