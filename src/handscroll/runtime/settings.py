"""What is set for all of PyTorch while a job computes, and put back when it does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TypeVar

import torch

from handscroll.runtime.arithmetic import full_fp32
from handscroll.runtime.memory import enforced

Item = TypeVar("Item")


@contextmanager
def job_settings(device: str, budget_bytes: int | None) -> Iterator[None]:
    """fp32 that is fp32, no autocast, an allocator that keeps to the budget, and the job's device as the current one.

    Nothing here relies on the current device; libraries may.
    """
    with contextlib.ExitStack() as undo:
        if device.startswith("cuda"):
            undo.enter_context(torch.cuda.device(device))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                undo.enter_context(torch.autocast(kind, enabled=False))
        undo.enter_context(full_fp32(device))
        undo.enter_context(enforced(device, budget_bytes))
        yield


def made_within(
    settings: Callable[[], AbstractContextManager[object]], items: Generator[Item, None, None]
) -> Iterator[Item]:
    """The items, each made inside the settings, which are put back while the caller has it."""
    with closing(items):
        while True:
            with settings():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
            del item
