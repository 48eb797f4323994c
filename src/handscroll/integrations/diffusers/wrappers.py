"""What PyTorch puts around a module, taken off again."""

from __future__ import annotations

from typing import Any

from torch import nn

# The wrapper's class, and the name under which it holds the module.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
}


def unwrapped(module: Any) -> Any:
    """The module itself, without what torch.compile or data parallelism put around it."""
    while (name := _WRAPPERS.get(type(module).__name__)) is not None and isinstance(module, nn.Module):
        module = getattr(module, name)
    return module
