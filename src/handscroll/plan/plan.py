"""What will run: a frozen `Plan`, with every default filled in and every choice made. `search.py` makes it."""

from __future__ import annotations

from dataclasses import dataclass

from handscroll.plan.decode import DecodeStage
from handscroll.plan.denoise import DenoiseStage
from handscroll.plan.inputs import TextRead
from handscroll.plan.precision import Precision
from handscroll.plan.stages import STAGES
from handscroll.plan.text import TextStage

PartPlan = TextStage | DenoiseStage | DecodeStage


@dataclass(frozen=True)
class Plan:
    """What will run. Sizes in pixels; `latent_height` and `latent_width` in latent pixels; `seeds` one a picture, none
    for a smaller picture on the way.

    `text`, `denoise` and `decoding` say how each stage runs; their bytes are of the whole process on a CPU, of the
    allocator on a CUDA device. A stage is None where it is not part of the job, `decoding` also for the ways that
    others decode, which keep no budget.

    A picture that grows has a `smaller` one, which is decoded, enlarged, encoded as `encoding` says and denoised on
    from step `first_step` of its schedule. `composed` says, as 512x512, at which size it began. `kept` names the
    modules that are in memory whole, from one job to the next and whatever stage is at work (`Part.module`).

    `prompt_read` and `negative_read` say how much of them the model reads, None where that is not known or not done.
    `notices` are lines for the user: what was asked for and is not used. `ranks`: so many devices make a band of every
    picture each, in proportion to `speeds` where there are any; bytes and seconds are those of the one with most to do.
    """

    width: int
    height: int
    latent_width: int
    latent_height: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    precision: Precision
    device: str
    decode: str
    patches: int
    strip_rows: int | None
    budget_bytes: int | None = None
    text: TextStage | None = None
    denoise: DenoiseStage | None = None
    decoding: DecodeStage | None = None
    encoding: DecodeStage | None = None
    smaller: Plan | None = None
    first_step: int = 0
    composed: str = ""
    prompt_read: TextRead | None = None
    negative_read: TextRead | None = None
    notices: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    ranks: int = 1
    speeds: tuple[float, ...] = ()

    @property
    def sizes(self) -> tuple[Plan, ...]:
        """The plans through which the picture grows, smallest first; the last is this one."""
        return (self,) if self.smaller is None else (*self.smaller.sizes, self)

    @property
    def on_the_way(self) -> bool:
        """Whether this is a smaller picture from which another grows."""
        return not self.seeds

    @property
    def steps_here(self) -> int:
        """How many steps of the schedule are made at this size."""
        return self.steps - self.first_step

    @property
    def total_steps(self) -> int:
        """Of all sizes together."""
        return sum(plan.steps_here for plan in self.sizes)

    @property
    def steps_before(self) -> int:
        """How many of the total come before step 0 of this size's schedule would."""
        return self.total_steps - self.steps

    @property
    def guided(self) -> bool:
        """Whether each step needs a second forward with the negative prompt (never for few-step models)."""
        return self.guidance > 1

    @property
    def exact(self) -> bool:
        """Whether the picture is the one that the whole network makes: not where it is tiled, or weights quantised."""
        return self.decode != "tiled" and self.precision.exact

    @property
    def planned_bytes(self) -> dict[str, int]:
        """The peak of every stage that was planned, by its name."""
        return {name: max(part.peak_bytes for part in parts) for name, parts in self.parts.items() if parts}

    @property
    def planned_seconds(self) -> dict[str, float]:
        """Of every stage that was planned, by the hardware's rates."""
        return {name: sum(part.seconds for part in parts) for name, parts in self.parts.items() if parts}

    @property
    def own_parts(self) -> dict[str, PartPlan]:
        """What was planned for this size alone, by the parts' names in the order in which they run."""
        planned = {part.name: getattr(self, part.field) for stage in STAGES for part in stage.parts}
        return {name: part for name, part in planned.items() if part is not None}

    @property
    def parts(self) -> dict[str, list[PartPlan]]:
        """What each stage consists of, one after the other; nothing where it was not planned.

        Denoising a picture that grows includes all that happens to the smaller ones.
        """
        return {stage.name: self._parts_of([part.name for part in stage.parts]) for stage in STAGES}

    def _parts_of(self, names: list[str]) -> list[PartPlan]:
        through = self.sizes[:-1] if "denoise" in names else ()
        smaller = [part for plan in through for name, part in plan.own_parts.items()]
        return smaller + [part for name, part in self.own_parts.items() if name in names]

    @property
    def planned_peak_bytes(self) -> int | None:
        """The most of any stage; None where one of them cannot be planned."""
        return None if self.decode != "rows" else max(self.planned_bytes.values())
