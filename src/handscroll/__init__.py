"""handscroll: exact row-by-row text-to-image with the Sana family. Importing it loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from handscroll.errors import (
    BudgetError,
    BusyError,
    Cancelled,
    CheckpointError,
    FetchError,
    FormatError,
    HandscrollError,
    NumericsError,
    OutOfMemoryError,
    OutputError,
    PromptError,
    RunFolderError,
    SizeError,
    UnconfirmedFetchError,
    UnknownModelError,
    UsageError,
)
from handscroll.events import Progress
from handscroll.request import Request
from handscroll.version import __version__

if TYPE_CHECKING:
    from handscroll.api import Handscroll, Picture
    from handscroll.integrations.diffusers import attach, detach
    from handscroll.jobs.result import Result
    from handscroll.pipeline import decode_latent, generate, resume

__all__ = [
    "BudgetError",
    "BusyError",
    "Cancelled",
    "CheckpointError",
    "FetchError",
    "FormatError",
    "Handscroll",
    "HandscrollError",
    "NumericsError",
    "OutOfMemoryError",
    "OutputError",
    "Picture",
    "Progress",
    "PromptError",
    "Request",
    "Result",
    "RunFolderError",
    "SizeError",
    "UnconfirmedFetchError",
    "UnknownModelError",
    "UsageError",
    "__version__",
    "attach",
    "decode_latent",
    "detach",
    "generate",
    "resume",
]

_LAZY = {
    "Handscroll": "handscroll.api",
    "Picture": "handscroll.api",
    "Result": "handscroll.jobs.result",
    "decode_latent": "handscroll.pipeline",
    "generate": "handscroll.pipeline",
    "resume": "handscroll.pipeline",
    "attach": "handscroll.integrations.diffusers",
    "detach": "handscroll.integrations.diffusers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
