"""Where the kernels can run, what Triton's compiler says of them, and all their tests in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from handscroll.banded import triton
from handscroll.banded.triton import launch
from triton_cases import INTERPRETS, of_all_types, on_triton

IMPORTED_TRITON = "triton" in sys.modules
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
pytestmark = on_triton


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_strips_may_have_more_elements_than_32_bits_count() -> None:
    row_block = torch.zeros(1, 1, 2**20, 2240, dtype=torch.bfloat16, device="cuda")
    end = row_block[:, :, -3:]
    end.copy_(torch.randn(end.shape))
    alone = end.clone()
    one = torch.ones(1, 1, 1, 2240, dtype=torch.bfloat16, device="cuda")
    for run in (
        lambda this: triton.rms_norm(this, None, None, 1e-6, out=this),
        lambda this: triton.layer_norm_modulate(this, one, one, 1e-6, out=this),
        lambda this: triton.gate_add_(this, one, this),
        lambda this: triton.attention_apply(
            this.unflatten(-1, (70, 32)),
            torch.ones(1, 70, 32, 32, device="cuda"),
            torch.ones(1, 70, 32, device="cuda"),
            out=this.unflatten(-1, (70, 32)),
        ),
    ):
        run(row_block)
        run(alone)
        assert torch.equal(end, alone)


def test_what_is_available() -> None:
    row_block = torch.zeros(1, 1, 1, 16)
    assert triton.available(row_block) == (INTERPRETS and find_spec("triton") is not None)
    assert not triton.available(row_block.double())
    assert not triton.available(row_block.to("meta"))


if INTERPRETS:

    def test_importing_the_kernels_does_not_import_triton() -> None:
        assert not IMPORTED_TRITON

else:

    @needs_triton
    @of_all_types
    def test_kernels_compile_for_an_h100(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Triton's compiler refuses much that its interpreter runs. It needs no device."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.compiler import compile as compile_source

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        pointers |= {torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}
        compiled = []

        def compile_only(
            kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, fuses: bool = False, **sizes: Any
        ) -> None:
            assert len(grid) <= 3
            assert all(1 <= count < 2**16 for count in grid[1:])
            signature, constants, attributes = dict.fromkeys(sizes, "constexpr"), dict(sizes), {}
            for index, (name, value) in enumerate(zip(kernel.jitted.arg_names, arguments, strict=False)):
                # As a launch would tell the compiler: what is 1, and what is a multiple of 16.
                is_count = name in launch.COUNTS
                if value is None or (type(value) is int and value == 1 and not is_count):
                    signature[name], constants[name] = "constexpr", value
                    continue
                kinds: dict[type, str] = {int: "i32", float: "fp32"}
                signature[name] = pointers[value.dtype] if isinstance(value, Tensor) else kinds[type(value)]
                if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not is_count):
                    attributes[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel.jitted, signature, constants, attributes)
            options = {"num_warps": num_warps, "enable_fp_fusion": fuses}
            binary = compile_source(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert binary.metadata.shared <= 227 * 2**10
            compiled.append(kernel)

        monkeypatch.setattr(launch.Kernel, "launch", compile_only)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        # The shapes of Sana 1.6B at 4096x4096.
        row_block, channel = empty(2, 4, 128, 2240), empty(2, 1, 1, 2240)
        triton.rms_norm(row_block, empty(2240), empty(2240), 1e-5, row_block, "silu", row_block)
        triton.layer_norm_modulate(row_block, channel, channel, 1e-6)
        triton.gate_add_(row_block, channel, row_block, 65504.0)
        (values, gates), weights = empty(2, 6, 128, 2240).chunk(2, dim=-1), empty(11200, 1, 3, 3)
        biases = empty(11200)[:2240].chunk(2)
        triton.depthwise_gate(values, gates, (weights[:1120], weights[5600:6720]), (biases[0], biases[1]))
        heads = row_block.unflatten(-1, (70, 32))
        products, normaliser = empty(2, 70, 32, 32, dtype=torch.float32), empty(2, 70, 32, dtype=torch.float32)
        triton.attention_sums(heads, heads, products, normaliser)
        triton.attention_apply(heads, products, normaliser, out=heads)
        triton.bias_activation_(row_block, biases[0].repeat(2), "silu")
        for eight in (torch.int8, torch.float8_e4m3fn):
            triton.quantise_rows(row_block.flatten(0, 2), eight, 1 / 127, 1e-38)
        launch.probe_kernel.launch((1,), empty(1), num_warps=1)
        triton.upsample_row_phase(empty(1, 4, 257, 512), empty(1, 4, 256, 512), 2, 1, empty(1, 8, 512, 256))
        assert set(compiled) == set(launch.KERNELS)

    @pytest.mark.thorough
    @needs_triton
    def test_kernels_agree_in_the_interpreter() -> None:
        files = sorted(map(str, Path(__file__).parent.glob("test_triton_*.py")))
        out = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert out.returncode == 0, out.stdout + out.stderr
