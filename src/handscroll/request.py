"""What a user asks for: one frozen `Request`, which is also the table of options, checked without a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from handscroll.errors import PromptError, UsageError
from handscroll.options import MAKING, check_fields, fields_of, option, options_of, within
from handscroll.units import (
    MAX_SIDE_PX,
    MIN_COMPOSE_PX,
    check_range,
    check_side,
    parse_bytes,
    parse_compose,
    parse_size,
    shown,
)

COMPUTED = ("fp32", "bf16", "fp16")
STORED = ("int8", "int8-weights", "int4", "fp8")
TextPrecisionName = Literal["auto", "int8-weights", "int4"]
DecodeName = Literal["rows", "whole", "tiled", "patch"]
MAX_PROMPT_CHARACTERS = 20_000
MAX_SEED = 2**64 - 1
RANDOM_SEED = -1  # as other tools write it
DEFAULT_PATCHES = 32
BYTE_ORDER_MARK = "\ufeff"

DEFAULT_MODEL = "tiny-landscape"


def check_negative(name: str, text: str) -> None:
    """Raises PromptError as `check_text`."""
    check_text("negative prompt", text)


def check_device(name: str, device: str) -> None:
    """Raises UsageError for a device of another form than auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise UsageError(f"{name} {shown(device)} is not known; use auto, cpu, cuda or cuda:N")


def check_devices(name: str, devices: str) -> None:
    """Raises UsageError for what is neither a number of devices, nor cpu:N, nor a list of CUDA devices."""
    if re.fullmatch(r"cpu:[1-9][0-9]{0,3}|[1-9][0-9]{0,3}|cuda:[0-9]{1,4}(,cuda:[0-9]{1,4})*", devices):
        listed = devices.split(",")
        if twice := next((each for each in listed if listed.count(each) > 1), None):
            raise UsageError(f"{name} {shown(devices)} names {twice} twice; give each device once")
        return
    mixed = "; processors and GPUs cannot be mixed" if "cpu" in devices and "cuda" in devices else ""
    raise UsageError(f"{name} {shown(devices)} is not known; use a number, cpu:N, or cuda:0,cuda:2{mixed}")


def count_devices(devices: str) -> int:
    """How many devices, and so ranks, are asked for."""
    return len(devices.split(",")) if devices.startswith("cuda") else int(devices.removeprefix("cpu:"))


def device_of_rank(devices: str, rank: int) -> str:
    """What a rank of these runs on: `cpu`, `cuda:N`, or `auto` where only their number was given."""
    if devices.startswith("cuda"):
        return devices.split(",")[rank]
    return "cpu" if devices.startswith("cpu") else "auto"


def check_precision(name: str, precision: str) -> None:
    """Raises UsageError for what is neither a type, nor what weights are kept in, nor one with the other behind a +."""
    stored, plus, computed = precision.partition("+")
    if precision != "auto" and precision not in COMPUTED and (stored not in STORED or bool(plus) != bool(computed)):
        known = ", ".join(("auto", *COMPUTED, *STORED))
        raise UsageError(f"{name} {shown(precision)} is not known; use {known}, or two of them as int8+bf16")
    if plus and computed not in COMPUTED:
        raise UsageError(f"{name} {shown(precision)} is not known; after the + comes one of {', '.join(COMPUTED)}")


def check_seed(name: str, seed: int) -> None:
    """Raises UsageError for what is neither a seed nor -1, which other tools write for a random one."""
    if seed != RANDOM_SEED and not 0 <= seed <= MAX_SEED:
        raise UsageError(
            f"{name} {shown(seed)} is out of range; use 0 to {MAX_SEED}, or {RANDOM_SEED} for a random one"
        )


def seed_of(given: Any) -> Any:
    """The seed of a torch.Generator for the CPU from which nothing was drawn yet; else what was given.

    One that has drawn, or draws on another device, would draw what belongs to no seed here. It is left as it is.
    """
    if not hasattr(given, "initial_seed") or getattr(given.device, "type", None) != "cpu":
        return given
    seed = given.initial_seed()
    fresh = type(given)().manual_seed(seed)
    return seed if bool((fresh.get_state() == given.get_state()).all()) else given


def seed_hint(given: Any) -> str:
    """What to do with a generator whose seed is not what it stands for."""
    if not hasattr(given, "initial_seed"):
        return ""
    return "; this torch.Generator has drawn already or is not the CPU's: give a seed, as generator.initial_seed()"


def check_compose(name: str, side_px: int) -> None:
    """Raises UsageError for a side that nothing is composed at; 0 stands for never."""
    if side_px:
        check_range(name, side_px, MIN_COMPOSE_PX, MAX_SIDE_PX)


# Beside those that make a picture (`MAKING`): what opens a model, and what turns a latent into a picture.
OPENING = ("generate", "batch", "plan", "compare", "decode", "bench", "from_pretrained")
DECODING = ("generate", "batch", "compare", "decode", "scroll")


@dataclass(frozen=True)
class Request:
    """A picture, or `count` pictures of consecutive seeds, from one prompt. Every field but the prompt is an option.

    None stands for the checkpoint's own default (size, steps, guidance) or a random choice (seed; -1 becomes None). A
    seed is one of torch's, of which a CPU's noise takes the lowest 32 bits. `revision` is that of a model from the hub,
    which may also be given as `owner/name@REV`; None is the branch `main`. Sizes are pixels: those that are no multiple
    of the autoencoder's factor are rendered larger and cropped. `patches` is the number of row patches of
    decode='patch', None for 32. `strip_rows` is the row block height of decode='rows', None lets the size decide.
    `memory_bytes` is the budget that the run has to stay within; None takes what is fastest on this machine.
    `compose_px`: a much larger picture is composed at about this size squared and then grows; 0 for never, None as the
    checkpoint does.
    """

    prompt: str
    negative: str = option("", "What the picture should not show.", metavar="TEXT", check=check_negative)
    model: str = option(
        DEFAULT_MODEL,
        "What `models` lists, or yours.",
        metavar="NAME|FOLDER|HUB_ID",
        commands=("generate", "batch", "plan", "compare", "bench"),
        left_to={
            "decode": "Whose autoencoder to use. Left out, the one in the file.",
            "resume": "The run's own, named again. Left out, the one in the folder.",
        },
    )
    width: int | None = option(
        None,
        "Pixels: 4096x2048, or 4096 for a square. Left out, the model's.",
        name="size",
        metavar="WxH",
        check=check_side,
        parse=parse_size,
        commands=(*MAKING, "bench"),
    )
    height: int | None = option(None, name="size", check=check_side)
    steps: int | None = option(None, "Denoising steps. Left out, the model's.", metavar="N", check=within(1, 1000))
    guidance: float | None = option(
        None,
        "How closely to follow the prompt; above 1, each step takes two forwards. Left out, the model's.",
        metavar="F",
        check=within(0, 1000),
    )
    seed: int | None = option(
        None,
        "Same seed, same picture. Left out, or -1, random.",
        metavar="N",
        check=check_seed,
        understood=seed_of,
        hint=seed_hint,
        commands=("generate", "compare", "scroll"),
        left_to={"batch": "Same seed, same picture. Left out, or -1, made from each line: another for every line."},
    )
    count: int = option(
        1,
        "Pictures of consecutive seeds: FILE-1, FILE-2, ...",
        metavar="N",
        check=within(1, 10_000),
        commands=("generate",),
        left_to={"batch": "Pictures of every line, of consecutive seeds where it has one."},
    )
    precision: str = option(
        "auto",
        f"What to compute in, what to keep weights in ({', '.join(STORED)}), or both, as int8+bf16.",
        metavar="|".join(("auto", *COMPUTED, *STORED)),
        check=check_precision,
        commands=OPENING,
    )
    device: str = option(
        "auto",
        "What to compute on.",
        metavar="auto|cpu|cuda|cuda:N",
        check=check_device,
        commands=OPENING,
        left_to={"resume": "What to compute on. Left out, as before."},
    )
    decode: DecodeName = option(
        "rows",
        "From latent to pixels: by rows, exact in little memory; or as others do it, to compare: whole, exact; in "
        "blended tiles, inexact; with each convolution cut in patches, exact.",
        commands=DECODING,
    )
    patches: int | None = option(
        None, "Patches of --decode patch. Left out, 32.", metavar="N", check=within(1, 65_536), commands=DECODING
    )
    strip_rows: int | None = option(
        None,
        "Height of the row blocks of --decode rows: fewer take less memory. Left out, the size decides.",
        metavar="N",
        check=within(1, 1_000_000),
        commands=(*MAKING, "decode"),
    )
    memory_bytes: int | None = option(
        None,
        "Stay within 6GiB, 800MiB, ...: the whole process on a CPU, what PyTorch reserves on a GPU. Left out, as is "
        "fastest on this machine.",
        name="memory",
        metavar="SIZE",
        check=within(1, 2**60),
        parse=parse_bytes,
        commands=("generate", "batch", "plan", "compare", "decode", "from_pretrained"),
        left_to={"resume": "Stay within it. Left out, as before."},
    )
    compose_px: int | None = option(
        None,
        "Lay a much larger picture out at about this size squared, and let it grow from there: fewer things multiply, "
        "and it takes less time. auto: as the model does, off: at full size from the first step.",
        name="compose",
        metavar="auto|off|PIXELS",
        check=check_compose,
        parse=parse_compose,
        shown="auto",
    )
    revision: str | None = option(None, "Of a hub model: branch, tag or commit.", metavar="REV", commands=OPENING)
    text_precision: TextPrecisionName = option(
        "auto",
        "What to keep the text encoder's weights in.",
        commands=("generate", "batch", "plan", "compare", "from_pretrained"),
    )
    devices: str | None = option(
        None,
        "Make every picture on several devices, a band of rows each: how many, cpu:N for N processes, or a list. "
        "--memory is then of each.",
        metavar="N|cpu:N|cuda:A,cuda:B",
        check=check_devices,
        commands=("generate", "plan"),
        left_to={
            "resume": "Devices to go on with, as of `generate`; also more or fewer than before.",
            "batch": "Make every picture on so many devices, a band of rows each: a number, or cpu:N; no list.",
        },
    )

    @classmethod
    def of(cls, prompt: str, **options: Any) -> Self:
        """A request from options as the command line calls them: memory='2GiB', size='4096x2048', compose='off'.

        Values may be texts or Python's own, and the fields' names do too. Raises UsageError, also for a name that is
        not known.
        """
        return cls(prompt, **fields_of(cls, options))

    def as_arguments(self) -> list[str]:
        """What `handscroll generate` is called with, beside the prompt, to make this: the options that were given."""
        found = []
        for each in options_of(Request):
            values = [getattr(self, field) for field in each.fields]
            if each.is_for("generate") and None not in values and values != [""]:
                off = each.name == "compose" and values == [0]
                found.append(f"{each.flag}={'off' if off else 'x'.join(map(str, values))}")
        return found

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        own = {"prompt": str(self.prompt), "negative": "" if self.negative is None else self.negative}
        for field, text in own.items():
            object.__setattr__(self, field, text.removeprefix(BYTE_ORDER_MARK) if isinstance(text, str) else text)
        check_fields(self)
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        if self.seed is not None:
            check_range("the last picture's seed", self.seed + self.count - 1, 0, MAX_SEED)
        if self.devices is not None and self.device != "auto":
            raise UsageError("--device names one device and --devices several; leave one of them out")
        if self.devices is not None and self.decode != "rows":
            raise UsageError(f"--devices decodes by rows alone; leave out --decode {self.decode}")
        if self.memory_bytes is not None and self.decode != "rows":
            raise UsageError(
                f"a memory budget is kept by --decode rows alone; leave out --memory or --decode {self.decode}"
            )


def check_prompt(prompt: object) -> None:
    """Raises PromptError for a prompt that says nothing, or more than any text encoder reads."""
    if isinstance(prompt, list | tuple):
        raise PromptError(
            f"the prompt is a list of {len(prompt)}; a request has one prompt: make one for each, or call Handscroll, "
            "which takes a list"
        )
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt {shown(prompt)} is not text")
    if not prompt.removeprefix(BYTE_ORDER_MARK).strip():
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


def as_request(given: object) -> Request:
    """A request that somebody handed over. Raises UsageError for anything else."""
    if not isinstance(given, Request):
        raise UsageError(f"request {shown(given)} is not a Request; make one with Request.of(prompt, ...)")
    return given


def random_seed() -> int:
    """A seed for those who gave none, short enough to be typed again: the seeds that other image tools take too."""
    import secrets

    return secrets.randbelow(2**32)


def indexed(path: Path, index: int, count: int) -> Path:
    """Where picture `index` of `count` goes: the path itself for a single one, else `name-1.png`, `name-2.png`, ..."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
