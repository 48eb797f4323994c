"""What a user asks for: one frozen `Request`, checked as far as it can be without a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from handscroll.errors import PromptError, UsageError
from handscroll.units import MAX_SIDE_PX, MIN_COMPOSE_PX, check_range, check_side

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECODES = ("rows", "whole", "tiled", "patch")
MAX_PROMPT_CHARACTERS = 20_000
MAX_SEED = 2**63 - 1

DEFAULT_MODEL = "tiny-landscape"


@dataclass(frozen=True)
class Request:
    """A picture, or `count` pictures of consecutive seeds, from one prompt.

    None stands for the checkpoint's own default (size, steps, guidance) or a random choice (seed). Sizes are pixels:
    those that are no multiple of the autoencoder's factor are rendered larger and cropped. `patches` is the number of
    row patches of decode='patch'. `strip_rows` is the strip height of decode='rows', None lets the size decide.
    `memory_bytes` is the budget that the run has to stay within; None takes what is fastest on this machine.
    `compose_px`: a much larger picture is composed at about this size squared and then grows; 0 for never, None as the
    checkpoint does.
    """

    prompt: str
    negative: str = ""
    model: str = DEFAULT_MODEL
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int = 1
    precision: str = "auto"
    device: str = "auto"
    decode: str = "rows"
    patches: int = 32
    strip_rows: int | None = None
    memory_bytes: int | None = None
    compose_px: int | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        check_text("negative prompt", self.negative)
        for name, side_px in (("width", self.width), ("height", self.height)):
            if side_px is not None:
                check_side(name, side_px)
        check_range("steps", self.steps, 1, 1000)
        check_range("guidance", self.guidance, 0, 1000)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("count", self.count, 1, 10_000)
        if self.seed is not None:
            check_range("the last picture's seed", self.seed + self.count - 1, 0, MAX_SEED)
        check_range("patches", self.patches, 1, 65_536)
        check_range("strip rows", self.strip_rows, 1, 1_000_000)
        check_range("memory", self.memory_bytes, 1, 2**60)
        if self.memory_bytes is not None and self.decode != "rows":
            raise UsageError(
                f"a memory budget is kept by --decode rows alone; leave out --memory or --decode {self.decode}"
            )
        if self.compose_px:
            check_range("compose", self.compose_px, MIN_COMPOSE_PX, MAX_SIDE_PX)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("decode", self.decode, DECODES)
        check_device(self.device)


def check_prompt(prompt: str) -> None:
    """Raises PromptError for a prompt that says nothing, or more than any text encoder reads."""
    if not prompt.strip():
        raise PromptError("the prompt is empty; say in a few words what the picture should show")
    check_text("prompt", prompt)


def check_text(what: str, text: str) -> None:
    """Raises PromptError for a text that is too long, or was not UTF-8 where it came from."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PromptError(
            f"the {what} has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are taken "
            "(models read about the first 300 tokens, some 1,500 characters)"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"the {what} is not valid UTF-8 text") from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError for a word that is not one of the choices."""
    if value not in choices:
        raise UsageError(f"{name} {value!r} is not known; use one of {', '.join(choices)}")


def check_device(device: str) -> None:
    """Raises UsageError for a device name of another form than auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")


def random_seed() -> int:
    """A seed for those who gave none, short enough to be typed again: the seeds that other image tools take too."""
    import secrets

    return secrets.randbelow(2**32)


def indexed(path: Path, index: int, count: int) -> Path:
    """Where picture `index` of `count` goes: the path itself for a single one, else `name-1.png`, `name-2.png`, ..."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
