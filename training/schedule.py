"""What the trainings share: device, precision, learning rate by step, running average of the weights, checkpoints."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Shared = TypeVar("Shared", float, Tensor)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; there, products of fp32 matrices may round their factors to TF32."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """`bf16`: products and convolutions round their factors to bfloat16; weights and sums stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.06) -> float:
    """Up in a line, then down along a cosine to `floor` of the peak. Steps, not seconds: a pause costs nothing."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Average(Generic[Model]):
    """A running average of a model's weights over about `horizon` steps."""

    def __init__(self, model: Model, horizon: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.horizon = horizon
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        self.updates += 1
        # Short at first, so that the start is forgotten.
        share = 1 / min(self.horizon, 10 + self.updates / 4)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)
        for kept, current in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(current)


def plateau(step: int, steps: int, peak: float, warmup: int, decay: float = 0.3) -> float:
    """Up in a line, level, and down in a line over the last `decay` of the steps.

    A level rate does not need to know the end: a run may be given more or fewer steps while it is under way.
    """
    rising = (step + 1) / warmup
    falling = (steps - step) / (decay * steps)
    return peak * max(min(rising, falling, 1.0), 0.01)


def shifted(share: Shared, shift: float) -> Shared:
    """The sigma that a flow schedule of some shift has at a share, from 0 to 1, of its way."""
    return shift * share / (1 + (shift - 1) * share)


def add_step_options(
    parser: argparse.ArgumentParser, *, steps: int, rate: float, decay: float, horizon: int, tokens: str
) -> None:
    """What a training of the transformer is asked; `tokens` says whose number of tokens is meant."""
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tokens", type=int, default=1024, help=tokens)
    parser.add_argument("--workers", type=int, default=2, help="on a CPU as many as cores, on a GPU 1")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--decay", type=float, default=decay, help="the share of the steps over which the rate falls")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--horizon", type=int, default=horizon, help="of the running average, in steps")


def prepare_process(options: argparse.Namespace) -> None:
    """Sets what holds for a whole process in which the transformer is trained."""
    torch.set_flush_denormal(True)
    # On a CPU the fused kernel's backward is slower than plain products where keys are as few as words; the switch is
    # named after CUDA, and every device heeds it.
    torch.backends.cuda.enable_flash_sdp(pick_device(options.device).type == "cuda")
    if options.workers > 1:
        torch.set_num_threads(1)


def set_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Sequence[Tensor]]) -> None:
    """Gives each parameter the mean of what several workers found for it."""
    for parameter, *parts in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.stack(parts).mean(dim=0) if len(parts) > 1 else parts[0]


def save_checkpoint(
    path: Path, step: int, model: Model, average: Average[Model], optimiser: torch.optim.Optimizer
) -> None:
    """Writes all that a training goes on from; the file is replaced once it is whole."""
    part = path.with_suffix(".part")
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, part)
    part.rename(path)


def load_checkpoint(
    path: Path, device: torch.device, model: Model, average: Average[Model], optimiser: torch.optim.Optimizer
) -> int:
    """Puts a training back to where `save_checkpoint` left it. Returns the step."""
    saved = torch.load(path, map_location=device)
    model.load_state_dict(saved["model"])
    average.model.load_state_dict(saved["average"])
    average.updates = saved["step"]
    optimiser.load_state_dict(saved["optimiser"])
    return saved["step"]
