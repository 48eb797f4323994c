"""The models of one checkpoint at work: each is opened when a stage asks for it, and the one before is freed first.

What is opened has names and shapes; its weights are read layer by layer as they are needed, but for what the plan keeps
resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from handscroll.banded.autoencoder import Materialize
from handscroll.banded.transformer import Branch, predict
from handscroll.errors import HandscrollError
from handscroll.events import OnEvent, Progress, ignore, pulse
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.plan import Plan
from handscroll.plan.stages import DENOISE, TEXT
from handscroll.plan.store import Store
from handscroll.runtime.maps import new_map
from handscroll.runtime.memory import release
from handscroll.runtime.modules import Component, Half, open_module
from handscroll.runtime.text_encoder import open_text_encoder
from handscroll.weights.dtypes import DTYPES
from handscroll.weights.stream import WeightStream


@dataclass(frozen=True, eq=False)
class Opened:
    """A module and the stream that fills it. `resident`: all of it is in memory, and nothing need be read."""

    module: Any
    stream: WeightStream
    resident: bool = False

    @property
    def materialize(self) -> Materialize | None:
        """Makes submodules real while its context is entered; None where all of them are."""
        return None if self.resident else lambda modules: self.stream.materialize(*modules)


class Transformer:
    """A checkpoint's transformer as a plan runs it: in row blocks, layer by layer.

    `scratch`: where its maps go. `pulse` is called before each layer.
    """

    def __init__(self, opened: Opened, plan: Plan, scratch: Path | None, pulse: Callable[[str], None]) -> None:
        self.module, self.stream, self.plan, self.scratch = opened.module, opened.stream, plan, scratch
        self._pulse = pulse
        self.config = opened.module.config
        self.dtype, self.device = DTYPES[plan.precision.transformer], torch.device(plan.device)

    def predict(self, branches: Sequence[Branch]) -> list[Tensor]:
        """What the transformer gives for each branch. Takes and returns what `banded.transformer.predict` does."""
        plan = self.plan.denoise
        if plan is not None and not plan.together and len(branches) > 1:
            return [self.predict([branch])[0] for branch in branches]
        residual: Store = "memory" if plan is None else plan.residual
        return predict(
            self.module,
            branches,
            layer=self._materialize,
            band_rows=None if plan is None else plan.band_rows,
            new_map=lambda height: new_map(residual, height, self.scratch),
            lay_out=plan is not None and plan.lay_out,
        )

    @contextmanager
    def _materialize(self, index: int) -> Iterator[nn.Module]:
        blocks = self.module.transformer_blocks
        self._pulse(DENOISE.name)
        with self.stream.materialize(blocks[index]):
            self.stream.prefetch(blocks[(index + 1) % len(blocks)])  # after the last, for the next step
            yield blocks[index]


class Session:
    """Text encoder, transformer and autoencoder of one checkpoint, one of them in memory at a time.

    A context manager; `resident=True` holds on to every module once it is opened, whole, for repeated use. `scratch` is
    the folder for maps that a plan puts on disk. What a module is opened in, and how much of it stays in memory, is the
    plan's that it is first opened with; `free` before another plan is to be followed. `opened` says what is open, by
    component, half of the autoencoder, precision and device. `on_event` is given a pulse between two blocks, and told
    once of each tensor that is not used.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        *,
        resident: bool = False,
        scratch: Path | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self.spec, self.resident, self.scratch, self.on_event = spec, resident, scratch, on_event
        self._told: set[str] = set()
        self.opened: dict[str, Opened] = {}
        self._device = "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def pulse(self, stage: str) -> None:
        """Gives the listener a moment to end the job in."""
        self.on_event(pulse(stage))

    def free(self) -> None:
        """Forgets every module and gives its memory back."""
        if not self.opened:
            return
        for opened in self.opened.values():
            opened.stream.close()
        self.opened.clear()
        release(self._device)

    def open_text_encoder(self, plan: Plan) -> Any:
        """The text encoder; its embedding table stays in the file, which gives the few rows that a prompt needs."""

        def opened() -> Opened:
            dtype = DTYPES[plan.precision.text_encoder]
            module, stream = open_text_encoder(
                self.spec,
                dtype=dtype,
                device=plan.device,
                on_event=self._tell_once,
                on_layer=lambda: self.pulse(TEXT.name),
            )
            if self.resident:
                stream.make_resident(module)
            return Opened(module, stream, resident=self.resident)

        return self._once("text_encoder", plan.precision.text_encoder, plan, opened).module

    def open_transformer(self, plan: Plan) -> Transformer:
        """The transformer, its first layers resident as the plan says; its position embedding is never stored."""

        def opened() -> Opened:
            module, stream = self._open_module("transformer", plan.precision.transformer, plan)
            blocks: Any = module.transformer_blocks
            if self.resident or plan.denoise is None:
                stream.make_resident(module)
                return Opened(module, stream, resident=True)
            stream.make_resident(module, but=blocks[plan.denoise.resident_layers :])
            stream.pin(int(1.01 * plan.denoise.host_bytes))  # alignment pads a little
            return Opened(module, stream)

        return Transformer(
            self._once("transformer", plan.precision.transformer, plan, opened), plan, self.scratch, self.pulse
        )

    def open_autoencoder(self, plan: Plan, half: Half) -> Opened:
        """The autoencoder with one half alone."""

        def opened() -> Opened:
            module, stream = self._open_module("vae", plan.precision.autoencoder, plan, half)
            resident = self.resident or plan.decode != "rows"
            if resident:
                stream.make_resident(module)
            return Opened(module, stream, resident=resident)

        return self._once(f"vae's {half}", plan.precision.autoencoder, plan, opened)

    def _open_module(
        self, component: Component, precision: str, plan: Plan, half: Half | None = None
    ) -> tuple[Any, WeightStream]:
        leave = {"patch_embed.pos_embed"} if component == "transformer" else set()
        dtype = DTYPES[precision]
        return open_module(
            self.spec, component, dtype=dtype, device=plan.device, part=half, leave=leave, on_event=self._tell_once
        )

    def _tell_once(self, event: Progress) -> None:
        if event.detail not in self._told:
            self._told.add(event.detail)
            self.on_event(event)

    def _once(self, name: str, precision: str, plan: Plan, opened: Callable[[], Opened]) -> Opened:
        """What is open under a name, in a precision and on the plan's device; else it takes the place of the others."""
        key = f"{name} {precision} {plan.device}"
        if key not in self.opened:
            if not self.resident:
                self.free()
            self._device = plan.device
            try:
                self.opened[key] = opened()
            except OSError as error:
                raise HandscrollError(f"{self.spec.folder}: its {name} cannot be read: {error.strerror}") from error
        return self.opened[key]
