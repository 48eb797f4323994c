"""Weights that diffusers or accelerate move or cast around every `forward`: found, and made real for a while.

Both set hooks on the modules: group offloading and layerwise casting in diffusers' registry `_diffusers_hook`,
sequential offloading as accelerate's `_hf_hook`. Rows call no `forward`, so the hooks are called here, for the modules
whose weights are laid out at that time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_GROUP, _CASTING = "group_offloading", "layerwise_casting"
_MOVING = frozenset({_GROUP, _CASTING, "layer_execution_tracker", "lazy_prefetch_group_offloading"})
_MOVING_CLASSES = frozenset({"AlignDevicesHook", "SequentialHook"})


@dataclass(frozen=True)
class Placement:
    """Where a half's weights are and what they are when its layers run. moved: hooks see to it."""

    dtypes: frozenset[torch.dtype]
    devices: frozenset[torch.device]
    moved: bool
    kinds: frozenset[type]


class Weights:
    """The weights of a decoder or encoder, as its layers find them when they are called."""

    def __init__(self, autoencoder: nn.Module, half: nn.Module) -> None:
        self.half = half
        self.groups = _groups_by_tensor(autoencoder)
        self.moved = bool(self.groups) or any(_moves(module) for module in half.modules())

    def placement(self) -> Placement:
        dtypes: set[torch.dtype] = set()
        devices: set[torch.device] = set()
        kinds: set[type] = set()
        for module in self.half.modules():
            for tensor in _own_tensors(module):
                kinds.add(type(tensor))
                devices.add(self._device(module, tensor))
                if tensor.is_floating_point():
                    dtypes.add(_dtype(module, tensor))
        return Placement(frozenset(dtypes), frozenset(devices), self.moved, frozenset(kinds))

    def _device(self, module: nn.Module, tensor: Tensor) -> torch.device:
        if (group := self.groups.get(id(tensor))) is not None:
            return indexed(group.onload_device)
        for hook in _accelerate_hooks(module):
            if getattr(hook, "offload", False):
                return indexed(hook.execution_device)
        return tensor.device

    @contextmanager
    def real(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """The modules' weights are where and what their layers compute with, while this is entered."""
        inside = [module for each in modules for module in each.modules()]
        with ExitStack() as stack:
            groups = {id(group): group for module in inside for group in self._groups_of(module)}
            for group in groups.values():
                group.onload_()
                stack.callback(group.offload_)
                if group.stream is not None:
                    group.stream.synchronize()
            for module in inside:
                for hook in _accelerate_hooks(module):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
                if (casting := diffusers_hooks(module).get(_CASTING)) is not None:
                    casting.pre_forward(module)
                    stack.callback(casting.post_forward, module, None)
            yield

    def _groups_of(self, module: nn.Module) -> Iterator[Any]:
        for tensor in _own_tensors(module):
            if (group := self.groups.get(id(tensor))) is not None:
                yield group


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a module's own `forward` is more than what moves or casts its weights around its class's."""
    registry: Any = vars(module).get("_diffusers_hook")
    innermost: Any = vars(module)["forward"]
    if registry is not None and registry.hooks:
        if not _MOVING.issuperset(registry.hooks) or not _is_wrapper_of(innermost, module, "diffusers"):
            return True
        innermost = registry._fn_refs[0].forward
    elif accelerate := _accelerate_hooks(module):
        if not _MOVING_CLASSES.issuperset(type(hook).__name__ for hook in accelerate):
            return True
        if not _is_wrapper_of(innermost, module, "accelerate"):
            return True
        innermost = vars(module).get("_old_forward")
    # Hooks that were taken off leave the class's own method here.
    return getattr(innermost, "__func__", None) is not type(module).forward


def _is_wrapper_of(forward: Any, module: nn.Module, library: str) -> bool:
    """Whether this is the function that a library puts around a module's `forward` to call its hooks."""
    if not isinstance(forward, partial) or not forward.args or forward.args[0] is not module:
        return False
    return str(getattr(forward.func, "__module__", "")).split(".")[0] == library


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a hook on the whole module will take it before it is called; None where none does."""
    for hook in _accelerate_hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return indexed(device)
    return None


def indexed(device: torch.device | str | int) -> torch.device:
    """A device as its tensors name it: the current one of its kind has a number."""
    found: Any = torch.device(device)
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _moves(module: nn.Module) -> bool:
    casts = _CASTING in diffusers_hooks(module)
    return casts or any(getattr(hook, "offload", False) for hook in _accelerate_hooks(module))


def _dtype(module: nn.Module, tensor: Tensor) -> torch.dtype:
    casting = diffusers_hooks(module).get(_CASTING)
    return tensor.dtype if casting is None else casting.compute_dtype


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module, those of a sequence one by one."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return []
    return list(hook.hooks) if hasattr(hook, "hooks") else [hook]


def _groups_by_tensor(autoencoder: nn.Module) -> dict[int, Any]:
    """Of group offloading: for every parameter and buffer the group that it moves with."""
    found: dict[int, Any] = {}
    for module in autoencoder.modules():
        if (hook := diffusers_hooks(module).get(_GROUP)) is None:
            continue
        group = hook.group
        tensors = [tensor for member in group.modules for tensor in (*member.parameters(), *member.buffers())]
        found |= {id(tensor): group for tensor in (*tensors, *group.parameters, *group.buffers)}
    return found


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
