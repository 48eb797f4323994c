"""What planning knows of a machine: memory, and how fast it computes and moves bytes (runtime/devices.py measures)."""

from __future__ import annotations

from dataclasses import dataclass, replace

MIB = 2**20


def heights_up_to(most: int) -> list[int]:
    """Heights of row blocks worth choosing from: powers of two, and the most itself."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


@dataclass(frozen=True, slots=True)
class Rates:
    """A device's speed, each in units a second. The defaults are cautious; plans only compare them with each other."""

    fp32_flops: float = 2e11
    bf16_flops: float = 2e11
    fp16_flops: float = 2e11
    weight_bytes: float = 2e9  # from a checkpoint's file to where layers run
    disk_bytes: float = 5e8  # to or from the scratch folder
    host_bytes: float = 1e10  # between a device and the host's memory

    def flops(self, precision: str) -> float:
        """FLOP a second in fp32, bf16 or fp16."""
        return float(getattr(self, f"{precision}_flops"))


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device that a request resolved to, `cpu` or `cuda:N`.

    bf16_is_faster: whether a CPU multiplies bf16 faster than fp32. has_fp8: whether the device multiplies fp8.
    base_bytes: what is held before the first stage and counts towards the budget: on a CPU all that the process holds,
    libraries included, None where the system does not tell; on a CUDA device what the process has allocated there
    already. free_bytes: what stages may take where no budget is given, those base_bytes included, None if the system
    does not tell. host_bytes: room in the host's memory beside a CUDA device, for layers and maps together.
    scratch_bytes: room for maps in the scratch folder.
    """

    device: str
    bf16_is_faster: bool = False
    base_bytes: int | None = 0
    free_bytes: int | None = None
    host_bytes: int = 0
    scratch_bytes: int = 2**62
    rates: Rates = Rates()
    has_fp8: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def shared(self, processes: int) -> Hardware:
        """What each of so many processes of a host has, of what they share: memory on a CPU, the host's, the disk."""
        free_bytes = self.free_bytes
        if free_bytes is not None and not self.is_cuda:
            own_bytes = self.base_bytes or 0
            free_bytes = own_bytes + max(0, free_bytes - own_bytes) // processes
        return replace(
            self,
            free_bytes=free_bytes,
            host_bytes=self.host_bytes // processes,
            scratch_bytes=self.scratch_bytes // processes,
        )


@dataclass(frozen=True, slots=True)
class TextRead:
    """How much of a prompt the model reads, in tokens of its own: without an instruction and special tokens.

    `ends`: the last words that are read, where it is cut.
    """

    tokens: int
    read: int
    ends: str = ""

    @property
    def is_cut(self) -> bool:
        return self.read < self.tokens

    def as_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens, "read": self.read}

    def __str__(self) -> str:
        return f"{self.read} of {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What a plan is made from beside spec and request: the hardware, and how long the prompts are.

    tokens: of the longest prompt as the text encoder will see it; None where there is none to encode or denoise by, as
    when a kept latent is decoded. tokenizer_bytes: what the tokenizer takes while prompts are encoded. prompt_read and
    negative_read: how much of each is read; None where that is not known. notices: what the user should know of the
    checkpoint, a line each. keeps_modules: whether modules may stay in memory between this job and the next, where
    there is room for them. ranks: devices that make a band of every picture each, all like `hardware`. speeds: how fast
    each of them is, beside the others; empty where they are alike.
    """

    hardware: Hardware
    tokens: int | None = None
    tokenizer_bytes: int = 0
    suffix: str = ".png"
    prompt_read: TextRead | None = None
    negative_read: TextRead | None = None
    notices: tuple[str, ...] = ()
    keeps_modules: bool = False
    ranks: int = 1
    speeds: tuple[float, ...] = ()
