"""What has to be known of a request and this machine before a plan can be made; no weight is read for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import PlanInputs
from handscroll.request import Request
from handscroll.runtime.device import find_hardware, import_libraries, scratch_folder
from handscroll.runtime.memory import release
from handscroll.runtime.modules import load_tokenizer
from handscroll.runtime.text import count_tokens, instruction_of
from handscroll.system import resident_bytes


def probe(spec: CheckpointSpec, request: Request, output: Path | None = None, *, prompts: bool = True) -> PlanInputs:
    """The device, its speed and free memory, and the length of the prompts, which the tokenizer is read for.

    `output` is the picture's path, beside which maps may be put on disk; without it, in the system's temporary folder.
    Without `prompts` only decoding is looked at.
    Raises UsageError for a device that is not here, CheckpointError for a tokenizer that cannot be read.
    """
    import_libraries()
    tokens, tokenizer_bytes = None, 0
    if prompts:
        before_bytes = resident_bytes() or 0
        tokenizer = load_tokenizer(spec)
        tokens = max(
            count_tokens(spec, tokenizer, request.prompt, instruction_of(spec)),
            count_tokens(spec, tokenizer, request.negative),
        )
        tokenizer_bytes = max(0, (resident_bytes() or 0) - before_bytes)
        del tokenizer
        release("cpu")
    folder = scratch_folder(None if output is None else output.absolute().parent)
    hardware = find_hardware(request.device, request.precision, folder or Path(tempfile.gettempdir()))
    return PlanInputs(hardware, tokens, tokenizer_bytes, ".png" if output is None else output.suffix)
