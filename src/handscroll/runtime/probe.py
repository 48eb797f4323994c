"""What has to be known of a request and this machine before a plan can be made; no weight is read for it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import PlanInputs, TextRead
from handscroll.request import Request
from handscroll.runtime.device import find_hardware, import_libraries, scratch_folder
from handscroll.runtime.memory import release
from handscroll.runtime.modules import load_tokenizer
from handscroll.runtime.text import count_tokens, instruction_of, most_tokens, read_of
from handscroll.runtime.trial import settings_not_taken, try_scheduler
from handscroll.system import resident_bytes

NO_TOKENIZER = "its tokenizer is not here, so that the prompt is planned with the most tokens that it can have"


@dataclass(frozen=True)
class _Prompts:
    """tokens: of the longer text as the encoder gets it. prompt and negative: how much is read, None if not known."""

    tokens: int | None = None
    tokenizer_bytes: int = 0
    prompt: TextRead | None = None
    negative: TextRead | None = None


def probe(
    spec: CheckpointSpec, request: Request, output: Path | None = None, *, prompts: bool = True, processes: int = 1
) -> PlanInputs:
    """The device, its speed and free memory, and the length of the prompts, which the tokenizer is read for.

    `output` is the picture's path, beside which maps may be put on disk; without it, in the system's temporary folder.
    Without `prompts` only decoding is looked at. processes: how many like this one share the machine's memory.
    Raises UsageError for a device that is not here or a number of steps that does not suit, CheckpointError for a
    tokenizer that cannot be read or settings that do not run.
    """
    import_libraries()
    notices = spec.remarks
    found = _Prompts()
    if prompts:
        try_scheduler(spec, request.steps or spec.default_steps)
        notices += settings_not_taken(spec, "transformer", "vae", "scheduler")
        found = _most(spec, request) if spec.from_figures else _counted(spec, request)
        notices += (NO_TOKENIZER,) if spec.from_figures else ()
    else:
        notices += settings_not_taken(spec, "vae")
    folder = scratch_folder(None if output is None else output.absolute().parent)
    hardware = find_hardware(request.device, folder or Path(tempfile.gettempdir())).shared(processes)
    suffix = ".png" if output is None else output.suffix
    return PlanInputs(
        hardware,
        found.tokens,
        found.tokenizer_bytes,
        suffix,
        prompt_read=found.prompt,
        negative_read=found.negative,
        notices=tuple(notices),
    )


def _counted(spec: CheckpointSpec, request: Request) -> _Prompts:
    before_bytes = resident_bytes() or 0
    tokenizer, instruction = load_tokenizer(spec), instruction_of(spec)
    prompt = read_of(spec, tokenizer, request.prompt, instruction)
    negative = read_of(spec, tokenizer, request.negative)
    tokens = max(
        count_tokens(spec, tokenizer, request.prompt, instruction), count_tokens(spec, tokenizer, request.negative)
    )
    tokenizer_bytes = max(0, (resident_bytes() or 0) - before_bytes)
    del tokenizer
    release("cpu")
    return _Prompts(tokens, tokenizer_bytes, prompt, negative)


def _most(spec: CheckpointSpec, request: Request) -> _Prompts:
    return _Prompts(max(most_tokens(spec, request.prompt, instruction_of(spec)), most_tokens(spec, request.negative)))
