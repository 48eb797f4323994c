"""Whether a call runs by rows or whole, decided before any work from the module, the input and PyTorch's modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from handscroll.integrations.diffusers.layers import has_global_hooks, reason_against
from handscroll.integrations.diffusers.weights import Placement, Weights

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_TENSORS = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Half:
    """The decoder or encoder of an autoencoder as it is at a call."""

    name: str
    module: Any
    weights: Weights
    placement: Placement

    @classmethod
    def of(cls, autoencoder: nn.Module, name: str) -> Half:
        module = getattr(autoencoder, name)
        weights = Weights(autoencoder, module)
        return cls(name, module, weights, weights.placement())

    @property
    def dtype(self) -> torch.dtype:
        """What its layers compute in, where `reason_of_module` has none against it."""
        return next(iter(self.placement.dtypes))

    @property
    def device(self) -> torch.device:
        return next(iter(self.placement.devices))


def reason_of_module(half: Half) -> str | None:
    """Why a decoder or encoder cannot run by rows whatever it is given; None if it can."""
    if (reason := reason_against(half.module, half.name)) is not None:
        return reason
    placement = half.placement
    if not placement.kinds <= set(_TENSORS):
        kinds = sorted(kind.__name__ for kind in placement.kinds - set(_TENSORS))
        return f"weights of the {half.name} are of the kind {kinds[0]}"
    if not placement.devices:
        return f"the {half.name} has no weights"
    if len(placement.devices) > 1:
        return f"the {half.name} is spread over several devices"
    if half.device.type == "meta":
        return f"the {half.name}'s weights are on the meta device"
    if len(placement.dtypes) != 1 or not placement.dtypes <= _DTYPES:
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in placement.dtypes))
        return f"the {half.name} computes in {dtypes}, and rows in one of float32, bfloat16 and float16"
    return None


def reason_of_modes(device: torch.device) -> str | None:
    """Why nothing can run by rows in PyTorch's present modes, whatever it is given; None if it can."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "derivatives are wanted (torch.autograd.forward_ad), which rows do not keep"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, which chooses a type for each layer"
    if has_global_hooks():
        return "every layer's call is watched (hooks on all modules)"
    if torch._C._len_torch_dispatch_stack():
        return "PyTorch's operations are watched or changed (a TorchDispatchMode)"
    if any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack()):
        return "PyTorch's functions are watched or changed (a TorchFunctionMode)"
    return None


def reason_of_call(half: Half, given: Tensor) -> str | None:
    """Why this input `[B, C, H, W]` cannot go through by rows in PyTorch's present modes; None if it can."""
    if torch.jit._trace.is_tracing():
        return "every layer's call is recorded (torch.jit.trace)"
    weights = list(half.module.parameters())
    if type(given) not in _TENSORS or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (given, *weights))):
        return f"the input or a weight is no ordinary tensor but of the kind {type(given).__name__}"
    if given.layout is not torch.strided or not given.is_floating_point() or given.is_meta:
        return f"the input is of type {str(given.dtype).removeprefix('torch.')} on {given.device.type}"
    if not given.numel():
        return f"the input is empty, of shape {'x'.join(map(str, given.shape))}"
    if given.shape[1] != (channels := _channels(half.module)):
        return f"the input has {given.shape[1]} channels and not {channels}"
    differentiable = given.requires_grad or any(each.requires_grad for each in weights)
    if torch.is_grad_enabled() and differentiable:
        return "gradients are wanted, which rows do not keep; torch.no_grad() around the call would let it run by rows"
    return reason_of_modes(half.device)


def _channels(module: Any) -> int:
    first = module.conv_in
    return int(getattr(first, "conv", first).in_channels)
