"""The stage table: every stage of a run once, for plans, progress bars, results, retries and benchmarks alike.

A stage is what a user sees happen. It consists of parts that are planned apart: a picture that grows is decoded and
encoded again while it is denoised.
"""

from __future__ import annotations

from dataclasses import dataclass

from handscroll.plan.inputs import MIB


@dataclass(frozen=True, slots=True)
class Part:
    """What is planned apart. `field`: where it stands in a `Plan`.

    folder: the component's folder in a checkpoint, whose weights it reads. component: that component as `Precision`
    names it. module: which of its modules. cpu_extra_bytes: what it takes of a CPU's process beside tensors: code that
    is touched for the first time, heaps of threads, oneDNN's scratch and compiled kernels, the file writer.
    """

    name: str
    field: str
    folder: str
    component: str
    module: str
    cpu_extra_bytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """`name` in JSON, events and plans; `title` for people: 'out of memory while {title}'.

    parts: in the order in which they run. unit: what its progress counts. per_picture: whether every picture of a
    request goes through it, or all together.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    unit: str
    per_picture: bool

    @property
    def components(self) -> tuple[str, ...]:
        """Whose precision it runs in, its own component first."""
        own = next(part.component for part in self.parts if part.name == self.name)
        return tuple(dict.fromkeys([own, *(part.component for part in self.parts)]))


TEXT_PART = Part("text", "text", "text_encoder", "text_encoder", "text_encoder", 32 * MIB)
ENCODE_PART = Part("encode", "encoding", "vae", "autoencoder", "encoder", 68 * MIB)
DENOISE_PART = Part("denoise", "denoise", "transformer", "transformer", "transformer", 40 * MIB)
DECODE_PART = Part("decode", "decoding", "vae", "autoencoder", "decoder", 68 * MIB)

TEXT = Stage("text", "reading the prompt", (TEXT_PART,), "prompts", per_picture=False)
DENOISE = Stage("denoise", "denoising", (ENCODE_PART, DENOISE_PART), "steps", per_picture=True)
DECODE = Stage("decode", "decoding", (DECODE_PART,), "rows", per_picture=True)

STAGES = (TEXT, DENOISE, DECODE)
BY_NAME = {stage.name: stage for stage in STAGES}
