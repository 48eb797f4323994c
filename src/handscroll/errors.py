"""Every error that handscroll raises on purpose, under one root.

HandscrollError                   exit 1   something failed; the message says what to do
├── UsageError                    exit 2   the request itself cannot be meant
│   ├── PromptError                        empty, or far too long
│   ├── SizeError                          not a size, or one that a format or model cannot hold
│   ├── UnknownModelError                  no such short name, folder or hub id
│   └── FormatError                        no writer for this file name
├── CheckpointError               exit 1   a checkpoint's files are missing, truncated, mismatched or not safetensors
│   └── FetchError                         the hub could not be reached and the files are not here
│       └── UnconfirmedFetchError          a file names a model that is not here, and nobody said that it may be fetched
├── OutputError                   exit 1   the picture cannot be written where it was asked for
├── RunFolderError                exit 1   a run folder is broken, foreign, or of another job
│   └── BusyError                          another process works on the same run
├── NumericsError                 exit 1   a stage produced NaN or infinity
├── OutOfMemoryError              exit 1   memory ran out, also for the smallest row blocks
├── BudgetError                   exit 3   does not fit the memory budget; carries minimum_bytes
└── Cancelled                     exit 130 whoever listens to the job ended it; nothing is wrong

The command line prints the message alone, on one line, and leaves with `exit_code`; `--json` prints `as_dict()`.
"""

from __future__ import annotations

import errno
import re
from typing import Any

# What a terminal obeys or lays out anew instead of showing it: control characters, marks of the direction of writing,
# ends of lines; and halves of characters, which no file or terminal takes.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with whatever is not shown as it is written out: `\\x1b`, `\\n`. Names in files may hold anything."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class HandscrollError(Exception):
    """Root of the tree. The message is one line, without control characters, and says what to do."""

    code = "failed"
    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))

    def as_dict(self) -> dict[str, Any]:
        """The error as `--json` shows it: `code`, `message`, and what a branch adds."""
        return {"code": self.code, "message": str(self)}


class UsageError(HandscrollError):
    """The request itself cannot be meant; trying again unchanged will not help."""

    code = "bad_usage"
    exit_code = 2


class PromptError(UsageError):
    """A prompt that is empty or far too long."""

    code = "bad_prompt"


class SizeError(UsageError):
    """A picture size that is not a size, or that a format or model cannot hold."""

    code = "bad_size"


class UnknownModelError(UsageError):
    """Neither a short name, a checkpoint folder nor a hub id."""

    code = "unknown_model"


class FormatError(UsageError):
    """No writer for this file name."""

    code = "unknown_format"


class CheckpointError(HandscrollError):
    """A checkpoint's files are missing, truncated, mismatched or not safetensors."""

    code = "bad_checkpoint"


class FetchError(CheckpointError):
    """The hub could not be reached and the files are not on this machine."""

    code = "cannot_fetch"


class UnconfirmedFetchError(FetchError):
    """A file, and not the user, names a model that would have to be fetched. `hub_id` is that model's."""

    code = "fetch_not_confirmed"

    def __init__(self, message: str, hub_id: str) -> None:
        super().__init__(message)
        self.hub_id = hub_id

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "hub_id": self.hub_id}


class OutputError(HandscrollError):
    """The picture cannot be written where it was asked for."""

    code = "cannot_write"


class RunFolderError(HandscrollError):
    """A run folder that is broken, foreign, or cannot be gone on from."""

    code = "bad_run_folder"


class BusyError(RunFolderError):
    """Another process works on the same run."""

    code = "busy"


class NumericsError(HandscrollError):
    """A stage produced NaN or infinity.

    `component`: whose numbers they were, as `Precision` names it, or `latent`. Trying again unchanged will not help.
    """

    code = "not_finite"

    def __init__(self, message: str, component: str | None = None) -> None:
        super().__init__(message)
        self.component = component


class OutOfMemoryError(HandscrollError):
    """Memory ran out where a plan had counted on it, also for the least that a stage can take."""

    code = "out_of_memory"


class BudgetError(HandscrollError):
    """The request does not fit the memory budget. `minimum_bytes` is the smallest budget that would do."""

    code = "budget_too_small"
    exit_code = 3

    def __init__(self, message: str, minimum_bytes: int) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "minimum_bytes": self.minimum_bytes}


class Cancelled(HandscrollError):
    """A job was ended by whoever listens to it: raise it from a listener. What was finished is kept, as after Ctrl-C.

    A listener may raise anything else as well; it comes out of the job unchanged.
    """

    code = "cancelled"
    exit_code = 130

    def __init__(self, message: str = "cancelled") -> None:
        super().__init__(message)


# What torch, libvips, their libraries, the C++ runtime and the system say in errors that have no type of their own.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "memory error",  # libwebp
    "insufficient memory",  # libjpeg
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
    "unable to allocate",
    "failed to allocate",
    "error creating thread",  # a thread's stack finds no room
    "can't start new thread",
)


def says_out_of_memory(text: str) -> bool:
    """Whether that is how a library says that memory ran out."""
    return any(mark.lower() in text.lower() for mark in _OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's own error, CUDA's, the system's, or what torch and pyvips say in others."""
    if isinstance(error, HandscrollError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    untyped = isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] == "pyvips"
    return untyped and says_out_of_memory(str(error))
